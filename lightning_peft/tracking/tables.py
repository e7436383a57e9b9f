"""What will be trained, as tables for a terminal."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_peft.methods._host import Host
from lightning_peft.methods._targets import base_modules


@dataclass
class Count:
    """Parameters of one or several modules: how many train, how many are frozen, their dtypes and bytes."""

    trainable: int = 0
    frozen: int = 0
    bytes: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)

    def add(self, parameter: Tensor) -> None:
        """Count one parameter."""
        if parameter.requires_grad:
            self.trainable += parameter.numel()
        else:
            self.frozen += parameter.numel()
        self.bytes += parameter.numel() * parameter.element_size()
        self.dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()


def count(model: nn.Module) -> Count:
    """All of `model`'s parameters, a shared one once."""
    total = Count()
    for parameter in model.parameters():
        total.add(parameter)
    return total


def summary_line(model: nn.Module) -> str:
    """`trainable params: 147,456 || all params: 22,860,672 || trainable%: 0.65`."""
    total = count(model)
    everything = total.trainable + total.frozen
    share = 100 * total.trainable / everything if everything else 0.0
    return f"trainable params: {total.trainable:,} || all params: {everything:,} || trainable%: {share:.2f}"


def module_table(model: nn.Module, *, every_module: bool = True) -> Table:
    """A row for each module with parameters of its own: its adapter, trainable and frozen counts, dtypes and bytes.

    Args:
        every_module: False puts modules that differ by a layer's number alone into one row, and leaves out those that
            nothing is attached to.
    """
    rows: dict[tuple[str, str, str], tuple[Count, int]] = {}
    seen: set[int] = set()
    for path, module in base_modules(model):
        numbers = Count()
        mine = [*module.parameters(recurse=False), *(module.adapters.parameters() if isinstance(module, Host) else [])]
        for parameter in mine:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                numbers.add(parameter)
        if not mine or not (every_module or isinstance(module, Host)):
            continue
        name = path if every_module else re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)
        key = (name or "(root)", type(module).__name__, _attached(module))
        so_far, modules = rows.get(key, (Count(), 0))
        merged = Count(
            so_far.trainable + numbers.trainable,
            so_far.frozen + numbers.frozen,
            so_far.bytes + numbers.bytes,
            so_far.dtypes + numbers.dtypes,
        )
        rows[key] = merged, modules + 1

    table = Table(title="What is trained", title_justify="left")
    for header, justify in (("module", "left"), ("type", "left"), ("attached", "left"), ("trainable", "right"),
                            ("frozen", "right"), ("dtypes", "left"), ("bytes", "right")):  # fmt: skip
        table.add_column(header, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for (name, kind, attached), (numbers, modules) in rows.items():
        label = name if modules == 1 else f"{name} ({modules}×)"
        dtypes = ", ".join(dtype for dtype, _ in numbers.dtypes.most_common())
        table.add_row(
            label, kind, attached, f"{numbers.trainable:,}", f"{numbers.frozen:,}", dtypes, format_bytes(numbers.bytes)
        )
    return table


def format_bytes(number: float) -> str:
    """`531 B`, `1.2 MB`, `3.4 GB`: powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def print_summary(model: nn.Module) -> None:
    """Print what trains, layers of one kind in one row, and the summary line."""
    console = Console()
    console.print(module_table(model, every_module=False))
    console.print(summary_line(model), highlight=False, soft_wrap=True)


def _attached(module: nn.Module) -> str:
    if not isinstance(module, Host):
        return ""
    parts = []
    for name, adapter in module.adapters.items():
        kinds = [
            type(part).__name__ for part in adapter.modules() if next(part.parameters(recurse=False), None) is not None
        ]
        label = "/".join(dict.fromkeys(kinds)) or type(adapter).__name__
        parts.append(label if name == "default" else f"{label} ({name})")
    return ", ".join(parts)
