"""What of a frozen base is sharded, and in which pieces: found by structure, after adapters stand on it."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_peft.methods._blocks import repeated_modules
from lightning_peft.methods._targets import base_modules, find, inside
from lightning_peft.methods.errors import PEFTError

SMALLEST = 2**20
"""Bytes of a module outside of blocks from which it is sharded; 1% of the base where that is less. What is smaller is
kept whole: a collective of its own would cost more than it saves."""
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True)
class Unit:
    """A module whose weights are gathered for its forward, and again for its backward pass."""

    path: str
    module: nn.Module
    weights: tuple[tuple[nn.Module, str], ...]
    """What is sharded: modules in it that have a weight, and its name there; none where it only calls others."""


def find_units(model: nn.Module, names: Sequence[str] = (), whole: Container[str] = ()) -> list[Unit]:
    """The pieces that `model` is sharded in, the innermost first.

    Frozen weights of two dimensions or more, packed ones among them, are sharded: those in repeated blocks, and outside
    of them those of each module that has some of `SMALLEST` bytes of its own. Vectors stay whole, and so do weights
    that are tied across pieces, which would have to be gathered together. A module that calls the blocks is a piece
    without weights, so that one block's weights are gathered while another computes.

    Args:
        model: with adapters; on the meta device, too.
        names: names or path endings of the modules to shard instead; of a list, its items.
        whole: paths of modules to leave as they are, with all that is in them.

    Raises:
        PEFTError: a name matches nothing.
    """
    modules = dict(base_modules(model))
    tops = _named(modules, names) if names else repeated_modules(model)
    parents = {path: _caller(path, modules) for path in tops}
    if not names:
        tops = {**tops, **_others(model, tops)}
    weights = {path: [] if inside(path, whole) else _weights(module) for path, module in modules.items()}
    places: dict[int, list[str]] = {}
    for path, of_module in weights.items():
        for module, name in of_module:
            places.setdefault(id(module._parameters[name]), []).append(path)
    found = {}
    for path, module in tops.items():
        within = [inner for inner in modules if inside(inner, {path})]
        nested = {other for other in tops if other != path and inside(other, {path})}
        own = [
            (owner, name)
            for inner in within
            if not inside(inner, nested)
            for owner, name in weights[inner]
            if all(inside(place, {path}) for place in places[id(owner._parameters[name])])
        ]
        if own:
            found[path] = Unit(path, module, tuple(own))
    for parent in dict.fromkeys(parents.values()):
        if parent is not None and parent not in found:
            found[parent] = Unit(parent, modules[parent], ())
    return [found[path] for path in reversed(modules) if path in found]


def _weights(module: nn.Module) -> list[tuple[nn.Module, str]]:
    return [
        (module, name)
        for name, parameter in module._parameters.items()
        if parameter is not None and not parameter.requires_grad and parameter.dim() > 1
    ]


def _caller(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The module in whose forward the one at `path` is called; None where that may be the model's root, which a
    LightningModule calls by other methods than forward."""
    parent = path.rpartition(".")[0]
    while parent and isinstance(modules[parent], CONTAINERS):
        parent = parent.rpartition(".")[0]
    return parent or None


def _others(model: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules outside of `blocks` that have large weights of their own, by path."""
    total = sum(_n_bytes(module) for _, module in base_modules(model))
    least = min(SMALLEST, total / 100)

    def search(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if path and _n_bytes(module) >= least and not any(inside(block, {path}) for block in blocks):
            yield path, module
            return
        for name, child in module._modules.items():
            inner = f"{path}.{name}" if path else name
            if child is not None and inner in modules and inner not in blocks:
                yield from search(inner, child)

    modules = dict(base_modules(model))
    return dict(search("", model))


def _n_bytes(module: nn.Module) -> int:
    tensors = [module._parameters[name] for module, name in _weights(module)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _named(modules: Mapping[str, nn.Module], names: Sequence[str]) -> dict[str, nn.Module]:
    if isinstance(names, str):
        raise PEFTError(f"shard: {names!r} is a string; give a list, [{names!r}]")
    found, faults = find("shard", list(names), modules, lambda _: True, exclude=[], skip=(), describe=repr)
    if faults:
        raise PEFTError(faults)
    named: dict[str, nn.Module] = {}
    for path, module in found.items():
        # a list is never called; its items are
        listed = isinstance(module, (nn.ModuleList, nn.ModuleDict))
        named |= (
            {f"{path}.{name}": item for name, item in module._modules.items() if item} if listed else {path: module}
        )
    return named
