"""Companions of the callback that could not work, and what to use in their place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from lightning_peft.callback.precision import precision_faults
from lightning_peft.methods.errors import PEFTError
from lightning_peft.strategies.fsdp import PEFTFSDPStrategy

if TYPE_CHECKING:
    from lightning_peft.callback import PEFT

AVERAGED_CODES = (
    "WeightAveraging would average the codes of quantized weights, which are no numbers, and destroy them; leave out "
    "either of both"
)


def check_trainer(trainer: pl.Trainer, callback: PEFT) -> None:
    """Refuse a Trainer in which adapters would be lost or left untrained.

    Raises:
        PEFTError: with every reason.
    """
    callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
    before = callbacks[: callbacks.index(callback)]
    strategy, averages = trainer.strategy, _averages(trainer)
    start_method = getattr(strategy, "_start_method", "popen")
    reasons = {
        "StochasticWeightAveraging copies the model before adapters are attached; use WeightAveraging, listed after "
        "PEFT": any(isinstance(other, StochasticWeightAveraging) for other in callbacks),
        "WeightAveraging is listed before PEFT and would copy the model without adapters; list it after PEFT": any(
            isinstance(other, WeightAveraging) for other in before
        ),
        "WeightAveraging copies the base and swaps its weights, of which each process holds a part under peft_fsdp; "
        "leave it out, or use strategy='peft_ddp'": isinstance(strategy, PEFTFSDPStrategy) and averages,
        f"WeightAveraging would average weights that {type(callback.method).__name__} prunes with those from before, "
        "and so bring back what was cut; leave it out": callback.method.prunes and averages,
        AVERAGED_CODES: callback.base.quantization is not None and averages,
        "two PEFT callbacks are in one Trainer; leave one": any(isinstance(other, type(callback)) for other in before),
        "sync_batchnorm=True replaces normalization layers after adapters are attached; in configure_model, convert "
        "the model with torch.nn.SyncBatchNorm.convert_sync_batchnorm instead": (
            # no public attribute tells; checked on lightning 2.6
            getattr(trainer.strategy, "_layer_sync", None) is not None
        ),
        f"strategy {start_method!r} trains in child processes, and the adapters would be lost with them; use "
        "strategy='ddp'": start_method in ("spawn", "fork", "forkserver"),
        f"{type(strategy).__name__} (FSDP1) flattens frozen and trained parameters into one, and gathers the base for "
        "a checkpoint; use strategy='peft_fsdp'": isinstance(strategy, FSDPStrategy),
        "DeepSpeed writes its own checkpoints, with the frozen base in them, and loads weights before they can be "
        "checked; use strategy='peft_fsdp', or 'peft_ddp'": isinstance(strategy, DeepSpeedStrategy),
    }
    faults = [reason for reason, is_so in reasons.items() if is_so]
    faults += precision_faults(trainer, callback.base)
    if faults:
        raise PEFTError(faults)


def check_averages(trainer: pl.Trainer) -> None:
    """Refuse a Trainer that averages weights, where some of them are quantized.

    Raises:
        PEFTError: it does.
    """
    if _averages(trainer):
        raise PEFTError(AVERAGED_CODES)


def _averages(trainer: pl.Trainer) -> bool:
    return any(isinstance(other, WeightAveraging) for other in trainer.callbacks)  # type: ignore[attr-defined]
