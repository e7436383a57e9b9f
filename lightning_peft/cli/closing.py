"""What is said at the end of a training run, and of one that was stopped."""

from __future__ import annotations

import importlib
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.table import Table

from lightning_peft.callback import AdaptedModule
from lightning_peft.tracking.tables import format_bytes

MAJORITY = "val_majority"
"""The metric that `ACCURACY` is to be read against: that of always naming the most frequent class."""
ACCURACY = "val_accuracy"


def print_closing(trainer: pl.Trainer, class_path: str, words: Sequence[str]) -> None:
    """Print the validation metrics, where the checkpoint is, its size, and how to use it.

    Args:
        trainer: after `fit`.
        class_path: the LightningModule's whole name.
        words: the command's words after its name.
    """
    console = Console()
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
    if metrics:
        console.print(_metrics_table(metrics, trainer))
    best = next((file for callback in _savers(trainer) if (file := _existing(callback.best_model_path))), None)
    path = best or _newest(trainer)
    if path is None:
        return
    module, _, name = _public(class_path).rpartition(".")
    model = trainer.lightning_module
    adapters = isinstance(model, AdaptedModule)
    exports = isinstance(model, AdaptedModule) and bool(model._peft_plan.method.peft_defaults)
    load = f"load_from_checkpoint({name}, {str(path)!r})" if adapters else f"{name}.load_from_checkpoint({str(path)!r})"
    lines = [
        f"Checkpoint   {path} ({format_bytes(_size(path))}{', adapters alone' if adapters else ''})",
        f"Evaluate it  {_command('validate', words, path)}",
        "Load it      "
        + ("from lightning_peft import load_from_checkpoint" if adapters else f"from {module} import {name}"),
        *([f"             from {module} import {name}"] if adapters else []),
        f"             model = {load}",
        *([f"Export it    {_export(path, f'{module}.{name}')}"] if exports else []),
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def interruption(trainer: pl.Trainer, verb: str, words: Sequence[str]) -> str:
    """Where a stopped run was, and how to go on with it."""
    if verb != "fit":
        return "Interrupted."
    place = f"Interrupted in epoch {trainer.current_epoch}, after {trainer.global_step} optimizer steps."
    path = _newest(trainer) or _existing(str(trainer.ckpt_path or ""))
    if path is None:
        return f"{place} No checkpoint was written yet."
    checkpoint = f"{path} ({format_bytes(_size(path))})"
    return f"{place}\nLast checkpoint: {checkpoint}\nTo go on:        {_command('fit', words, path)}"


def _metrics_table(metrics: dict[str, float], trainer: pl.Trainer) -> Table:
    monitored = {callback.monitor: callback.best_model_score for callback in _savers(trainer) if callback.monitor}
    majority = metrics.pop(MAJORITY, None)
    table = Table(title="Validation", title_justify="left")
    headers = ["metric", "last epoch"]
    headers += ["best epoch"] if set(monitored) & set(metrics) else []
    headers += ["majority baseline"] if majority is not None else []
    for header in headers:
        table.add_column(header, justify="left" if header == "metric" else "right")
    for name, value in metrics.items():
        best = monitored.get(name)
        cells = {
            "metric": name,
            "last epoch": f"{value:.4f}",
            "best epoch": "" if best is None else f"{float(best):.4f}",
            "majority baseline": f"{majority:.4f}" if majority is not None and name == ACCURACY else "",
        }
        table.add_row(*(cells[header] for header in headers))
    return table


def _command(verb: str, words: Sequence[str], path: Path) -> str:
    """The same command for `verb` and the checkpoint at `path`."""
    kept: list[str] = []
    rest = list(words[1:])
    while rest:
        word = rest.pop(0)
        if word == "--ckpt_path":
            rest = rest[1:]
        elif not word.startswith("--ckpt_path="):
            kept.append(word)
    return shlex.join(["lightning-peft", verb, *kept, "--ckpt_path", str(path)])


def _export(path: Path, class_path: str) -> str:
    # only classes of this package are looked up by the name that a checkpoint has
    model = [] if class_path.startswith("lightning_peft.") else ["--model", class_path]
    return shlex.join(["lightning-peft", "export", str(path), "adapter", *model])


def _savers(trainer: pl.Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _newest(trainer: pl.Trainer) -> Path | None:
    names: Iterable[str] = {
        name
        for callback in _savers(trainer)
        for name in (callback.best_model_path, callback.last_model_path, *callback.best_k_models)
    }
    return max(filter(None, map(_existing, names)), key=lambda path: path.stat().st_mtime, default=None)


def _existing(name: str) -> Path | None:
    if not name or not Path(name).exists():
        return None
    relative = os.path.relpath(name)
    return Path(name if relative.startswith("..") else relative)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _public(class_path: str) -> str:
    """The shortest path that gives the same class: that of the package which offers it."""
    parts = class_path.split(".")
    cls = getattr(importlib.import_module(".".join(parts[:-1])), parts[-1])
    for length in range(1, len(parts) - 1):
        shorter = [*parts[:length], parts[-1]]
        if getattr(importlib.import_module(".".join(shorter[:-1])), parts[-1], None) is cls:
            return ".".join(shorter)
    return class_path
