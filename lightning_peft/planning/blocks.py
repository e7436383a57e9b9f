"""Equal blocks of a model, of which a plan need only run a few."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_peft.methods._blocks import repeated_modules

LEAST = 5
"""Equal blocks in a row from which not all of them are run."""
UNLIKE = ("layer_idx", "training")
"""Attributes in which blocks that take the same memory may differ."""


@dataclass(frozen=True)
class Run:
    """Equal blocks that stand next to each other."""

    container: str
    """Path of the list that they are in."""
    names: tuple[str, ...]
    """Their names there."""


def equal_runs(model: nn.Module) -> list[Run]:
    """The runs of at least `LEAST` blocks of `model` with the same layers, adapters, shapes and dtypes."""
    found: list[Run] = []
    lists: dict[str, list[str]] = {}
    for path in repeated_modules(model):
        container, _, name = path.rpartition(".")
        lists.setdefault(container, []).append(name)
    for container, names in lists.items():
        parent = model.get_submodule(container)
        if not isinstance(parent, (nn.ModuleList, nn.Sequential)):
            continue
        run: list[str] = []
        last = None
        for name in parent._modules:
            signature = _signature(parent.get_submodule(name)) if name in names else None
            if run and (signature is None or signature != last):
                found.append(Run(container, tuple(run)))
                run = []
            run += [name] if signature is not None else []
            last = signature
        found.append(Run(container, tuple(run)))
    return [run for run in found if len(run.names) >= LEAST]


@contextmanager
def cut(model: nn.Module, runs: Sequence[Run], kept: Sequence[int]) -> Iterator[None]:
    """Let `model` have only so many blocks of each run inside of the `with`: the first ones."""
    before: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for run, count in zip(runs, kept, strict=True):
            container = model.get_submodule(run.container)
            before.append((container, container._modules))
            left = [item for name, item in container._modules.items() if name not in run.names[count:]]
            container._modules = {str(index): item for index, item in enumerate(left)}
        yield
    finally:
        for container, modules in reversed(before):
            container._modules = modules


def _signature(block: nn.Module) -> list[Any]:
    """What two blocks that take the same memory have in common."""
    return [
        (
            path,
            type(module),
            [
                (name, tensor.shape, tensor.dtype, tensor.requires_grad)
                for tensors in (module._parameters, module._buffers)
                for name, tensor in tensors.items()
                if tensor is not None
            ],
            {
                name: value
                for name, value in vars(module).items()
                if isinstance(value, (bool, int, str)) and name not in UNLIKE
            },
        )
        for path, module in block.named_modules()
    ]
