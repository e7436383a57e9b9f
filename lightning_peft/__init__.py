"""Parameter-efficient fine-tuning for PyTorch Lightning: add one callback to any LightningModule."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_peft.callback import PEFT, load_from_checkpoint
    from lightning_peft.injection import (
        adapter_per_row,
        disable_adapters,
        inject,
        remove,
        set_adapter,
        trainable_parameters,
    )
    from lightning_peft.interchange import export_adapter, import_adapter, merge, save_merged, unmerge
    from lightning_peft.methods import METHODS, Method, PEFTError
    from lightning_peft.quantization import Quantization
    from lightning_peft.strategies import PEFTDDPStrategy, PEFTFSDPStrategy
    from lightning_peft.tracking import AdapterMonitor, CostMeter

_HOMES = {
    "callback": ("PEFT", "load_from_checkpoint"),
    "injection": ("adapter_per_row", "disable_adapters", "inject", "remove", "set_adapter", "trainable_parameters"),
    "interchange": ("export_adapter", "import_adapter", "merge", "save_merged", "unmerge"),
    "methods": ("METHODS", "Method", "PEFTError"),
    "quantization": ("Quantization",),
    "strategies": ("PEFTDDPStrategy", "PEFTFSDPStrategy"),
    "tracking": ("AdapterMonitor", "CostMeter"),
}
"""Where each public name is found once it is asked for: `lightning-peft --help` needs neither torch nor Lightning."""
_PLACES = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "METHODS",
    "PEFT",
    "AdapterMonitor",
    "CostMeter",
    "Method",
    "PEFTDDPStrategy",
    "PEFTError",
    "PEFTFSDPStrategy",
    "Quantization",
    "adapter_per_row",
    "disable_adapters",
    "export_adapter",
    "import_adapter",
    "inject",
    "load_from_checkpoint",
    "merge",
    "remove",
    "save_merged",
    "set_adapter",
    "trainable_parameters",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    # a name that is in no list is a method's
    return getattr(importlib.import_module(f"lightning_peft.{_PLACES.get(name, 'methods')}"), name)


def __dir__() -> list[str]:
    from lightning_peft.methods import METHODS

    return sorted({*globals(), *_PLACES, *METHODS})
