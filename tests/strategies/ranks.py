"""What two ranks do, one thing after the other, since starting them takes longer than most of it.

Run as `python -m tests.strategies.ranks FOLDER`. Each function leaves what it found in `FOLDER/<its name>.<rank>.pt`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_peft import PEFT, AdaLoRA, LoRA, PEFTDDPStrategy, PEFTError
from lightning_peft.methods._sharded import is_sharded
from lightning_peft.strategies.ddp import MARKS
from lightning_peft.tracking import PredictionFile
from tests.callback.toys import Toy, data, lora, trainer
from tests.processes import accelerator
from tests.strategies.counting import Collectives
from tests.strategies.kinds import Alternating, Centred, Plain, Seeded, Wide

RANK, WORLD = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
ACCELERATOR = accelerator(max(WORLD, 2))
TIMEOUT = 60
"""Seconds after which a rank gives up on others."""


def plain() -> PEFT:
    return PEFT(LoRA(r=2), modules_to_save=["head"])


def run(folder: Path, strategy: Any = "peft_ddp", *callbacks: L.Callback, **options: Any) -> L.Trainer:
    defaults = {"devices": 2, "accelerator": ACCELERATOR, "max_epochs": 1, "enable_checkpointing": False}
    return trainer(folder, *callbacks, strategy=strategy, **{**defaults, **options})


def fit(
    folder: Path,
    module: L.LightningModule,
    strategy: Any = "peft_ddp",
    rows: DataLoader[Any] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """The state of `module` after training it on the same data under any strategy."""
    L.seed_everything(5, verbose=False)
    run(folder, strategy, **options).fit(module, data() if rows is None else rows)
    return {name: tensor.cpu() for name, tensor in module.state_dict().items()}


def refused(do: Callable[[], Any]) -> str:
    try:
        do()
    except PEFTError as error:
        return str(error)
    return "nothing was refused"


def bytes_sent(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for strategy in ("ddp", "peft_ddp"):
        L.seed_everything(5, verbose=False)
        module = Wide()
        peft = PEFT(LoRA(r=2, target_modules=["body.0", "body.3"]), modules_to_save=["head"])
        for stage in ("fit", "test", "predict"):
            with Collectives() as counted:
                getattr(run(folder, strategy, peft=peft, limit_train_batches=2), stage)(module, data())
            found[f"{strategy} {stage}"] = dict(counted.bytes)
        found[f"{strategy} state"] = {name: t.cpu() for name, t in module.state_dict().items() if ".adapters." in name}
        found["adapters"] = sum(t.numel() * t.element_size() for t in found[f"{strategy} state"].values())
        found["base"] = sum(p.numel() * 4 for p in module.parameters() if not p.requires_grad)
    return found


def other_base(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        "refused": refused(lambda: run(folder).fit(Toy(seed=RANK), data())),
        "refused in test": refused(lambda: run(folder).test(Toy(seed=RANK), data(), verbose=False)),
    }
    module = Toy(seed=RANK)
    with Collectives() as counted:
        found["synced"] = fit(folder, module, PEFTDDPStrategy(sync_base=True))
    found["bytes"] = dict(counted.bytes)
    found["wanted"] = fit(folder, Toy(seed=0))

    class Wider(Toy):
        def build(self) -> None:
            super().build()
            self.unused = nn.Linear(3 + RANK, 2)

    def peft() -> PEFT:
        return PEFT(LoRA(r=2, target_modules=["body.0"]), modules_to_save=["head"])

    found["other shape"] = refused(
        lambda: run(folder, PEFTDDPStrategy(sync_base=True), peft=peft()).fit(Wider(), data())
    )
    return found


def quantized_base(folder: Path) -> dict[str, Any]:
    from bitsandbytes.nn import Linear4bit

    class Packed(Plain):
        """Whose ranks may have the same codes with other scales."""

        factor = 1

        def build(self) -> None:
            super().build()
            torch.manual_seed(1)
            weight = torch.randn(16, 16)
            layer = Linear4bit(16, 16, bias=False, compute_dtype=torch.float32)
            layer.load_state_dict({"weight": weight * self.factor})
            self.body.append(layer.to("cpu"))

    def peft() -> PEFT:
        return PEFT(LoRA(r=2, target_modules=["body.0"]), modules_to_save=["head"])

    class Scaled(Packed):
        factor = 1 + RANK

    found: dict[str, Any] = {"refused": refused(lambda: run(folder, peft=peft()).fit(Scaled(), data()))}
    module = Scaled()
    fit(folder, module, PEFTDDPStrategy(sync_base=True), peft=peft())
    same = Packed()
    fit(folder, same, peft=peft())
    for name, each in (("synced", module), ("wanted", same)):
        weight, head = each.body[-1].weight, each.head.adapters["default"].weight
        found[name] = [tensor.data.cpu() for tensor in (weight, weight.quant_state.absmax, head)]
    return found


def other_configuration(folder: Path) -> dict[str, Any]:
    def start(
        strategy: str, peft: PEFT | None = None, module: type[Toy] = Toy, lr: float = 0.05, **options: Any
    ) -> str:
        return refused(lambda: run(folder, strategy, peft=peft, **options).fit(module(lr=lr), data()))

    class Refusing(Toy):
        """On whose second rank no optimizer is made."""

        def configure_optimizers(self) -> Any:
            if RANK:
                raise PEFTError("no optimizer")
            return super().configure_optimizers()

    found = {}
    for strategy in ("ddp", "peft_ddp"):
        found[f"{strategy} r"] = start(strategy, PEFT(LoRA(r=2 + RANK), modules_to_save=["head"]))
        found[f"{strategy} saved"] = start(strategy, PEFT(LoRA(r=2), modules_to_save=["head", "body.4"][: 1 + RANK]))
        found[f"{strategy} lr"] = start(strategy, lr=0.25 * (1 + RANK))
        found[f"{strategy} trainer"] = start(strategy, max_epochs=1 + RANK, accumulate_grad_batches=2 - RANK)
        found[f"{strategy} optimizer"] = start(strategy, module=Refusing)
        found[f"{strategy} fault"] = start(strategy, PEFT(LoRA(r=2, target_modules=["body.0", "bodi"][: 1 + RANK])))

    class Halved(Toy):
        """On whose second rank less trains."""

        def configure_model(self) -> None:
            if RANK:
                self.body[4] = nn.Identity()

    found["trained"] = refused(lambda: run(folder, "ddp").fit(Halved(), data()))
    bare = L.Trainer(
        devices=2, accelerator=ACCELERATOR, strategy="peft_ddp", logger=False, enable_checkpointing=False,
        default_root_dir=folder, enable_model_summary=False, enable_progress_bar=False, max_epochs=1,
    )  # fmt: skip
    found["no callback"] = refused(lambda: (bare if RANK else run(folder)).fit(Toy(), data()))
    return found


def as_stock(folder: Path) -> dict[str, Any]:
    """States after training under `ddp` and `peft_ddp`."""
    found: dict[str, Any] = {}

    def both(name: str, module: Callable[[], L.LightningModule], **options: Any) -> None:
        for strategy in ("ddp", "peft_ddp"):
            made = {key: value() for key, value in options.items() if key == "peft"}
            found[f"{strategy} {name}"] = fit(folder, module(), strategy, **{**options, **made})

    both("statistics", Toy, peft=lambda: PEFT(lora(), modules_to_save=["body.1", "head"]))
    both("center", Centred, max_epochs=2)
    adalora = AdaLoRA(target_r=2, init_r=4, tinit=1, tfinal=2, total_steps=8)
    both("adalora", Toy, peft=lambda: PEFT(adalora), max_epochs=2)
    both("accumulated", Toy, accumulate_grad_batches=2)
    both("manual", manual)
    found["ddp static"] = fit(folder, Toy(), "ddp")
    found["peft_ddp static"] = fit(folder, Toy(), PEFTDDPStrategy(static_graph=True))
    return found


def manual() -> L.LightningModule:
    from tests.callback.toys import Manual

    return Manual()


def accumulated(folder: Path) -> dict[str, Any]:
    """Sixteen batches on two ranks, of which two and two make a step."""
    found: dict[str, Any] = {}
    rows = data(rows=128).dataset
    own = DataLoader(rows, 8, sampler=DistributedSampler(rows, 2, RANK, shuffle=False))
    for batches in (1, 2):
        options = {"accumulate_grad_batches": batches, "use_distributed_sampler": False}
        with Collectives() as counted:
            found[f"{batches}"] = fit(folder, Plain(), rows=own, peft=plain(), **options)
        found[f"{batches} calls"] = counted.calls["allreduce"]
    return found


def unused(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"found": fit(folder, Alternating(), "peft_ddp_find_unused_parameters_true", peft=plain())}
    try:
        fit(folder, Alternating(), peft=plain())
    except RuntimeError as error:
        found["told"] = str(error)
    return found


def hook(folder: Path) -> dict[str, Any]:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    found: dict[str, Any] = {}
    for name, chosen in (("none", None), ("fp16", default_hooks.fp16_compress_hook)):
        with Collectives() as counted:
            found[name] = fit(folder, Plain(), PEFTDDPStrategy(ddp_comm_hook=chosen), peft=plain())
        found[f"{name} bytes"] = counted.bytes["allreduce"]
    return found


def stages(folder: Path) -> dict[str, Any]:
    """All stages on one Trainer, with `ckpt_path`."""
    L.seed_everything(5, verbose=False)
    module = Plain()
    fitting = run(
        folder / "stages", "peft_ddp", PredictionFile(), peft=plain(), enable_checkpointing=True, max_epochs=2
    )
    fitting.fit(module, data(), data(rows=32))
    path = fitting.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    trained = {name: tensor.cpu().clone() for name, tensor in module.state_dict().items()}
    fitting.save_checkpoint(folder / "after.ckpt")
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    (tested,) = fitting.test(module, data(rows=32), ckpt_path=path, verbose=False)
    rows = DataLoader(data(rows=7, batch_size=2).dataset, 2)
    fitting.predict(module, rows, ckpt_path=path, return_predictions=False)
    return {
        "trained": trained,
        "tested": tested,
        "path": path,
        "marks": hasattr(module, MARKS),
    }


def resumed(folder: Path) -> dict[str, Any]:
    """Three epochs at once, and with a break after two, shuffled, with dropout from each rank's own numbers."""

    class StopAfter(L.Callback):
        def __init__(self, epochs: int) -> None:
            self.epochs = epochs

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch + 1 == self.epochs

    found: dict[str, Any] = {}
    path = None
    for name, epochs in (("whole", 3), ("broken", 2), ("resumed", 3)):
        L.seed_everything(5, verbose=False)
        module = Seeded()
        rng = torch.get_rng_state()
        if name == "resumed":
            torch.manual_seed(9)
        fitting = run(folder / name, "peft_ddp", StopAfter(epochs), max_epochs=3, enable_checkpointing=True)
        loader = DataLoader(data().dataset, 8, shuffle=True)
        fitting.fit(module, loader, data(), ckpt_path=path if name == "resumed" else None)
        path = fitting.checkpoint_callback.best_model_path  # type: ignore[union-attr]
        found[name] = {key: tensor.cpu() for key, tensor in module.state_dict().items()}
        found[f"{name} numbers"] = torch.rand(3)
        assert not torch.equal(torch.get_rng_state(), rng)
    found["states"] = len(torch.load(path, weights_only=True)["peft"]["rng_states"])  # type: ignore[arg-type]
    return found


def told_by_slurm(folder: Path) -> dict[str, Any]:
    """The first rank is told that its time is nearly over, while the second waits for its gradients."""
    job = {"JOB_ID": 77, "NTASKS": 2, "JOB_NAME": "job", "PROCID": RANK, "LOCALID": RANK, "NODEID": 0}
    job |= {"NODELIST": "127.0.0.1", "NTASKS_PER_NODE": 2}

    class Tells(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
            if (RANK, index) == (0, 2):
                os.kill(os.getpid(), signal.SIGUSR1)

    module = Plain()
    with (
        mock.patch.dict(os.environ, {f"SLURM_{name}": str(value) for name, value in job.items()}),
        mock.patch("lightning.pytorch.trainer.connectors.signal_connector.call", return_value=0) as requeued,
    ):
        fitting = run(folder / "slurm", "peft_ddp", Tells(), peft=plain(), plugins=[SLURMEnvironment()])
        # in which Lightning waits when the file is there
        with mock.patch.object(fitting.strategy, "barrier"):
            fitting.fit(module, data())
    state = {name: tensor.cpu() for name, tensor in module.state_dict().items()}
    return {"state": state, "steps": fitting.global_step, "calls": [call.args[0] for call in requeued.call_args_list]}


def as_in_ray(folder: Path) -> dict[str, Any]:
    """What test_ray.py trains under Ray."""
    return fit(folder, Plain(), max_epochs=3, peft=plain())


def unbroken(folder: Path) -> dict[str, Any]:
    return run_to_the_end(folder / "unbroken")


def broken(folder: Path, kind: type[Strategy] = PEFTDDPStrategy) -> dict[str, Any]:
    """The same, from the last checkpoint if there is one, and killed where `DIES` says: a rank, an epoch, a moment."""
    rank, epoch, moment = os.environ["DIES"].split(maxsplit=2)
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class Dies(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
            if first and (RANK, trainer.current_epoch) == (int(rank), int(epoch)):
                if moment == "in a batch" and index == 2:
                    die()
                if moment == "in a save" and index == 3:
                    torch.save = half_saved  # type: ignore[assignment]

    whole = torch.save

    def half_saved(content: Any, file: Any, **options: Any) -> None:
        if not isinstance(content, dict):
            whole(content, file, **options)  # a tensor that is pickled on its way to another rank
            return
        file.write(b"PK" * 500)
        file.flush()
        die()

    return run_to_the_end(folder / "broken", Dies(), kind=kind)


def run_to_the_end(folder: Path, *callbacks: L.Callback, kind: type[Strategy] = PEFTDDPStrategy) -> dict[str, Any]:
    last = folder / "last.ckpt"
    resumed = last.exists()
    L.seed_everything(5, verbose=False)
    module = Seeded()
    saving = ModelCheckpoint(folder, save_last=True, save_top_k=-1)
    strategy = kind(timeout=timedelta(seconds=TIMEOUT))  # type: ignore[call-arg]
    fitting = run(folder, strategy, saving, *callbacks, max_epochs=4, enable_checkpointing=True)
    loader = DataLoader(data().dataset, 8, shuffle=True)
    fitting.fit(module, loader, ckpt_path=last if resumed else None)
    state = {name: tensor.cpu() for name, tensor in module.state_dict().items() if not is_sharded(tensor)}
    return {"state": state, "numbers": torch.rand(3), "resumed": resumed, "steps": fitting.global_step}


THINGS = (
    bytes_sent, other_base, quantized_base, other_configuration, as_stock, accumulated, unused, hook, stages, resumed,
    unbroken, as_in_ray, told_by_slurm,
)  # fmt: skip


def main(folder: Path, things: Sequence[Callable[[Path], Any]]) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for thing in things:
        try:
            found = thing(folder)
        except BaseException:
            torch.save({"error": traceback.format_exc()}, folder / f"{thing.__name__}.{RANK}.pt")
            raise
        torch.save(found, folder / f"{thing.__name__}.{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [globals()[name] for name in sys.argv[2:]] or THINGS)
