"""The strategies' names in Lightning's registry, from the import of `lightning_peft` on, which imports no Lightning."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HOME = "lightning.pytorch.strategies"
STRATEGIES = {
    "peft_ddp": ("PEFTDDPStrategy", "DDP that broadcasts and compares adapters, and nothing frozen", {}),
    "peft_ddp_find_unused_parameters_true": (
        "PEFTDDPStrategy",
        "peft_ddp with `find_unused_parameters` as True, for adapters that a step may not use",
        {"find_unused_parameters": True},
    ),
    "peft_fsdp": ("PEFTFSDPStrategy", "FSDP2 that shards the frozen base, with whole adapters on each rank", {}),
}
"""By name: the class in lightning_peft.strategies, a description, and the class's arguments."""


def register_strategies() -> None:
    """Register them now where Lightning is imported, and else as soon as it is."""
    if HOME in sys.modules:
        _register(sys.modules[HOME])
    else:
        sys.meta_path.insert(0, _Awaited())


class _Awaited(MetaPathFinder):
    """Finds nothing by itself: it lets the finders after it load `HOME`, and registers when that is done."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != HOME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module)

            # of this one loader, which was made for this one module
            vars(spec.loader)["exec_module"] = exec_module
        return spec


def _register(lightning: ModuleType) -> None:
    registry = lightning.StrategyRegistry
    for name, (cls, description, arguments) in STRATEGIES.items():
        if name not in registry:
            registry.register(name, _maker(cls), description=description, **arguments)


def _maker(cls: str) -> Any:
    def make(**arguments: Any) -> Any:
        return getattr(importlib.import_module("lightning_peft.strategies"), cls)(**arguments)

    return make
