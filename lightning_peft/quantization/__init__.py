"""Quantize the frozen base: convert a model in place, or stream it from files. bitsandbytes does the packing."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_peft.quantization.casting import cast_base
    from lightning_peft.quantization.config import Quantization
    from lightning_peft.quantization.convert import dequantize, guard, quantize
    from lightning_peft.quantization.loading import loading
    from lightning_peft.quantization.meta import meta_parameters
    from lightning_peft.quantization.shards import Shards, open_shards
    from lightning_peft.quantization.streaming import load_base

_HOMES = {
    "casting": ("cast_base",),
    "config": ("Quantization",),
    "convert": ("dequantize", "guard", "quantize"),
    "loading": ("loading",),
    "meta": ("meta_parameters",),
    "shards": ("Shards", "open_shards"),
    "streaming": ("load_base",),
}
"""Where each public name is found once it is asked for: no name costs the import of another."""
_PLACES = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Quantization",
    "Shards",
    "cast_base",
    "dequantize",
    "guard",
    "load_base",
    "loading",
    "meta_parameters",
    "open_shards",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"lightning_peft.quantization has no {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
