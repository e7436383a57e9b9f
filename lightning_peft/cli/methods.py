"""The list of methods, and all about one, by looking at their classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import docstring_parser
from rich.console import Console
from rich.table import Table

from lightning_peft.methods import METHODS, Method
from lightning_peft.methods.errors import PEFTError, suggestion


def show_methods(words: Sequence[str]) -> int:
    """Print every method with its fields and defaults, or all about the one that `words` names.

    Raises:
        PEFTError: a name that is no method's.
    """
    if faults := [f"there is no method {word!r}{suggestion(word, METHODS)}" for word in words if word not in METHODS]:
        raise PEFTError(faults)
    console = Console()
    if not words:
        for name, cls in METHODS.items():
            console.print(name, style="bold", end="  ")
            console.print(_summary(cls), highlight=False, markup=False)
            fields = ", ".join(f"{field.name}={_default(field)}" for field in _fields(cls))
            console.print(f"    {fields}", highlight=False, markup=False, soft_wrap=True)
            console.print(f"    learning rate to start from: {cls.learning_rate:g}", highlight=False)
        console.print("\nAll about one: lightning-peft methods LoRA", highlight=False)
    for word in words:
        _show(console, METHODS[word])
    return 0


def _show(console: Console, cls: type[Method]) -> None:
    parsed = docstring_parser.parse_from_object(cls)
    console.print(cls.__name__, style="bold")
    text = filter(None, (parsed.short_description, parsed.long_description))
    console.print("\n\n".join(text), highlight=False, markup=False)
    documented = {
        param.arg_name: " ".join((param.description or "").split())
        for ancestor in reversed(cls.__mro__)
        if issubclass(ancestor, Method)
        for param in docstring_parser.parse_from_object(ancestor).params
    }
    table = Table()
    for header in ("field", "type", "default", "meaning"):
        table.add_column(header, overflow="fold")
    for field in _fields(cls):
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        table.add_row(field.name, kind, _default(field), documented.get(field.name, ""))
    console.print(table, markup=False)
    console.print(f"Learning rate to start from: {cls.learning_rate:g}", highlight=False)
    console.print(f"peft: {{method: {{class_path: {cls.__name__}, init_args: {{…}}}}}}", highlight=False, markup=False)


def _summary(cls: type[Method]) -> str:
    return docstring_parser.parse(cls.__doc__ or "").short_description or ""


def _fields(cls: type[Method]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return repr(field.default_factory()) if field.default_factory is not dataclasses.MISSING else "required"
