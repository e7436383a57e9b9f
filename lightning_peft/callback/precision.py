"""The Trainer's precision beside the callback's dtypes: what goes together, what follows, and what stays in fp32.

`precision` says what is computed in, and `base_dtype` what the frozen weights are stored in; adapters, their gradients
and optimizer states are in float32 (float64 under 64-true). One case is otherwise: under bf16-true and 16-true alone,
without a `base_dtype` or quantization, Lightning's words hold, all parameters have 16 bits, and a warning says what
that costs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import (
    BitsandbytesPrecision,
    HalfPrecision,
    TransformerEnginePrecision,
)
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_peft.quantization.casting import base_dtype_of

if TYPE_CHECKING:
    from lightning_peft.callback.base import Base
    from lightning_peft.quantization import Quantization

SIXTEEN_BITS = {
    "bf16-mixed": "bfloat16",
    "bf16-true": "bfloat16",
    "16-mixed": "float16",
    "16-true": "float16",
    "transformer-engine": "bfloat16",
    "transformer-engine-float16": "float16",
}
"""What Lightning's precisions of 16 bits compute in; under transformer-engine, what it leaves to others."""
SMALLEST_UPDATE = {"bfloat16": "1/256", "float16": "1/2048"}
"""Of a weight: an update below half the distance to the next number rounds to none."""


class BaseHalfPrecision(HalfPrecision):
    """bf16-true or 16-true over a base that has its dtype already, with adapters in fp32."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module


class BaseTransformerEnginePrecision(TransformerEnginePrecision):
    """transformer-engine over a base that has its dtype already, with adapters in fp32."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module


def precision_faults(trainer: pl.Trainer, base: Base) -> list[str]:
    """Why the Trainer's precision and the base's dtypes can't go together; empty where they can."""
    plugin, precision, dtype = trainer.precision_plugin, trainer.precision, base.dtype
    computed = SIXTEEN_BITS.get(precision)
    is_other = None not in (computed, dtype) and dtype != computed
    is_mixed = precision.endswith("-mixed")
    instead = f"use base_dtype={computed!r}, or precision='32-true'"
    reasons = {
        "BitsandbytesPrecision quantizes after adapters are attached and replaces the layers that they stand on; leave "
        "it out and give PEFT(quantization='nf4')": isinstance(plugin, BitsandbytesPrecision),
        f"precision={precision!r} replaces the layers that adapters stand on; build the model of its layers and give "
        f"the Trainer plugins=TransformerEnginePrecision(weights_dtype=torch.{computed}, replace_layers=False)": (
            isinstance(plugin, TransformerEnginePrecision) and plugin.replace_layers is not False
        ),
        f"base_dtype: {dtype!r} contradicts precision='64-true', which makes every parameter float64; leave it out, or "
        "use precision='32-true'": precision == "64-true" and dtype is not None,
        "quantization: packed weights can't be computed with in float64, as precision='64-true' asks; use "
        "precision='32-true'": precision == "64-true" and base.quantization is not None,
        f"base_dtype: {dtype!r} contradicts precision={precision!r}, which computes in {computed}; {instead}": (
            is_other and not is_mixed
        ),
        f"base_dtype: {dtype!r} would be cast to {computed} in every call under precision={precision!r}, and so kept "
        f"twice; {instead}": is_other and is_mixed and dtype != "float32",
    }
    return [reason for reason, is_so in reasons.items() if is_so]


def effective_base_dtype(
    precision: str, quantization: Quantization | None, base_dtype: torch.dtype | None
) -> torch.dtype | None:
    """What the frozen tensors are to be cast to; None where they stay as they are, or Lightning casts the whole model.

    Over a quantized base, bf16-true and 16-true mean the tensors that aren't packed.
    """
    if base_dtype is None and quantization is not None and (computed := _true_dtype(precision)):
        return base_dtype_of(computed)
    return base_dtype


def keep_adapters(trainer: pl.Trainer) -> None:
    """Replace a precision plugin that would cast the adapters with the base; for a base that gets its dtype before."""
    plugin: Any = trainer.precision_plugin
    if type(plugin) is HalfPrecision:
        trainer.strategy.precision_plugin = BaseHalfPrecision(plugin.precision)
    elif type(plugin) is TransformerEnginePrecision:
        trainer.strategy.precision_plugin = BaseTransformerEnginePrecision(
            weights_dtype=plugin.weights_dtype,
            recipe=plugin.recipe,
            replace_layers=False,
            fallback_compute_dtype=plugin.fallback_compute_dtype,
        )


def warn_of_precision(trainer: pl.Trainer, base_dtype: torch.dtype | None) -> None:
    """Say what training loses: adapters of 16 bits, and gradients of float16 that nothing scales.

    Args:
        trainer: as it will train, after `keep_adapters`.
        base_dtype: the effective one.
    """
    precision = trainer.precision
    computed = _true_dtype(precision)
    kept = (BaseHalfPrecision, BaseTransformerEnginePrecision)
    own = None if isinstance(trainer.precision_plugin, kept) else computed
    if own is not None:
        # plugins of other accelerators cast what they are given
        instead = "use precision='32-true'" if base_dtype is not None else f"give PEFT(base_dtype={own!r})"
        rank_zero_warn(
            f"precision={precision!r} keeps adapters and their optimizer in {own} too, where an update below "
            f"{SMALLEST_UPDATE[own]} of a weight rounds to zero; {instead}, and they stay in float32"
        )
    if computed == "float16" or (base_dtype == torch.float16 and precision == "32-true"):
        rank_zero_warn(
            f"precision={precision!r} scales no gradients, and float16 makes those below 6e-8 zero"
            f"{', and the 1e-8 that Adam divides by as well' if own else ''}; use precision='16-mixed' with "
            "base_dtype='float16', or bfloat16"
        )


def _true_dtype(precision: str) -> str | None:
    """The 16-bit dtype that Lightning would bring every parameter to."""
    return None if precision.endswith("-mixed") else SIXTEEN_BITS.get(precision)
