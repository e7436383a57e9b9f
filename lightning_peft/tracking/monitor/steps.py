"""What Lightning and torch's optimizers know of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer


def logged_step(trainer: pl.Trainer) -> int:
    """The step under which Lightning logs what the current training batch brings, so that curves share an axis."""
    # private, and what LearningRateMonitor uses: checked on lightning 2.6
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def learning_rates(optimizers: Sequence[Optimizer]) -> dict[str, float]:
    """The learning rate of each group, such as `AdamW`, `AdamW/1` for its second group, and `AdamW-1` for the second
    optimizer of that class; groups without one, as Adafactor's may be, are left out."""
    rates: dict[str, float] = {}
    seen: Counter[str] = Counter()
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        name = f"{kind}-{seen[kind]}" if seen[kind] else kind
        seen[kind] += 1
        for place, group in enumerate(optimizer.param_groups):
            if (rate := group.get("lr")) is not None:
                rates[f"{name}/{place}" if place else name] = float(rate)
    return rates


def gradient_scale(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """By what an optimizer's gradients are multiplied as it steps: under 16-mixed, a fused one unscales by itself."""
    scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
    # private, and what Lightning asks too: checked on torch 2.13
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())
