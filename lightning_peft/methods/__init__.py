"""The methods, one in a file: `METHODS` finds them by looking into this folder."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from lightning_peft.methods.base import Method
from lightning_peft.methods.errors import PEFTError, suggestion


def _found() -> dict[str, type[Method]]:
    names = sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {
        value.__name__: value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value is not Method
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
    }


METHODS: dict[str, type[Method]] = _found()
"""Every method's class, by its name."""

__all__ = ["METHODS", "Method", "PEFTError", *METHODS]


def __getattr__(name: str) -> Any:
    if name in METHODS:
        return METHODS[name]
    raise AttributeError(f"lightning_peft has no method {name!r}{suggestion(name, METHODS)}")
