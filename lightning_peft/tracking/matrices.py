"""Matrices of numbers, such as a confusion matrix, in the forms in which loggers and terminals show them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_peft.tracking.guard import guard_of
from lightning_peft.tracking.weights_and_biases.runs import log_confusion_matrix

ACTUAL, PREDICTED = "actual", "predicted"
PRINTED = 20
"""The most rows and columns that are printed; more don't fit on a screen."""


@rank_zero_only
def show_matrix(trainer: pl.Trainer, name: str, matrix: torch.Tensor, labels: Sequence[str] | None = None) -> None:
    """Give a matrix to the Trainer's loggers, and print it in `validate` and `test` unless they are to print nothing.

    Weights & Biases gets its chart of confusion matrices, TensorBoard a text; any other logger with a folder gets the
    file `<name>.csv` in it, which holds the last epoch's. Nothing is logged in Lightning's sanity check. Weights &
    Biases may fail, as its other calls may: that is told and ends nothing, unless a strict AdapterMonitor asks for it.

    Args:
        trainer: asked for its loggers and for what it does.
        name: such as `val_confusion_matrix`.
        matrix: of shape (classes, classes); a row is an actual class, a column a predicted one.
        labels: the names of the classes; by default their places.
    """
    if trainer.sanity_checking:
        return
    rows = [[float(value) for value in row] for row in matrix.tolist()]
    names = list(labels) if labels is not None and len(labels) == len(rows) else [str(row) for row in range(len(rows))]
    for logger in trainer.loggers:
        _log(logger, name, rows, names, trainer.global_step)
    loops = {TrainerFn.VALIDATING: trainer.validate_loop, TrainerFn.TESTING: trainer.test_loop}
    if trainer.state.fn in loops and loops[trainer.state.fn].verbose:
        _print(name, rows, names)


def _log(logger: Logger, name: str, rows: list[list[float]], names: list[str], step: int) -> None:
    header, *lines = _cells(rows, names)
    if isinstance(logger, WandbLogger):
        with guard_of(logger).trying(name):
            log_confusion_matrix(logger.experiment, name, names, rows, step)
    elif isinstance(logger, TensorBoardLogger):
        markdown = [header, ["---"] * len(header), *lines]
        text = "\n".join(f"| {' | '.join(line)} |" for line in markdown)
        logger.experiment.add_text(name, text, step)
    elif folder := getattr(logger, "log_dir", None):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with Path(folder, f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *lines])


def _print(name: str, rows: list[list[float]], names: list[str]) -> None:
    if len(rows) > PRINTED:
        return
    header, *lines = _cells(rows, names)
    table = Table(title=name, title_justify="left")
    for place, label in enumerate(header):
        table.add_column(escape(label), justify="right" if place else "left")
    for line in lines:
        table.add_row(*map(escape, line))
    Console().print(table)


def _cells(rows: list[list[float]], names: list[str]) -> list[list[str]]:
    body = [[label, *map(_text, row)] for label, row in zip(names, rows, strict=True)]
    return [[f"{ACTUAL} / {PREDICTED}", *names], *body]


def _text(value: float) -> str:
    return f"{value:.0f}" if value.is_integer() else f"{value:.4f}"
