"""The optimizer and learning-rate schedule of a task: AdamW with warm-up and cosine, or the user's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

LEARNING_RATE = 1e-4
"""AdamW's where nothing says another."""


def warmup_cosine(optimizer: Optimizer, total_steps: float, warmup_ratio: float) -> LambdaLR:
    """The rate goes up in a line over the first `warmup_ratio` of the steps and down to 0 along a half cosine.

    Where nothing says when training ends the rate stays as it is: with `total_steps` infinite or -1, which a Trainer
    without `max_steps` says of a stream.
    """
    if math.isinf(total_steps) or total_steps < 0:
        return LambdaLR(optimizer, lambda step: 1.0)
    warmup = warmup_ratio * total_steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total_steps - warmup))))

    return LambdaLR(optimizer, factor)


def configure(
    module: L.LightningModule,
    optimizer: OptimizerCallable | None,
    lr_scheduler: LRSchedulerCallable | None,
    rates: Mapping[str, Any],
) -> OptimizerLRScheduler:
    """What `configure_optimizers` returns for an attached module.

    Args:
        module: its `parameters()` are optimized, for its trainer's estimated number of steps.
        optimizer: makes the optimizer from parameters; by default AdamW.
        lr_scheduler: makes a schedule from the optimizer, to be stepped once an epoch, with its `monitor` where it has
            one; by default `warmup_cosine`, stepped at each optimizer step.
        rates: `learning_rate` (None is `LEARNING_RATE`) and `weight_decay` of AdamW, and `warmup_ratio`.
    """
    if optimizer is None:
        rate = LEARNING_RATE if rates["learning_rate"] is None else rates["learning_rate"]
        made: Optimizer = AdamW(module.parameters(), lr=rate, weight_decay=rates["weight_decay"])
    else:
        made = optimizer(module.parameters())
    if lr_scheduler is None:
        schedule = warmup_cosine(made, module.trainer.estimated_stepping_batches, rates["warmup_ratio"])
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
    given = lr_scheduler(made)
    if isinstance(given, ReduceLROnPlateau):
        return {"optimizer": made, "lr_scheduler": {"scheduler": given, "monitor": given.monitor}}
    return {"optimizer": made, "lr_scheduler": {"scheduler": given}}
