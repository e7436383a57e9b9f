"""examples/ray_train.py on a local cluster of two workers: it trains as `peft_ddp` does, and reports adapters alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_peft import load_from_checkpoint
from lightning_peft.state import adapter_tensors, read_checkpoint
from tests.callback.toys import data
from tests.processes import ROOT
from tests.strategies.conftest import OfRanks
from tests.strategies.kinds import Plain
from tests.strategies.ranks import ACCELERATOR, plain

pytestmark = [
    pytest.mark.xdist_group("devices"),
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

EPOCHS = 3
GPUS = 2 if ACCELERATOR == "cuda" else 0


@pytest.fixture
def _cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    where = {"address": "local", "include_dashboard": False, "log_to_driver": False}
    ray.init(num_cpus=2, num_gpus=GPUS, runtime_env={"env_vars": settings}, **where)
    yield
    ray.shutdown()


class Dies(L.Callback):
    """The second worker is killed in the second epoch, if it has not been before."""

    def __init__(self, once: Path) -> None:
        self.once = once

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        if trainer.current_epoch == 1 and index == 2 and trainer.global_rank == 1 and not self.once.exists():
            self.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def worker(config: dict[str, Any]) -> None:
    from examples.ray_train import fit

    torch.set_num_threads(1)
    L.seed_everything(5, verbose=False)
    module = Plain()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    dies = Dies(Path(config["folder"]) / "died")
    trainer = fit(module, data(), plain(), max_epochs=EPOCHS, callbacks=[dies], **quiet)
    state = {name: tensor.cpu() for name, tensor in module.state_dict().items()}
    found = {"state": state, "steps": trainer.global_step, "world": trainer.world_size}
    torch.save(found, Path(config["folder"]) / f"worker.{trainer.global_rank}.pt")


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.usefixtures("_cluster")
def test_two_workers_of_which_one_is_killed_end_as_two_ranks_of_peft_ddp(tmp_path: Path, of_ddp: OfRanks) -> None:
    import ray.train.torch

    result = ray.train.torch.TorchTrainer(
        worker,
        train_loop_config={"folder": str(tmp_path)},
        scaling_config=ray.train.ScalingConfig(num_workers=2, use_gpu=GPUS > 0),
        run_config=ray.train.RunConfig(
            name="run", storage_path=str(tmp_path), failure_config=ray.train.FailureConfig(max_failures=1)
        ),
    ).fit()
    assert (tmp_path / "died").exists()
    # an epoch each, and none of them twice: the workers went on from what was reported
    assert [metrics["epoch"] for _, metrics in result.best_checkpoints] == list(range(EPOCHS))
    assert result.metrics["step"] == 4 * EPOCHS

    for rank, expected in enumerate(of_ddp("as_in_ray")):
        found = torch.load(tmp_path / f"worker.{rank}.pt", weights_only=True)
        assert (found["world"], found["steps"]) == (2, 4 * EPOCHS)
        same(found["state"], expected)

    path = Path(result.checkpoint.path) / "checkpoint.ckpt"
    module = load_from_checkpoint(Plain, path)
    adapters = adapter_tensors(module, "default")
    saved = read_checkpoint(path)
    assert {name for name, tensor in saved["state_dict"].items() if tensor.numel()} == set(adapters)
    assert len(saved["peft"]["rng_states"]) == 2
    same({name: found["state"][name] for name in adapters}, adapters)
