"""What each of several devices holds of a step's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_peft.methods._blocks import repeated_modules
from lightning_peft.methods._quantized import packed
from lightning_peft.methods.errors import PEFTError
from lightning_peft.planning.ledger import ACTIVATIONS, GRADIENTS, WEIGHTS, Bytes
from lightning_peft.strategies.units import Unit, find_units


@dataclass(frozen=True)
class Layout:
    """How a run is laid out over devices."""

    strategy: str = ""
    """`peft_ddp` or `peft_fsdp`; empty on one device."""
    devices: int = 1
    cpu_offload: bool = False
    """Of `peft_fsdp`: the shards are in the CPU's memory."""

    @property
    def name(self) -> str:
        """Such as `peft_fsdp with cpu_offload`."""
        return f"{self.strategy or 'one device'}{' with cpu_offload' if self.cpu_offload else ''}"


def layouts(devices: int) -> list[Layout]:
    """The ways to use so many devices, that which works without gathering first."""
    if devices == 1:
        return [Layout()]
    sharded = Layout("peft_fsdp", devices)
    return [Layout("peft_ddp", devices), sharded, Layout("peft_fsdp", devices, cpu_offload=True)]


def on_each(
    peaks: Mapping[str, Bytes], model: nn.Module, layout: Layout, gathered_size: int | None
) -> dict[str, Bytes]:
    """The peaks of a step on each of several devices, of those on one.

    DDP keeps a copy of the gradients in buckets, that are sent as they are complete; `peft_fsdp` makes one when all
    are. Under `peft_fsdp` a device holds its part of each sharded weight, and two of the pieces at a time whole, one
    that computes and one that is gathered meanwhile.

    Args:
        peaks: of one device with the batch that each of them gets.
        model: with adapters.
        layout: the devices.
        gathered_size: bytes of a number of a dense fp32 weight once it is gathered, where autocast casts it.

    Raises:
        PEFTError: nothing of the model can be sharded.
    """
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    found = {place: total.copy() for place, total in peaks.items()}
    if layout.strategy == "peft_ddp":
        for total in found.values():
            total[GRADIENTS] += trained
    if layout.strategy != "peft_fsdp":
        return found
    units = find_units(model)
    if not units:
        raise PEFTError("peft_fsdp: there is no frozen matrix to shard; use strategy='peft_ddp'")
    stored = sum(_weight(module, name).nbytes for unit in units for module, name in unit.weights)
    away = stored if layout.cpu_offload else stored - -(-stored // layout.devices)
    blocks = set(repeated_modules(model))
    sizes = {unit.path: _gathered(unit, gathered_size) for unit in units}
    of_blocks = sorted((size for path, size in sizes.items() if path in blocks), reverse=True)
    of_others = max((size for path, size in sizes.items() if path not in blocks), default=0)
    within, outside = sum(of_blocks[:2]), of_others + sum(of_blocks[:1])
    of_all = any(place.endswith((" first", " last")) for place in peaks)
    for place, total in found.items():
        total[WEIGHTS] -= away
        if place == "step":
            total[ACTIVATIONS] += trained
        elif place.endswith((" first", " last")):
            total[ACTIVATIONS] += within
        else:
            total[ACTIVATIONS] += outside if of_all else max(within, outside)
    return found


def _gathered(unit: Unit, size: int | None) -> int:
    """Bytes of a piece's weights while they are whole."""
    total = 0
    for module, name in unit.weights:
        weight = _weight(module, name)
        is_cast = size is not None and weight.dtype.itemsize == 4 and packed(module, name) is None
        total += weight.numel() * (size if is_cast and size is not None else weight.element_size())
    return total


def _weight(module: nn.Module, name: str) -> Tensor:
    weight = module._parameters[name]
    assert weight is not None
    return weight
