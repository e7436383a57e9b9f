"""Equal blocks of a model, of which a plan need only run a few."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_peft.methods._blocks import repeated_modules
from lightning_peft.methods._host import own_class
from lightning_peft.methods._targets import base_modules

LEAST = 5
"""Equal blocks in a row from which not all of them are run."""
FEW = 2
"""How many of a run are run then, and one more once for each run."""
UNLIKE = ("layer_idx", "training", "active_adapter")
"""Attributes in which blocks that take the same memory may differ; adapters are compared themselves."""


@dataclass(frozen=True)
class Run:
    """Equal blocks that stand next to each other."""

    container: str
    """Path of the list that they are in."""
    names: tuple[str, ...]
    """Their names there."""

    @property
    def label(self) -> str:
        """What tells it from all others."""
        return f"{self.container}.{self.names[0]}"


def equal_runs(model: nn.Module) -> list[Run]:
    """The runs of at least `LEAST` blocks of `model` with the same layers, adapters, shapes and dtypes, as far as it is
    less work to run a few of each than all."""
    found: list[Run] = []
    lists: dict[str, list[str]] = {}
    repeated = repeated_modules(model)
    for path in repeated:
        container, _, name = path.rpartition(".")
        lists.setdefault(container, []).append(name)
    for container, names in lists.items():
        parent = model.get_submodule(container)
        if isinstance(parent, (nn.ModuleList, nn.Sequential)):
            found += _runs_in(container, parent, names)
    found.sort(key=lambda run: -len(run.names))
    return min((found[:count] for count in range(len(found), -1, -1)), key=lambda runs: _work(len(repeated), runs))


def _runs_in(container: str, parent: nn.Module, names: Sequence[str]) -> list[Run]:
    runs: list[list[str]] = []
    last = None
    for name, item in parent._modules.items():
        signature = _signature(item) if item is not None and name in names else None
        if signature is not None and signature != last:
            runs.append([])
        if signature is not None:
            runs[-1].append(name)
        last = signature
    kinds = [_kind(item) for item in parent._modules.values() if item is not None]
    if any(kind != kinds[0] for kind in kinds):
        # a model may choose a block's mask by its place in the list, so that none may move to one of another kind's
        runs = [run for run in runs if run[-1] == [*parent._modules][-1]]
    return [Run(container, tuple(run)) for run in runs if len(run) >= LEAST]


def _work(blocks: int, runs: Sequence[Run]) -> int:
    """How many blocks are run where `runs` are cut: one time with `FEW` of each, and one with one more for each."""
    few = blocks - sum(len(run.names) - FEW for run in runs)
    return (1 + len(runs)) * few + len(runs)


@contextmanager
def cut(model: nn.Module, runs: Sequence[Run], kept: Sequence[int]) -> Iterator[dict[str, list[str]]]:
    """Let `model` have only so many blocks of each run inside of the `with`: the first ones.

    Yields:
        The paths that these have there, by the label of their run.
    """
    containers = {run.container: model.get_submodule(run.container) for run in runs}
    before = {path: container._modules for path, container in containers.items()}
    gone = {(run.container, name) for run, count in zip(runs, kept, strict=True) for name in run.names[count:]}
    left = {path: [name for name in modules if (path, name) not in gone] for path, modules in before.items()}
    try:
        for path, container in containers.items():
            container._modules = {str(index): before[path][name] for index, name in enumerate(left[path])}
        yield {
            run.label: [f"{run.container}.{left[run.container].index(name)}" for name in run.names[:count]]
            for run, count in zip(runs, kept, strict=True)
        }
    finally:
        for path, container in containers.items():
            container._modules = before[path]


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
            _attributes(module),
        )
        for path, module in block.named_modules()
    ]


def _kind(block: nn.Module) -> list[Any]:
    """What two blocks have in common that differ in their adapters at most."""
    return [(path, own_class(module), _attributes(module)) for path, module in base_modules(block)]


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in UNLIKE and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    """Whether it is a number, a text or a tuple of such, by which layers are told what to do."""
    return isinstance(value, (bool, int, float, str)) or (
        isinstance(value, tuple) and all(_is_plain(each) for each in value)
    )
