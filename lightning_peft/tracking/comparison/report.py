"""What a finished run was, in one file for whoever compares it with others."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import nn

from lightning_peft.injection import method_adapters, records
from lightning_peft.methods.base import Method
from lightning_peft.state.versions import installed
from lightning_peft.state.whole import whole_file
from lightning_peft.tracking.cost.meter import CostMeter
from lightning_peft.tracking.monitor.norms import adapter_norms

FORMAT = 1
"""Of the file; a reader passes over others."""
POINTS = 400
"""Losses of one run that are kept at most."""
PACKAGES = ("lightning-peft", "torch", "lightning", "transformers")


class RunReport(pl.Callback):
    """Writes what a run was into a file, once it has ended well: an interrupted or failed run leaves none.

    The file is JSON: `method` and its `fields` (null for a module without adapters), `modules_to_save`, `seed`,
    `learning_rate`, `steps`, `seconds` of training with its validations, `train` (`step`, `loss`), `validation`
    (`step`, `metrics`), `cost` (see `Cost`), `norms` and, of a method that changes them, `ranks` by an adapted module's
    path, `device` and `versions`. It appears whole or not at all, and is written by the first process alone.

    Args:
        path: the file, which is replaced.
    """

    def __init__(self, path: str = "report.json") -> None:
        self.path = path
        self._start = 0.0
        self._losses: dict[int, torch.Tensor] = {}
        self._every = 1
        self._validation: list[dict[str, Any]] = []
        self._seconds = 0.0
        self._learning_rate: float | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See to it that what the run costs is measured."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if stage == "fit" and not any(isinstance(callback, CostMeter) for callback in callbacks):
            callbacks.append(CostMeter())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._losses, self._every, self._validation = {}, 1, []
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        # a schedule has moved the rate already
        self._learning_rate = float(groups[0].get("initial_lr", groups[0]["lr"])) if groups else None
        self._start = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss; of a long run, of every second step, every fourth, and so on."""
        step, loss = trainer.global_step, outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        is_new = step and step % self._every == 0 and step not in self._losses  # several batches may make a step
        if not (is_new and isinstance(loss, torch.Tensor) and loss.numel() == 1):
            return
        # on the device, so that the host does not wait for it; Lightning has divided it
        self._losses[step] = loss.detach() * trainer.accumulate_grad_batches
        if len(self._losses) > POINTS:
            self._every *= 2
            self._losses = {step: loss for step, loss in self._losses.items() if step % self._every == 0}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the metrics."""
        if trainer.sanity_checking:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if _is_validation(name)}
        self._validation.append({"step": trainer.global_step, "metrics": metrics})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._seconds = time.monotonic() - self._start

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        meter = next(callback for callback in trainer.callbacks if isinstance(callback, CostMeter))  # type: ignore[attr-defined]
        cost = dataclasses.asdict(meter.cost(trainer, pl_module))
        content = {"format": FORMAT, **_described(pl_module), **self._measured(trainer), "cost": cost, **_made_by()}
        content["device"] = _device(trainer.strategy.root_device)
        rank_zero_only(write_json)(Path(self.path), content)

    def _measured(self, trainer: pl.Trainer) -> dict[str, Any]:
        seed = os.environ.get("PL_GLOBAL_SEED")
        return {
            "seed": int(seed) if seed else None,
            "learning_rate": self._learning_rate,
            "steps": trainer.global_step,
            "seconds": self._seconds,
            "train": [{"step": step, "loss": float(loss)} for step, loss in self._losses.items()],
            "validation": self._validation,
        }


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path`, whole or not at all; what JSON has no number for, such as NaN, as null."""
    write_text(path, json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(text.encode())


def _described(module: nn.Module) -> dict[str, Any]:
    """The adapter of a module, if one stands on it."""
    name, record = next(reversed(records(module).items()), ("", None))
    if record is None:
        return {"method": None, "fields": {}, "modules_to_save": [], "norms": {}, "ranks": {}}
    method: Method = record.method
    attached = method_adapters(module, name)
    norms = adapter_norms(module, name)
    return {
        "method": type(method).__name__,
        "fields": method.fields(),
        "modules_to_save": list(record.modules_to_save),
        "norms": {path: norms[path] for path in attached if path in norms},
        "ranks": method.report_layers(attached).get("rank", {}),
    }


def _made_by() -> dict[str, Any]:
    return {"versions": {"python": platform.python_version(), **{name: installed(name) for name in PACKAGES}}}


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _is_validation(name: str) -> bool:
    return not name.startswith(("train", "test")) and not name.endswith("_step")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
