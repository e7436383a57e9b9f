"""Parameter-efficient fine-tuning for PyTorch Lightning: add one callback to any LightningModule."""

from typing import Any

from lightning_peft.callback import PEFT, load_from_checkpoint
from lightning_peft.injection import (
    adapter_per_row,
    disable_adapters,
    inject,
    remove,
    set_adapter,
    trainable_parameters,
)
from lightning_peft.interchange import merge, unmerge
from lightning_peft.methods import METHODS, Method, PEFTError

__all__ = [
    "METHODS",
    "PEFT",
    "Method",
    "PEFTError",
    "adapter_per_row",
    "disable_adapters",
    "inject",
    "load_from_checkpoint",
    "merge",
    "remove",
    "set_adapter",
    "trainable_parameters",
    "unmerge",
    *METHODS,
]


def __getattr__(name: str) -> Any:
    import lightning_peft.methods as methods

    return getattr(methods, name)
