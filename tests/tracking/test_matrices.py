from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn

from lightning_peft.tracking.guard import Guard, guard_calls
from lightning_peft.tracking.matrices import show_matrix
from lightning_peft.tracking.weights_and_biases.runs import CHARTED, log_confusion_matrix
from tests.tracking.test_heat_map import parsed

MATRIX = torch.tensor([[3, 1], [0, 2]])
LINES = [["actual / predicted", "[bad]", "good"], ["[bad]", "3", "1"], ["good", "0", "2"]]


class Board(TensorBoardLogger):
    """One that keeps texts, and needs no tensorboard."""

    def __init__(self) -> None:
        self.texts: list[Any] = []

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(add_text=lambda *arguments: self.texts.append(arguments))


class Weights(WandbLogger):
    """One that keeps what a run is given, and starts none."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(log=self.logged.append)


class Dead(WandbLogger):
    """One whose run is gone."""

    def __init__(self) -> None:
        pass

    @property
    def experiment(self) -> Any:
        raise ConnectionError("the run is gone")


def shown(folder: Path, does: TrainerFn, *loggers: Any, verbose: bool = True) -> None:
    trainer = L.Trainer(accelerator="cpu", logger=list(loggers), default_root_dir=folder)
    trainer.state.fn = does
    trainer.validate_loop.verbose = trainer.test_loop.verbose = verbose
    show_matrix(trainer, "val_m", MATRIX, ["[bad]", "good"])


def cells(printed: str) -> list[list[str]]:
    rows = [line.replace("┃", "│").strip("│").split("│") for line in printed.splitlines() if line[:1] in "┃│"]
    return [[cell.strip() for cell in row] for row in rows]


def test_each_logger_gets_what_it_can_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    board, weights, table = Board(), Weights(), CSVLogger(tmp_path, "a", version=0)
    shown(tmp_path, TrainerFn.FITTING, board, weights, table)
    assert board.texts == [
        ("val_m", "| actual / predicted | [bad] | good |\n| --- | --- | --- |\n| [bad] | 3 | 1 |\n| good | 0 | 2 |", 0)
    ]
    written = (tmp_path / "a" / "version_0" / "val_m.csv").read_text().splitlines()
    assert [line.split(",") for line in written] == LINES
    (entry,) = weights.logged
    assert entry["trainer/global_step"] == 0
    assert entry["val_m"].table.data == [
        ["[bad]", "[bad]", 3],
        ["[bad]", "good", 1],
        ["good", "[bad]", 0],
        ["good", "good", 2],
    ]
    assert "val_m" not in capsys.readouterr().out


def test_chart_is_the_one_that_wandb_makes_of_predictions() -> None:
    wandb = pytest.importorskip("wandb")
    own: list[dict[str, Any]] = []
    run: Any = SimpleNamespace(log=own.append)
    log_confusion_matrix(run, "val_m", ["bad", "good"], MATRIX.tolist(), 7)
    truth, guess = [0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]
    theirs = wandb.plot.confusion_matrix(y_true=truth, preds=guess, class_names=["bad", "good"], title="val_m")
    chart = own[0]["val_m"]
    assert (chart.spec, chart.table.columns, chart.table.data) == (
        theirs.spec,
        theirs.table.columns,
        theirs.table.data,
    )


def test_of_many_classes_it_is_a_page_that_lacks_none() -> None:
    pytest.importorskip("wandb")
    own: list[dict[str, Any]] = []
    run: Any = SimpleNamespace(log=own.append)
    for count in (CHARTED, CHARTED + 1):
        counts = [[float(row * count + column) for column in range(count)] for row in range(count)]
        log_confusion_matrix(run, "val_m", [f"c{place}" for place in range(count)], counts, 7)
    # wandb keeps 10,000 rows of a table
    assert len(own[0]["val_m"].table.data) == 10_000
    assert own[1]["trainer/global_step"] == 7
    cells, texts = parsed(own[1]["val_m"].html)
    assert len(cells) == 101**2
    assert {"actual c0, predicted c99: 99", "actual c100, predicted c100: 10200"} <= {*cells}
    assert texts[-4:] == ["predicted c0", "predicted c100", "0", "1.02e+04"]


def test_weights_and_biases_may_fail_unless_a_strict_guard_holds_it(tmp_path: Path) -> None:
    dead, table = Dead(), CSVLogger(tmp_path, "a", version=0)
    told = "val_m failed and is left out, the run goes on \\(ConnectionError: the run is gone\\)$"
    with pytest.warns(UserWarning, match=f"^Dead: {told}"):
        shown(tmp_path, TrainerFn.FITTING, dead, table)
    assert (tmp_path / "a" / "version_0" / "val_m.csv").is_file()
    guard_calls(dead, Guard("AdapterMonitor"))
    with pytest.warns(UserWarning, match=f"^AdapterMonitor: {told}"):
        shown(tmp_path, TrainerFn.FITTING, dead)
    guard_calls(dead, Guard("AdapterMonitor", strict=True))
    with pytest.raises(ConnectionError, match="the run is gone"):
        shown(tmp_path, TrainerFn.FITTING, dead)


@pytest.mark.parametrize("does", [TrainerFn.VALIDATING, TrainerFn.TESTING])
def test_evaluation_prints_it_unless_it_is_to_print_nothing(
    does: TrainerFn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(tmp_path, does)
    assert cells(capsys.readouterr().out) == LINES
    shown(tmp_path, does, verbose=False)
    assert cells(capsys.readouterr().out) == []
    assert list(tmp_path.iterdir()) == []


def test_many_classes_are_not_printed_and_the_sanity_check_shows_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = L.Trainer(accelerator="cpu", logger=CSVLogger(tmp_path, "a", version=0))
    trainer.state.fn = TrainerFn.VALIDATING
    show_matrix(trainer, "m", 0.5 * torch.eye(21))
    assert cells(capsys.readouterr().out) == []
    written = (tmp_path / "a" / "version_0" / "m.csv").read_text().splitlines()
    assert len(written) == 22
    assert written[1].startswith("0,0.5000,0,0,")
    trainer.sanity_checking = True
    show_matrix(trainer, "other", MATRIX)
    assert not (tmp_path / "a" / "version_0" / "other.csv").exists()
