"""Companions of the callback that could not work, and what to use in their place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from lightning_peft.methods.errors import PEFTError

if TYPE_CHECKING:
    from lightning_peft.callback import PEFT


def check_trainer(trainer: pl.Trainer, callback: PEFT) -> None:
    """Refuse a Trainer in which adapters would be lost or left untrained.

    Raises:
        PEFTError: with every reason.
    """
    callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
    before = callbacks[: callbacks.index(callback)]
    start_method = getattr(trainer.strategy, "_start_method", "popen")
    reasons = {
        "StochasticWeightAveraging copies the model before adapters are attached; use WeightAveraging, listed after "
        "PEFT": any(isinstance(other, StochasticWeightAveraging) for other in callbacks),
        "WeightAveraging is listed before PEFT and would copy the model without adapters; list it after PEFT": any(
            isinstance(other, WeightAveraging) for other in before
        ),
        "two PEFT callbacks are in one Trainer; leave one": any(isinstance(other, type(callback)) for other in before),
        "sync_batchnorm=True replaces normalization layers after adapters are attached; in configure_model, convert "
        "the model with torch.nn.SyncBatchNorm.convert_sync_batchnorm instead": (
            # no public attribute tells; checked on lightning 2.6
            getattr(trainer.strategy, "_layer_sync", None) is not None
        ),
        f"strategy {start_method!r} trains in child processes, and the adapters would be lost with them; use "
        "strategy='ddp'": start_method in ("spawn", "fork", "forkserver"),
    }
    if faults := [reason for reason, is_so in reasons.items() if is_so]:
        raise PEFTError(faults)
