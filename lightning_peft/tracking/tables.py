"""What will be trained, as tables for a terminal."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_peft.methods._host import Host
from lightning_peft.methods._quantized import PackedWeight, packed
from lightning_peft.methods._targets import base_modules


@dataclass
class Count:
    """Parameters of one or several modules: how many train, how many are frozen, their dtypes and bytes."""

    trainable: int = 0
    frozen: int = 0
    bytes: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)

    def add(self, parameter: Tensor, packed: PackedWeight | None = None) -> None:
        """Count one parameter; a packed one by the values that it stands for."""
        number = parameter.numel() if packed is None else packed.shape.numel()
        if parameter.requires_grad:
            self.trainable += number
        else:
            self.frozen += number
        self.bytes += parameter.nbytes if packed is None else packed_bytes(packed)
        self.dtypes[str(parameter.dtype).removeprefix("torch.") if packed is None else packed.kind] += number

    def include(self, other: Count) -> None:
        """Count what `other` counted."""
        self.trainable += other.trainable
        self.frozen += other.frozen
        self.bytes += other.bytes
        self.dtypes += other.dtypes


def count(model: nn.Module) -> Count:
    """All of `model`'s parameters, a shared one once."""
    total = Count()
    for row in module_rows(model):
        total.include(row.count)
    return total


def packed_bytes(weight: PackedWeight) -> int:
    """The bytes of a packed weight's codes and scales."""
    nested = getattr(weight.state, "state2", None)
    return weight.data.nbytes + weight.scales.nbytes + (nested.absmax.nbytes if nested is not None else 0)


def summary_line(model: nn.Module) -> str:
    """`trainable params: 147,456 || all params: 22,860,672 || trainable%: 0.65`."""
    total = count(model)
    everything = total.trainable + total.frozen
    share = 100 * total.trainable / everything if everything else 0.0
    return f"trainable params: {total.trainable:,} || all params: {everything:,} || trainable%: {share:.2f}"


def quantization_line(model: nn.Module) -> str:
    """`base: nf4-dq, 36 layers, 5.5 MB (21.2 MB in 16 bits)`; empty where no weight is packed."""
    weights = {
        id(found.data): found for _, module in base_modules(model) if (found := packed(module)) is not None
    }.values()
    if not weights:
        return ""
    kinds = ", ".join(sorted({weight.kind for weight in weights}))
    stored = format_bytes(sum(map(packed_bytes, weights)))
    dense = format_bytes(2 * sum(weight.shape.numel() for weight in weights))
    layers = "1 layer" if len(weights) == 1 else f"{len(weights)} layers"
    return f"base: {kinds}, {layers}, {stored} ({dense} in 16 bits)"


@dataclass
class Row:
    """One module with parameters of its own, or several of one kind."""

    path: str
    kind: str
    attached: str
    """The adapter's layers; empty where none stands on it."""
    count: Count
    modules: int = 1


def module_rows(model: nn.Module) -> list[Row]:
    """A row for each of `model`'s modules that has parameters, its adapters' among them; a shared one counts once."""
    rows, seen = [], set[int]()
    for path, module in base_modules(model):
        own = [*module.parameters(recurse=False), *(module.adapters.parameters() if isinstance(module, Host) else [])]
        if own:
            row = Row(path or "(root)", type(module).__name__, _attached(module), Count())
            weight, stored = module._parameters.get("weight"), packed(module)
            for parameter in own:
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    row.count.add(parameter, stored if parameter is weight else None)
            rows.append(row)
    return rows


def module_table(model: nn.Module) -> Table:
    """Module by module: its adapter, trainable and frozen counts, dtypes and bytes."""
    table = _table("module", "type", "attached", "trainable>", "frozen>", "dtypes", "bytes>")
    for row in module_rows(model):
        dtypes = ", ".join(dtype for dtype, _ in row.count.dtypes.most_common())
        numbers = f"{row.count.trainable:,}", f"{row.count.frozen:,}"
        table.add_row(row.path, row.kind, row.attached, *numbers, dtypes, format_bytes(row.count.bytes))
    return table


def summary_table(model: nn.Module) -> Table:
    """What trains: modules that differ by a layer's number alone in one row, their path from before that number on."""
    together: dict[tuple[str, str, str], Row] = {}
    for row in module_rows(model):
        if row.attached:
            path = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", row.path)
            path = re.sub(r"^.*?\.(?=[^.*]*\.\*)", "…", path)
            so_far = together.setdefault((path, row.kind, row.attached), Row(path, row.kind, row.attached, Count(), 0))
            so_far.count.trainable += row.count.trainable
            so_far.count.frozen += row.count.frozen
            so_far.modules += 1
    table = _table("module", "attached", "trainable>", "frozen>")
    for row in together.values():
        label = row.path if row.modules == 1 else f"{row.path} ({row.modules}×)"
        table.add_row(label, row.attached, f"{row.count.trainable:,}", f"{row.count.frozen:,}")
    return table


def _table(*headers: str) -> Table:
    table = Table(title="What is trained", title_justify="left")
    for header in headers:
        table.add_column(header.rstrip(">"), justify="right" if header.endswith(">") else "left", overflow="fold")
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
    console.print(summary_table(model))
    for line in filter(None, (summary_line(model), quantization_line(model))):
        console.print(line, highlight=False, soft_wrap=True)


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
