"""Fill a model that was built on the meta device from safetensors files: tensor by tensor, quantized on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_peft.methods._host import hosts
from lightning_peft.methods._sharded import is_sharded
from lightning_peft.methods._targets import base_modules, inside, matches
from lightning_peft.methods.errors import PEFTError, some, suggestion
from lightning_peft.quantization.casting import base_dtype_of, cast_base
from lightning_peft.quantization.config import Quantization
from lightning_peft.quantization.convert import quantizable, quantize
from lightning_peft.quantization.fitting import BUILD, Plan, fit, is_named
from lightning_peft.quantization.meta import Slot, initialize, slots
from lightning_peft.quantization.shards import open_shards

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def load_base(
    model: M,
    path: str | Path,
    *,
    quantization: str | Quantization | None = None,
    dtype: str | torch.dtype | None = None,
    device: torch.device | str = "cpu",
    skip: Sequence[str] = (),
    error_ranks: Mapping[str, int] = MappingProxyType({}),
    pieces: Mapping[str, Callable[[], None]] = MappingProxyType({}),
) -> M:
    """Fill `model` in place from the safetensors at `path`, one tensor at a time: read, cast, packed, placed, freed.

    At no time is there more in memory than what is kept and one tensor; the files are mapped, so that what is read of
    them takes memory that the system can take back. The result is that of `load_state_dict`, `quantize` and
    `cast_base`, bit for bit.

    Keys of the files are the model's names, or all differ from them in front: a transformers body in a file of the
    whole model, the reverse, or a model that is an attribute of a LightningModule. Tied tensors are stored once or
    equal, and stay tied. Buffers that no file holds (`persistent=False`) are computed where transformers'
    `_init_weights` or the module's `reset_parameters` do; for all others, build the model in `meta_parameters()`. Heads
    that stand in the file beside the body of the model are left out, with a warning.

    Args:
        model: without adapters, built within `torch.device("meta")` or `meta_parameters()`. What has a value already
            and isn't in the files keeps it, with a warning.
        path: see `open_shards`.
        quantization: how to pack the linear layers that `quantize` would pack; they are packed from what is stored,
            whatever `dtype` is.
        dtype: of the floating-point tensors that `cast_base` would cast; the others then have the model's. By default
            all have the dtype that they are stored in.
        device: where everything is put; weights are packed there.
        skip: names or path endings of modules that are trained whole, such as a head. They are neither packed nor cast,
            may be missing in the file, or, with a warning, have another shape there, and then start as new ones do;
            what the file has under such a name and the model doesn't is left out.
        error_ranks: see `quantize`.
        pieces: by paths of modules, inner ones first: what to call as soon as all in one is loaded, as to shard it.

    Returns:
        The same object, all of it on `device`.

    Raises:
        PEFTError: with all that is wrong with the arguments, the files, or what of them doesn't fit the model, which is
            then as it was: only the files' headers have been read. Only weights that can't be packed, since they hold
            what is not finite, are told once they are read.
    """
    config = None if quantization is None else Quantization.of(quantization)
    target = None if dtype is None else base_dtype_of(dtype)
    place = _usable(device)
    if isinstance(skip, str):
        raise PEFTError(f"skip: {skip!r} is a string; give a list, [{skip!r}]")
    if next(hosts(model), None) is not None:
        raise PEFTError("load_base: adapters stand on the model; load its base first, and attach them after")
    with open_shards(path) as shards:
        plan, faults = fit(model, shards, skip)
        modules = [name for name, _ in base_modules(model) if name]
        of_model = [pattern for pattern in skip if any(matches(name, [pattern]) for name in modules)]
        layers, wrong = _layers(model, config, of_model)
        faults += wrong
        faults += [
            f"skip: {pattern!r} matches nothing, in the model or in {shards.path}{suggestion(pattern, _ends(modules))}"
            for pattern in skip
            if pattern not in of_model and not any(is_named(name, [pattern]) for name in (*shards, *plan.names))
        ]
        if faults:
            raise PEFTError(faults)
        _start_anew(model, plan, place)
        if target is not None:
            cast_base(model, target, skip=of_model)
        ranks = {id(module): error_ranks[path] for path, module in base_modules(model) if path in error_ranks}
        for key, slot in _by_piece(plan, pieces):
            if slot is None:
                pieces[key]()
                continue
            layer = next((module for module, name in slot.places if name == "weight" and id(module) in layers), None)
            stored = shards.read(key)
            if layer is not None and config is not None:
                try:
                    _pack(layer, config, stored.to(place), ranks.get(id(layer), 0))
                except PEFTError as error:
                    raise PEFTError([f"{shards.stored[key].file}: {key} {fault}" for fault in error.faults]) from None
                continue
            keeps = target is None and stored.is_floating_point()
            # a copy even where nothing changes: a view would change with the file
            slot.fill(stored.to(place, stored.dtype if keeps else slot.tensor.dtype, copy=True))
    for slot in slots(model):
        if slot.tensor.device != place and not is_sharded(slot.tensor):
            slot.tensor.data = slot.tensor.data.to(place)
    return model if config is None else quantize(model, config, skip=of_model)


def _by_piece(plan: Plan, pieces: Mapping[str, Any]) -> Iterator[tuple[str, Slot | None]]:
    """What to load, by key, and after the last of a piece its path. The plan lets go of it: it would keep all of it."""
    for path in pieces:
        for key in [key for key, slot in plan.sources.items() if all(inside(name, {path}) for name in slot.names)]:
            yield key, plan.sources.pop(key)
        yield path, None
    yield from plan.sources.items()


def _usable(device: torch.device | str) -> torch.device:
    """The device itself, with its number, after something was put there."""
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise PEFTError(f"device: {str(device)!r} can't be used here ({str(error).splitlines()[0]})") from error
    if place.type == "meta":
        raise PEFTError("device: on the meta device there are no weights; name the one to load them to, such as 'cpu'")
    return place


def _layers(
    model: nn.Module, config: Quantization | None, skip: Sequence[str]
) -> tuple[dict[int, nn.Module], list[str]]:
    """The layers to pack, by their ids, and what is wrong with them."""
    if config is None:
        return {}, []
    found, faults = quantizable(model, config, skip)
    if not found and not faults:
        faults = [f"quantization: {type(model).__name__} has no linear layer that can be quantized; leave it out"]
    return {id(module): module for module in found.values()}, faults


def _pack(layer: nn.Module, config: Quantization, weight: Tensor, error_rank: int) -> None:
    from lightning_peft.quantization.layers import pack  # bitsandbytes

    pack(layer, config, weight, error_rank=error_rank)


def _ends(paths: Sequence[str]) -> list[str]:
    return [path.rpartition(".")[2] for path in paths]


def _start_anew(model: nn.Module, plan: Plan, place: torch.device) -> None:
    """Fill what is not taken from the files, and tell of what the user might not expect."""
    if missed := initialize(model, plan.anew, place):
        raise PEFTError([_why_not(slot) for slot in missed])
    if plan.replaced:
        rank_zero_warn(f"load_base: {some(plan.replaced)} start anew: they have another shape in the file")
    if plan.left_out:
        rank_zero_warn(f"load_base: {some(plan.left_out)} of the file are left out: the model has no such head")
    if plan.kept:
        rank_zero_warn(
            f"load_base: {some(plan.kept)} are not in the file, and keep the values that they were built with"
        )


def _why_not(slot: Slot) -> str:
    """What to do for a slot that nothing fills."""
    kind = type(slot.places[0][0]).__name__
    if slot.persistent:
        return (
            f"{slot.name} is not in the file, and {kind} has no reset_parameters that starts it anew; build it outside "
            "of the meta device"
        )
    return f"{slot.name} is in no file (persistent=False), and {kind} has no reset_parameters that computes it; {BUILD}"
