"""Less memory for the same gradients: blocks that run again in the backward pass, and activations that wait on the
CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft.injection import has_statistics
from lightning_peft.methods._blocks import repeated_modules
from lightning_peft.methods._host import Adapter, Base, Host, Swapped, hosts, own_class, swap
from lightning_peft.methods._targets import base_modules, find
from lightning_peft.methods.errors import PEFTError

if TYPE_CHECKING:
    from lightning_peft.callback.module import Plan

STORE = "cpu"
"""Where activations wait; what is there already stays."""
SMALLEST = 2**20
"""Bytes of an activation below which moving it to the CPU gains less than it costs."""


class Checkpointed(Swapped):
    """Keeps for the backward pass only what the module is given, and runs it again for the rest (Chen et al., 2016,
    arXiv:1604.06174).

    That is so wherever gradients are taken, in eval mode as well. Random numbers, autocast and the adapters that are
    active are those of the first run, also where the backward pass begins outside of `disable_adapters` or
    `adapter_per_row`.
    """

    forward_before: Base | None
    """A forward that was set on the instance; it would hide this class's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        base = super().forward if self.forward_before is None else self.forward_before
        if not torch.is_grad_enabled():
            return base(*args, **kwargs)
        args, kwargs = self._without_cache(args, kwargs)
        names, seen = list(kwargs), _switches(self)

        def run(*values: Any) -> Any:
            given, named = values[: len(args)], dict(zip(names, values[len(args) :], strict=True))
            now = _switches(self)
            if now == seen:
                return base(*given, **named)
            _switch(self, seen)
            try:
                return base(*given, **named)
            finally:
                _switch(self, now)

        # by position, since only those tensors are kept by autograd, where a hook can move them to the CPU
        return checkpoint(run, *args, *kwargs.values(), use_reentrant=False)

    def take_off(self) -> None:
        _put_back(self, "forward", vars(self).pop("forward_before"))
        super().take_off()

    def _without_cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a layer of transformers is to be given while it trains: a second run would enter its keys and values
        into a cache again.

        Raises:
            PEFTError: the cache holds what the layer has to see.
        """
        if not any(map(_is_cache, chain(args, kwargs.values()))) or getattr(self, "_can_checkpoint_with_cache", False):
            return args, kwargs
        layer = next((number for m in self.modules() if type(number := getattr(m, "layer_idx", None)) is int), 0)
        for value in chain(args, kwargs.values()):
            if _is_cache(value) and value.get_seq_length(layer):
                raise PEFTError(
                    f"gradient_checkpointing: {own_class(self).__name__} is given the keys and values of earlier "
                    "tokens, and can't run again after it has added to them; train without past_key_values, or "
                    "without gradient_checkpointing"
                )
        more = {"use_cache": False} if "use_cache" in kwargs else {}
        kept = {name: None if _is_cache(value) else value for name, value in kwargs.items()}
        return tuple(None if _is_cache(value) else value for value in args), kept | more


class OffloadingModule(Swapped, LightningModule):
    """Mixed in front of a LightningModule's class to keep what its training steps save for the backward pass on the
    CPU."""

    step_before: Base | None
    """A training step that was set on the instance."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own."""
        step = super().training_step if self.step_before is None else self.step_before
        with offloaded_activations(self):
            return step(*args, **kwargs)

    def take_off(self) -> None:
        _put_back(self, "training_step", vars(self).pop("step_before"))
        super().take_off()


def apply_memory_options(module: LightningModule, plan: Plan) -> None:
    """Let an injected module save memory as `plan.gradient_checkpointing` and `plan.offload_activations` say.

    Modules keep their names, parameters and keys; `remove` undoes it.

    Raises:
        PEFTError: there is nothing to checkpoint, or something that can't be; the module is then as it was.
    """
    for block in _to_checkpoint(module, plan.gradient_checkpointing):
        if not isinstance(block, Checkpointed):
            vars(block)["forward_before"] = vars(block).pop("forward", None)
            swap(block, Checkpointed)
    if plan.offload_activations and not isinstance(module, OffloadingModule):
        vars(module)["step_before"] = vars(module).pop("training_step", None)
        swap(module, OffloadingModule)


@contextmanager
def offloaded_activations(module: nn.Module) -> Iterator[None]:
    """Copy what is saved for the backward pass inside of the `with` to the CPU, and back when it is needed.

    What moves are activations through which a gradient flows, of `SMALLEST` bytes and more, that are not on the CPU
    yet. Frozen weights, and what is computed of them alone, stay; so do the parameters of `module`. Copies go through
    pinned memory, in the order of the device's other work.
    """
    own = {_local(parameter).untyped_storage().data_ptr() for parameter in module.parameters()}

    def pack(tensor: Tensor) -> Any:
        if tensor.device.type == STORE or not _is_large_activation(tensor, own):
            # detached, for an output that holds on to its own node is never freed
            return tensor.detach(), tensor._version
        copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return copied.copy_(tensor.detach(), non_blocking=True), tensor.device

    def unpack(packed: tuple[Tensor, int | torch.device]) -> Tensor:
        tensor, about = packed
        if isinstance(about, torch.device):
            return tensor.to(about, non_blocking=True)
        if tensor._version != about:
            # torch leaves this check to hooks where there are any
            raise RuntimeError(
                f"a tensor of shape {tuple(tensor.shape)} that the backward pass needs was changed in place: it is at "
                f"version {tensor._version}, and was saved at version {about}"
            )
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _is_large_activation(tensor: Tensor, own: set[int]) -> bool:
    """Whether a gradient flows through it, and its bytes are its own: a broadcast one would grow in a copy."""
    size = tensor.numel() * tensor.element_size()
    storage = tensor.untyped_storage()
    return (
        tensor.requires_grad
        and not tensor.is_leaf
        and SMALLEST <= size <= storage.nbytes()
        and storage.data_ptr() not in own
    )


def _local(parameter: Tensor) -> Tensor:
    return cast(Any, parameter).to_local() if hasattr(parameter, "to_local") else parameter


def _to_checkpoint(model: nn.Module, asked: bool | Sequence[str]) -> list[nn.Module]:
    """The modules to run again: those that are named, or the model's blocks."""
    if asked is False:
        return []
    faults: list[str] = []
    if asked is True:
        found = repeated_modules(model)
        if not found:
            names = ", ".join(name for name, child in model.named_children() if any(True for _ in child.parameters()))
            faults = [
                f"gradient_checkpointing: {own_class(model).__name__} has no repeated blocks that could be told; name "
                f"the modules to run again, of which there are {names}"
            ]
    elif isinstance(asked, str):
        raise PEFTError(f"gradient_checkpointing: {asked!r} is a string; give true, or a list, [{asked!r}]")
    else:
        found, faults = _named(model, asked)
    for path, block in found.items():
        trained = [name for name, each in base_modules(block) if has_statistics(each) and _trains_statistics(each)]
        if trained:
            faults.append(
                f"gradient_checkpointing: {path} would move the statistics of {trained[0] or path} twice in each step, "
                "which modules_to_save trains; leave it out of one of them"
            )
    if faults:
        raise PEFTError(faults)
    return list(found.values())


def _named(model: nn.Module, names: Sequence[str]) -> tuple[dict[str, nn.Module], list[str]]:
    modules = dict(base_modules(model))
    found, faults = find(
        "gradient_checkpointing", list(names), modules, lambda _: True, exclude=[], skip=(), describe=repr
    )
    blocks: dict[str, nn.Module] = {}
    for path, module in found.items():
        # a list is never called; its items are meant
        items = module.items() if isinstance(module, nn.ModuleDict) else module.named_children()
        of_list = {f"{path}.{name}": item for name, item in items}
        blocks |= of_list if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else {path: module}
    return blocks, faults


def _trains_statistics(module: nn.Module) -> bool:
    if not isinstance(module, Host):
        return False
    return any("running_mean" in cast(Adapter, adapter).overrides for adapter in module.adapters.values())


def _put_back(module: nn.Module, name: str, function: Base | None) -> None:
    if function is not None:
        vars(module)[name] = function


def _is_cache(value: object) -> bool:
    # where there is one, that has been imported
    return isinstance(value, getattr(sys.modules.get("transformers.cache_utils"), "Cache", ()))


def _switches(model: nn.Module) -> list[Any]:
    """Which adapters each module runs through."""
    return [(host.active_adapter, host.row_adapters) for _, host in hosts(model)]


def _switch(model: nn.Module, switches: list[Any]) -> None:
    for (_, host), (active, rows) in zip(hosts(model), switches, strict=True):
        host.active_adapter, host.row_adapters = active, rows
