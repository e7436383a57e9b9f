"""Which settings there are beside the configured one, and the cheapest that fits a device."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lightning_peft.callback.base import Base
from lightning_peft.methods.errors import PEFTError, suggestion
from lightning_peft.planning.building import Setting
from lightning_peft.planning.estimates import Estimate, Planner
from lightning_peft.planning.sharing import Layout, layouts
from lightning_peft.quantization.config import NAMES, can_pack

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
RESERVED = 1_500_000_000
"""Bytes of a GPU that CUDA, NCCL and libraries take."""
USABLE = 0.95
"""The part of the rest that can be filled: memory comes in blocks of which some lie between others."""
DENSE = {"none": None, "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Bases that are not quantized, by the dtype that they are cast to."""
SHARDED = "lightning_peft.strategies.PEFTFSDPStrategy"
"""`peft_fsdp` in a configuration that gives it options."""
FOUR_BITS = "nf4-dq"


def storages() -> list[str]:
    """The names of the ways to store a base."""
    return [*DENSE, *NAMES]


def base_of(name: str, own: Base) -> Base:
    """The base that a name of `storages` means; what a quantization leaves dense has the configured dtype, else bf16.

    Raises:
        PEFTError: no such name, or bitsandbytes is not installed.
    """
    if name in DENSE:
        return Base.of(None, DENSE[name])
    if name not in NAMES:
        raise PEFTError(f"quantizations: {name!r} is none of {', '.join(storages())}{suggestion(name, storages())}")
    return Base.of(name, own.dtype or "bfloat16")


def storage_name(base: Base) -> str:
    """What `base` is called: `nf4-dq`, `bf16`, or `none` for one that is used as it is loaded."""
    if base.quantization is not None:
        return base.quantization.name
    return next(name for name, dtype in DENSE.items() if dtype == base.dtype)


def bytes_of(size: str) -> int:
    """The bytes of a GPU of `24GB` or `22.5 GiB`.

    Raises:
        PEFTError: it is no size, or nothing is left of it.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", size)
    unit = (found[2].upper() or "GB") if found else ""
    if not found or unit not in UNITS or float(found[1]) <= 0:
        raise PEFTError(f"fit: {size!r} is no size; give the GPU's memory, such as 24GB or 80GB")
    total = int(float(found[1]) * UNITS[unit])
    if not room(total):
        raise PEFTError(f"fit: {size!r} is all taken by CUDA, NCCL and libraries, {RESERVED / 1e9:g} GB; give more")
    return total


def room(size: int) -> int:
    """The bytes of a GPU of that size that a step may take."""
    return max(0, int(USABLE * (size - RESERVED)))


@dataclass(frozen=True)
class Choice:
    """The cheapest setting that fits, and what it changes."""

    estimate: Estimate
    changes: dict[str, object]
    """Options of a configuration with their values; empty where the configured setting fits."""


def cheapest(
    planner: Planner,
    own: Setting,
    devices: int,
    size: int,
    given: Layout = Layout(),  # noqa: B008, it is frozen
) -> Choice | None:
    """The first setting that fits: the configured one under the configured strategy, then in the order of what it
    costs: a base in bf16, which costs nothing; gradient checkpointing, a third of the computation; a base in 4 bits,
    where bitsandbytes is installed; sharding; activations on the CPU; shards on the CPU.

    Args:
        planner: makes the estimates.
        own: the configured setting.
        devices: how many there are.
        size: bytes of each.
        given: the configured devices, and their strategy where it is one that a layout has.
    """
    configured = [(own, replace(given, devices=devices))] if devices > 1 and given.strategy else []
    for setting, layout in (*configured, *candidates(own, layouts(devices))):
        found = planner.estimate(setting, layout)
        if not found.fault and found.peak <= room(size):
            return Choice(found, _changes(own, setting, layout, given))
    return None


def candidates(own: Setting, ways: Sequence[Layout]) -> Iterator[tuple[Setting, Layout]]:
    """What `cheapest` tries, in its order."""
    bases = [own.base]
    if own.method is not None and own.base.quantization is None:
        bases += [replace(own.base, dtype="bfloat16")] if own.base.dtype is None else []
        bases += [base_of(FOUR_BITS, own.base)] if can_pack() else []
    has_choice = own.method is not None
    blocks = [False, True] if has_choice and own.gradient_checkpointing is False else [own.gradient_checkpointing]
    moves = [False, True] if has_choice and own.offload_activations is False else [own.offload_activations]
    every = itertools.product(range(len(ways)), moves, range(len(bases)), blocks)

    def cost(each: tuple[int, bool, int, object]) -> tuple[object, ...]:
        way, moved, base, checkpointed = each
        packs = bases[base].quantization is not None and base > 0
        return ways[way].cpu_offload, moved, way, packs, bool(checkpointed), base

    for way, moved, base, checkpointed in sorted(every, key=cost):
        changed = replace(own, base=bases[base], gradient_checkpointing=checkpointed, offload_activations=moved)
        yield changed, ways[way]


def _changes(own: Setting, setting: Setting, layout: Layout, given: Layout) -> dict[str, object]:
    changes: dict[str, object] = {}
    if setting.base.quantization is not own.base.quantization and setting.base.quantization is not None:
        changes["peft.quantization"] = setting.base.quantization.name
    if setting.base.dtype != own.base.dtype:
        changes["peft.base_dtype"] = setting.base.dtype
    if setting.gradient_checkpointing != own.gradient_checkpointing:
        changes["peft.gradient_checkpointing"] = True
    if setting.offload_activations != own.offload_activations:
        changes["peft.offload_activations"] = True
    if layout.devices != given.devices:
        changes["trainer.devices"] = layout.devices
    if layout.devices > 1 and replace(layout, devices=given.devices) != given:
        sharded = {"trainer.strategy": SHARDED, "trainer.strategy.cpu_offload": True}
        changes |= sharded if layout.cpu_offload else {"trainer.strategy": layout.strategy}
    return changes
