"""What AdapterMonitor does where something can't be measured, isn't there, or would take long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import Adafactor

from lightning_peft import AdapterMonitor
from lightning_peft.tracking.monitor.steps import learning_rates
from lightning_peft.tracking.weights_and_biases import sources as room
from tests.callback.toys import Toy, data, trainer
from tests.tracking.test_monitor import Memory, run
from tests.tracking.test_monitor_wandb import Dead, DeadLogger

STEPS = [2, 5, 8, 11, 14]


def test_a_logger_that_fails_is_left_out_with_one_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="AdapterMonitor") as told:
        trained = run(tmp_path, logger=[Memory(fails=True), (kept := Memory())], log_every_n_steps=1)
    messages = [str(warning.message) for warning in told]
    assert [message for message in messages if "AdapterMonitor" in message] == [
        "AdapterMonitor: logging to Memory (logger 1) failed and is left out, the run goes on "
        "(ConnectionError: the server is gone)"
    ]
    assert trained.global_step == 16
    assert len(kept.values("adapter/grad_norm/total")) == 16
    with pytest.raises(ConnectionError, match="the server is gone"):
        run(tmp_path, AdapterMonitor(strict=True), logger=Memory(fails=True))


def test_what_cannot_be_measured_is_left_out_with_one_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_memory(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("no memory for a copy")

    monkeypatch.setattr("lightning_peft.tracking.monitor.norms.StepNorms.before", no_memory)
    with pytest.warns(UserWarning, match="norms failed and is left out, the run goes on .OutOfMemoryError: no memory"):
        memory: Any = run(tmp_path).logger
    assert memory.values("adapter/grad_norm/total") == {}
    assert list(memory.values("speed/samples_per_second")) == [2, 5, 8, 11, 14]


def test_an_optimizer_without_a_learning_rate_is_logged_as_any_other(tmp_path: Path) -> None:
    class Own(Toy):
        def configure_optimizers(self) -> Any:
            return Adafactor(self.parameters())

    memory: Any = run(tmp_path, AdapterMonitor(strict=True), module=Own()).logger
    for name in ("adapter/grad_norm/total", "adapter/update_ratio/total", "speed/samples_per_second"):
        assert list(memory.values(name)) == STEPS
    assert not [name for _, row in memory.rows for name in row if name.startswith("lr/")]


def test_a_group_without_one_leaves_the_others_theirs() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(3)]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    optimizer.param_groups[0]["lr"] = None
    del optimizer.param_groups[2]["lr"]
    assert learning_rates([optimizer]) == {"SGD/1": 0.5}


@pytest.mark.parametrize(
    ("place", "what"), [("callback.learning_rates", "learning rates"), ("callback.trained_groups", "norms")]
)
def test_what_fails_in_a_step_silences_nothing_else(
    place: str, what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any) -> None:
        raise TypeError("of no type")

    monkeypatch.setattr(f"lightning_peft.tracking.monitor.{place}", fail)
    with pytest.warns(UserWarning, match=f"{what} failed and is left out, the run goes on .TypeError: of no type"):
        memory: Any = run(tmp_path).logger
    assert list(memory.values("speed/samples_per_second")) == STEPS
    assert list(memory.values("lr/AdamW")) == ([] if what == "learning rates" else STEPS)
    assert list(memory.values("adapter/grad_norm/total")) == ([] if what == "norms" else STEPS)


def test_speed_is_that_of_the_ranks_that_have_rows_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read = "lightning_peft.tracking.monitor.throughput.Throughput.read"
    monkeypatch.setattr(read, lambda _: {"samples_per_second": 10.0})
    monkeypatch.setattr(L.Trainer, "world_size", 6)
    # of six ranks, two at a time compute the same rows
    monkeypatch.setattr(L.Trainer, "distributed_sampler_kwargs", {"num_replicas": 3, "rank": 0})
    memory: Any = run(tmp_path, enable_checkpointing=False).logger
    assert memory.values("speed/samples_per_second") == dict.fromkeys(STEPS, 30.0)


class Rows(L.LightningDataModule):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return data()

    val_dataloader = train_dataloader


def test_data_is_read_once_in_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read: list[Path] = []
    monkeypatch.setattr(room, "_digest", lambda path: read.append(path))
    given: list[Any] = []
    monkeypatch.setattr(
        "lightning_peft.tracking.monitor.callback.log_checkpoint", lambda *_, uses, **__: given.append(uses)
    )
    loggers = [DeadLogger(experiment=Dead()), DeadLogger(experiment=Dead())]
    saver = ModelCheckpoint(tmp_path / "runs", "{epoch}", save_top_k=-1)
    fitting = trainer(tmp_path, saver, logger=loggers, max_epochs=3)
    torch.manual_seed(0)
    fitting.fit(Toy(), datamodule=Rows(str(tmp_path)))
    assert read == [tmp_path]
    # of three checkpoints, to both loggers
    assert [[source.name for source in uses] for uses in given] == [["Toy", tmp_path.name]] * 6
