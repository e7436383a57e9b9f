"""What Weights & Biases is told through a guard, and what of it may fail."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import WandbLogger

from lightning_peft import AdapterMonitor
from lightning_peft.state.secrets import HIDDEN
from lightning_peft.tracking.guard import Guard, guard_calls, guard_of
from tests.callback.toys import Toy, data, trainer
from tests.tracking.test_monitor import Memory

pytest.importorskip("wandb")
TOKEN = "hf_ABCDEFGHIJKLMNOPQRSTUV"


class Told(WandbLogger):
    """One that keeps hyper-parameters, and starts no run."""

    def __init__(self) -> None:
        super().__init__(experiment=SimpleNamespace(log=lambda *_, **__: None))
        self.told: list[Any] = []

    @property
    def experiment(self) -> Any:
        return self._experiment

    def log_hyperparams(self, params: Any) -> None:
        self.told.append(params)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        raise OSError(28, "No space left on device")

    def finalize(self, status: str) -> None:
        pass


class Rows(L.LightningDataModule):
    def __init__(self, api_token: str) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return data()


class Given(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"model_options": {"token": TOKEN, "r": 2}})


@pytest.mark.parametrize("strict", [False, True])
def test_lightning_s_own_hyper_parameters_and_the_description_are_without_secrets(strict: bool, tmp_path: Path) -> None:
    logger, other = Told(), Memory()
    monitor = AdapterMonitor(every_n_steps=100, strict=strict)
    fitting = trainer(
        tmp_path, monitor, logger=[logger, other], max_epochs=1, enable_checkpointing=False, log_every_n_steps=100
    )
    fitting.fit(Given(), datamodule=Rows(TOKEN))
    own, described = logger.told
    assert (own["model_options"], own["api_token"]) == ({"token": HIDDEN, "r": 2}, HIDDEN)
    # what the monitor adds, to any logger
    for adapter in (described["adapter"], other.told["adapter"]):
        assert adapter["dataset"] == {"name": "Rows", "class": f"{__name__}.Rows", "api_token": HIDDEN}


def test_a_namespace_s_secrets_are_hidden_too() -> None:
    logger = Told()
    guard_calls(logger, Guard("a test"))
    logger.log_hyperparams(Namespace(seed=1, password="short"))
    logger.log_hyperparams(params={"hub_token": TOKEN})
    assert logger.told == [{"seed": 1, "password": HIDDEN}, {"hub_token": HIDDEN}]


def test_the_last_guard_holds() -> None:
    logger, strict, lenient = Told(), Guard("strict", strict=True), Guard("lenient")
    guard_calls(logger, strict)
    with pytest.raises(OSError, match="No space left"):
        logger.log_metrics({})
    guard_calls(logger, lenient)
    with pytest.warns(UserWarning, match="^lenient: Told.log_metrics failed and is left out, the run goes on"):
        logger.log_metrics({})
    assert guard_of(logger) is lenient


def test_a_logger_without_a_guard_may_fail() -> None:
    logger = Told()
    told = r"^Told: a picture failed and is left out, the run goes on \(ValueError: no\)$"
    with pytest.warns(UserWarning, match=told), guard_of(logger).trying("a picture"):
        raise ValueError("no")
    with pytest.raises(OSError, match="No space left"):
        logger.log_metrics({})
