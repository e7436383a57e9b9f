"""Models on the meta device: built without their weights, and given what no file of weights holds."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lightning_peft.methods._targets import base_modules, is_transformers_model


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Let the modules that this thread builds in the `with` have their parameters on the meta device, and their buffers
    as they are made.

    `torch.device("meta")` puts both there; but a buffer that isn't saved, such as a table of frequencies, is in no file
    and can only come from the module's own `__init__`. A parameter that is made from values takes their memory until it
    is registered. Parameters that are one stay one.
    """
    thread = threading.get_ident()
    made: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        lazy = isinstance(parameter, nn.UninitializedParameter)
        if parameter is None or lazy or parameter.is_meta or threading.get_ident() != thread:
            return None
        known = made.get(id(parameter))
        if known is not None and known[0]() is parameter:
            return known[1]
        empty = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        made[id(parameter)] = weakref.ref(parameter), empty
        return empty

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        hook.remove()


@dataclass(eq=False)
class Slot:
    """One tensor of a model, and everywhere it stands: a tied one has several places, a shared module several names."""

    tensor: Tensor
    names: list[str]
    places: list[tuple[nn.Module, str]]
    persistent: bool

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    def fill(self, value: Tensor) -> None:
        """Let `value` stand in all its places; for a parameter as a parameter that requires a gradient as before."""
        if isinstance(self.tensor, nn.Parameter):
            value = nn.Parameter(value, self.tensor.requires_grad)
        for module, name in self.places:
            setattr(module, name, value)  # not _parameters: a recurrent layer keeps a list of them beside
        self.tensor = value


def slots(model: nn.Module) -> list[Slot]:
    """Every parameter and buffer of `model`, tied ones once."""
    found: dict[int, Slot] = {}
    for path, module in base_modules(model):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                slot = found.setdefault(id(tensor), Slot(tensor, [], [], persistent=False))
                slot.names.append(f"{path}.{name}" if path else name)
                if not any(other is module and attribute == name for other, attribute in slot.places):
                    slot.places.append((module, name))
                slot.persistent |= tensors is module._parameters or name not in module._non_persistent_buffers_set
    return list(found.values())


def loose_tensors(model: nn.Module) -> list[str]:
    """Names of plain attributes on the meta device: neither parameters nor buffers, so that nothing can fill them."""
    return [
        f"{path}.{name}" if path else name
        for path, module in base_modules(model)
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and value.is_meta
    ]


@torch.no_grad()
def initialize(model: nn.Module, wanted: Iterable[Slot], device: torch.device) -> list[Slot]:
    """Give each of the `wanted` slots, all on the meta device, the value that its module starts with.

    Within a transformers model that is the work of its `_init_weights`, elsewhere of the module's `reset_parameters`.
    Both set all that a module has; for what is on the meta device still, that is without effect.

    Returns:
        The slots for which there is neither, or that neither fills: they are on the meta device as before.
    """
    before = [(slot, slot.tensor) for slot in wanted]
    versions = {}
    for slot, tensor in before:
        slot.fill(_blank(tensor, device))
        versions[slot] = slot.tensor._version
    initializers = _initializers(model)
    for slot in versions:
        for start in [start for module, _ in slot.places for start in initializers[id(module)]]:
            if not _is_written(slot.tensor, versions[slot]):
                start()
    missed = [slot for slot in versions if not _is_written(slot.tensor, versions[slot])]
    for slot, tensor in before:
        if slot in missed:
            slot.fill(tensor)
    return missed


def _blank(tensor: Tensor, device: torch.device) -> Tensor:
    """An empty tensor on `device`, filled with what no start value has in it where its dtype has such a thing."""
    blank = torch.zeros_like(tensor, device=device)
    if blank.is_floating_point() or blank.is_complex():
        return blank.fill_(torch.nan)
    return blank if blank.dtype == torch.bool else blank.fill_(torch.iinfo(blank.dtype).max)


def _is_written(tensor: Tensor, version: int) -> bool:
    if tensor.is_floating_point() or tensor.is_complex():
        return not bool(tensor.isnan().any())
    if tensor.dtype == torch.bool:
        return tensor._version > version
    return not bool((tensor == torch.iinfo(tensor.dtype).max).any())


def _initializers(model: nn.Module) -> dict[int, list[Callable[[], Any]]]:
    """What gives a module's own tensors their start values, to be tried in turn; by the module's id."""
    found: dict[int, list[Callable[[], Any]]] = {}

    def walk(module: nn.Module, pretrained: Any) -> None:
        if is_transformers_model(module):
            pretrained = module
        starts = [partial(pretrained._init_weights, module)] if pretrained is not None else []
        reset = getattr(module, "reset_parameters", None)
        found.setdefault(id(module), [*starts, *([reset] if callable(reset) else [])])
        for child in module.children():
            walk(child, pretrained)

    walk(model, None)
    return found
