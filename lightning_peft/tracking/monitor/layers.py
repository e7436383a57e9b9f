"""Numbers of many layers, such as a person can look at: a few of them now, or all of them over time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from lightning_peft.injection import method_adapters, records

SHOWN = 32
"""Curves that one chart can show."""
COLUMNS = 200
"""Points in time of a heat map."""

Layers = Mapping[str, Mapping[str, float]]
"""By quantity, and in it by the layer's path."""


def shown(values: Mapping[str, float]) -> dict[str, float]:
    """At most `SHOWN` numbers: of more layers, the means of those whose paths begin alike, of as many parts as leave
    that few; nothing where even the first parts are too many."""
    paths = {path: path.split(".") for path in values}
    for length in range(max(map(len, paths.values()), default=0), 0, -1):
        together: dict[str, list[float]] = {}
        for path, parts in paths.items():
            together.setdefault(".".join(parts[:length]), []).append(values[path])
        if len(together) <= SHOWN:
            return {path: sum(own) / len(own) for path, own in together.items()}
    return {}


def by_layer(layers: Layers) -> dict[str, float]:
    """What `shown` leaves of each quantity, by names for a logger."""
    return {f"adapter/{name}/{path}": value for name, values in layers.items() for path, value in shown(values).items()}


@torch.no_grad()
def reported_layers(module: nn.Module) -> dict[str, dict[str, float]]:
    """What the methods whose adapters train report of each layer."""
    result: dict[str, dict[str, float]] = {}
    for name, record in records(module).items():
        attached = method_adapters(module, name)
        if any(parameter.requires_grad for adapter in attached.values() for parameter in adapter.parameters()):
            result |= record.method.report_layers(attached)
    return result


@dataclass
class HeatMap:
    """One quantity over time."""

    rows: list[str]
    """The layers' paths."""
    columns: list[int]
    """Steps."""
    values: list[list[float | None]]
    """Rows × columns; None where a layer has no number then."""


@dataclass
class History:
    """All layers' numbers at up to `COLUMNS` steps, evenly chosen from all that were added."""

    last: int = -1
    """The last step that was added."""
    _points: list[tuple[int, Layers]] = field(default_factory=list)
    _added: int = 0
    _every: int = 1

    def add(self, step: int, layers: Layers) -> None:
        """Add the numbers of a step."""
        if self._added % self._every == 0:
            self._points.append((step, layers))
        self._added += 1
        self.last = step
        if len(self._points) > COLUMNS:
            self._points = self._points[::2]
            self._every *= 2

    def heat_maps(self) -> dict[str, HeatMap]:
        """A heat map by the quantity's name."""
        names = dict.fromkeys(name for _, layers in self._points for name in layers)
        return {name: self._heat_map(name) for name in names}

    def _heat_map(self, name: str) -> HeatMap:
        points = [(step, layers[name]) for step, layers in self._points if name in layers]
        rows = list(dict.fromkeys(path for _, values in points for path in values))
        values = [[own.get(path) for _, own in points] for path in rows]
        return HeatMap(rows, [step for step, _ in points], values)
