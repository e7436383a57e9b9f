"""The functions that speak with W&B where it is missing, disabled, online, finished by others, or not this rank's."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

import lightning_peft.tracking
from lightning_peft.tracking.weights_and_biases.artifacts import checkpoints, log_checkpoint
from lightning_peft.tracking.weights_and_biases.runs import log_configuration, log_heat_map, log_table, own_run
from lightning_peft.tracking.weights_and_biases.sources import Source
from tests.callback.toys import Toy, data, trainer
from tests.tracking.wandb_records import offline

wandb = pytest.importorskip("wandb")
pytestmark = pytest.mark.xdist_group("wandb")  # one run, and one process of wandb, for all of a file
USES = [Source("base", "org/name", {"a": 1}, "https://huggingface.co/org/name"), Source("dataset", "Rows")]


class FakeRun:
    """A run that keeps what it is told."""

    id = "1"

    def __init__(self, is_offline: bool) -> None:
        self.offline = is_offline
        self.told: list[tuple[str, str, list[str]]] = []

    def use_artifact(self, artifact: Any) -> None:
        assert not self.offline  # wandb refuses it there
        self.told.append(("use", artifact.name, []))

    def _log_artifact(self, artifact: Any, *, is_user_created: bool, use_after_commit: bool) -> None:
        self.told.append(("use" if is_user_created and use_after_commit else "?", artifact.name, []))

    def log_artifact(self, artifact: Any, aliases: list[str]) -> Any:
        self.told.append(("log", artifact.name, aliases))
        return artifact

    def finish(self, exit_code: int) -> None:
        self.told.append(("finish", str(exit_code), []))


@pytest.fixture
def _offline(tmp_path: Path) -> Iterator[None]:
    with offline(tmp_path / "wandb"):
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapter-only checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    saving = trainer(folder, max_epochs=1, limit_train_batches=2, limit_val_batches=0)
    saving.fit(Toy(), data(16))
    paths = {name: folder / f"{name}.ckpt" for name in ("first", "second")}
    saving.save_checkpoint(paths["first"])
    saving.fit_loop.epoch_progress.current.completed += 1
    saving.save_checkpoint(paths["second"])
    return paths


def logger(run: FakeRun, **options: Any) -> WandbLogger:
    return WandbLogger(experiment=run, **options)


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("is_offline", [False, True])
def test_lineage_is_noted_once_online_and_offline(saved: dict[str, Path], is_offline: bool) -> None:
    run = FakeRun(is_offline)
    for _ in range(2):
        log_checkpoint(logger(run), saved["first"], aliases=["best", "latest"], uses=USES)
    artifact = [("log", "adapter-1", ["best", "latest"])]
    assert run.told == [("use", "base-org-name", []), ("use", "data-Rows", []), *artifact]


@pytest.mark.usefixtures("_offline")
def test_a_checkpoint_is_logged_when_its_aliases_stand_for_another(saved: dict[str, Path]) -> None:
    run = FakeRun(True)
    first, second = saved["first"], saved["second"]
    for path, aliases in [
        (first, ["best", "latest"]),
        (second, ["latest"]),
        (second, ["latest"]),
        (second, ["best", "latest"]),
        (second, ["best"]),
        (first, ["best"]),  # of which wandb makes the latest too
        (second, ["latest"]),
    ]:
        log_checkpoint(logger(run), path, aliases=aliases)
    assert [aliases for _, _, aliases in run.told] == [
        ["best", "latest"],
        ["latest"],
        ["best", "latest"],
        ["best"],
        ["latest"],
    ]
    log_checkpoint(logger(FakeRun(True)), second, aliases=["latest"])  # another run knows nothing of it


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("log_model", [True, "all"])
def test_what_lightning_uploads_itself_is_not_uploaded_again(saved: dict[str, Path], log_model: bool | str) -> None:
    run = FakeRun(True)
    assert logger(run)._log_model is False  # private to Lightning 2.6, and read by log_checkpoint
    told = log_checkpoint(logger(run, log_model=log_model), saved["first"], aliases=["best"], uses=USES[1:])
    assert told is None
    assert run.told == [("use", "data-Rows", [])]


def test_other_ranks_log_nothing(saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    run = FakeRun(True)
    assert log_checkpoint(logger(run), saved["first"], aliases=["best"], uses=USES) is None
    assert run.told == []


@pytest.mark.usefixtures("_offline")
def test_disabled_it_takes_all_and_keeps_nothing(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    own = WandbLogger(save_dir=tmp_path)
    log_configuration(own, {"a": 1})
    log_table(own.experiment, "t", ["a"], [[1]], 0)
    log_heat_map(own.experiment, "h", ["a"], [1], [[1.0]], 0)
    log_checkpoint(own, saved["first"], aliases=["best"], uses=USES)
    wandb.finish()
    assert list(tmp_path.rglob("*.wandb")) == []


def test_without_a_wandb_logger_wandb_is_not_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lightning_peft, "tracking", lightning_peft.tracking)  # where it finds itself again afterwards
    names = [name for name in sys.modules if name.startswith(("wandb.", "lightning_peft.tracking"))]
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises
    room = importlib.import_module("lightning_peft.tracking.weights_and_biases.runs")
    importlib.import_module("lightning_peft.tracking.weights_and_biases.artifacts")
    assert room.wandb_loggers(SimpleNamespace(loggers=[CSVLogger(tmp_path)])) == []
    assert room.wandb_loggers(SimpleNamespace(loggers=[])) == []
    with room.own_run():
        pass
    with pytest.raises(ModuleNotFoundError, match="wandb"):
        room.log_table(FakeRun(True), "t", ["a"], [[1]], 0)


def test_a_run_that_was_started_in_the_context_is_ended_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    there = SimpleNamespace(run=None)
    monkeypatch.setitem(sys.modules, "wandb", there)
    good, bad, earlier = FakeRun(True), FakeRun(True), FakeRun(True)

    @own_run()
    def start(run: FakeRun, error: BaseException | None = None) -> None:
        there.run = run
        if error is not None:
            raise error

    start(good)
    there.run = None
    with pytest.raises(KeyboardInterrupt):
        start(bad, KeyboardInterrupt())
    there.run = earlier
    with own_run():
        pass
    assert [run.told for run in (good, bad, earlier)] == [[("finish", "0", [])], [("finish", "1", [])], []]


def test_checkpoints_are_best_latest_or_both(tmp_path: Path) -> None:
    def saver(monitor: str | None, best: str, last: str, *others: str) -> Any:
        made = ModelCheckpoint(tmp_path, monitor=monitor)
        made.best_model_path, made.last_model_path = best and str(tmp_path / best), last and str(tmp_path / last)
        made.best_k_models = {str(tmp_path / name): 0.0 for name in others}
        return made

    def found(*savers: Any) -> dict[str, list[str]]:
        files = checkpoints(SimpleNamespace(checkpoint_callbacks=[*savers, "no ModelCheckpoint"]))
        return {path.name: aliases for path, aliases in files.items()}

    for place, (name, content) in enumerate({"a": "1", "b": "2", "copy": "2", "c": "3"}.items()):
        (tmp_path / name).write_text(content)
        os.utime(tmp_path / name, ns=(place, place))
    (tmp_path / "shards").mkdir()
    assert found(saver("loss", "a", "")) == {"a": ["best", "latest"]}
    assert found(saver("loss", "a", "", "a", "b")) == {"a": ["best"], "b": ["latest"]}
    assert found(saver("loss", "b", "copy")) == {"b": ["best", "latest"]}
    assert found(saver(None, "b", "")) == {"b": ["latest"]}
    assert found(saver(None, "c", ""), saver("loss", "a", "")) == {"a": ["best"], "c": ["latest"]}
    assert found(saver("loss", "gone", "")) == {}
    assert found(saver("loss", "shards", "")) == {}
    assert found(saver("loss", "", "")) == found() == {}
