"""LoRA on a decoder under Ray Train, as in configs/instruct.yaml; extra `ray`.

    python examples/ray_train.py --data chats.jsonl --workers 4 --gpu --storage /shared/runs

On a machine of its own it starts a local cluster; under `ray job submit`, or with RAY_ADDRESS, it uses the one that is
there. On several nodes the model, the data and --storage have to be where every node finds them. Started again with the
same --storage and --name, it goes on from the last checkpoint that was reported.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import ray.train
import ray.train.torch
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback, prepare_trainer

from lightning_peft import PEFT, LoRA, PEFTDDPStrategy
from lightning_peft.data import InstructionData
from lightning_peft.tasks import CausalLM


class RayPEFTDDPStrategy(RayDDPStrategy, PEFTDDPStrategy):
    """`peft_ddp` on the device that Ray gives to a worker; `prepare_trainer` asks for a strategy of Ray's."""


def fit(module: L.LightningModule, data: Any, peft: PEFT, **options: Any) -> L.Trainer:
    """Train any LightningModule on each of Ray's workers, from the last checkpoint that the run reported, if any.

    Args:
        module: built alike on every worker, as on every rank of DDP.
        data: a DataModule or data loaders.
        peft: the callback; what it leaves in a checkpoint is all that is reported.
        **options: the Trainer's.
    """
    trainer = L.Trainer(
        accelerator=ray.train.torch.get_device().type,
        devices="auto",
        strategy=RayPEFTDDPStrategy(),
        plugins=[RayLightningEnvironment()],
        # reports the metrics and a checkpoint at the end of each epoch, so that the Trainer has none to write itself
        callbacks=[peft, RayTrainReportCallback(), *options.pop("callbacks", [])],
        enable_checkpointing=False,
        **options,
    )
    trainer = prepare_trainer(trainer)
    # there is one where Ray has started the workers again, or the run
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        trainer.fit(module, data)
    else:
        with checkpoint.as_directory() as folder:
            trainer.fit(module, data, ckpt_path=Path(folder) / RayTrainReportCallback.CHECKPOINT_NAME)
    return trainer


def worker(config: dict[str, Any]) -> None:
    """What each worker does: the model and the data are made here, and never sent from the driver."""
    L.seed_everything(0, workers=True)
    module = CausalLM(config["model"], learning_rate=2e-4)
    data = InstructionData(config["data"], max_length=1024, batch_size=config["batch_size"])
    peft = PEFT(LoRA(r=16, alpha=32, target_modules="all-linear"))
    precision = "bf16-mixed" if config["gpu"] else "32-true"
    fit(module, data, peft, max_epochs=config["epochs"], precision=precision, logger=False, enable_progress_bar=False)


def main() -> None:
    """Train, and say where the last checkpoint is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="a hub id or a folder")
    parser.add_argument("--data", required=True, help="rows as in configs/instruct.yaml")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--storage", type=Path, default=Path("runs/ray_train"))
    parser.add_argument("--name", default="lora")
    given = parser.parse_args()
    # the workers' folder is another
    local = {
        name: str(Path(path).resolve()) for name in ("model", "data") if Path(path := getattr(given, name)).exists()
    }
    run = ray.train.torch.TorchTrainer(
        worker,
        train_loop_config={**vars(given), **local},
        scaling_config=ray.train.ScalingConfig(num_workers=given.workers, use_gpu=given.gpu),
        run_config=ray.train.RunConfig(
            name=given.name,
            storage_path=str(given.storage.resolve()),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            # a worker that dies, with its node or by itself, costs what was trained since the last checkpoint
            failure_config=ray.train.FailureConfig(max_failures=3),
        ),
    )
    result = run.fit()
    print(f"{result.metrics}\nload_from_checkpoint(CausalLM, '{result.checkpoint.path}/checkpoint.ckpt')")


if __name__ == "__main__":
    main()
