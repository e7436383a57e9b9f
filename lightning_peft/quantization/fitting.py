"""Which tensor of a file goes where in a model; all that doesn't fit is told before a weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_peft.methods._targets import base_modules, is_transformers_model, matches
from lightning_peft.methods.errors import PEFTError, nearest, some
from lightning_peft.quantization.meta import Slot, loose_tensors, slots
from lightning_peft.quantization.naming import Prefixes, find_prefixes
from lightning_peft.quantization.others import is_bitsandbytes, other_quantizer
from lightning_peft.quantization.shards import Shards

PACKED = re.compile(
    r"\.(quant_map|absmax|nested_absmax|SCB|qweight|qzeros|weight_scale(_inv)?|weight_packed)$|quant_state"
)
"""Endings that quantized checkpoints (bitsandbytes, GPTQ, AWQ, fp8, compressed-tensors) have beside the weights."""
BUILD = "build the model inside `with lightning_peft.quantization.meta_parameters():` instead of torch.device('meta')"


@dataclass
class Plan:
    """What becomes of each tensor."""

    sources: dict[str, Slot] = field(default_factory=dict)
    """By key, in the files' order: what it fills."""
    anew: list[Slot] = field(default_factory=list)
    """Without a value, and not to be had from the file: parts that are trained whole, buffers that no file holds."""
    kept: list[str] = field(default_factory=list)
    """Names of tensors that the file lacks, but that have a value already."""
    replaced: list[str] = field(default_factory=list)
    """Names of tensors that are made anew, since those of the file have another shape."""
    left_out: list[str] = field(default_factory=list)
    """Keys of tensors that stand beside the body that the file and the model share: heads of another model."""
    names: list[str] = field(default_factory=list)
    """All names that the model's tensors have."""


def fit(model: nn.Module, shards: Shards, skip: Sequence[str]) -> tuple[Plan, list[str]]:
    """The place of every tensor of the files, and what is wrong: all that is missing, unexpected, misshapen or of
    another kind, and what can't be filled at all."""
    if faults := _unfillable(model):
        return Plan(), faults
    everything = slots(model)
    by_name = {name: slot for slot in everything for name in slot.names}
    numbers = {name: id(slot) for name, slot in by_name.items()}
    try:
        prefixes = find_prefixes(shards.stored, numbers)
    except PEFTError as error:
        return Plan(), [f"{shards.path}: {fault}" for fault in error.faults]

    plan = Plan(names=list(by_name))
    misfits: list[str] = []
    unexpected: list[str] = []
    filled: dict[Slot, str] = {}
    told: set[Slot] = set()
    for key, stored in shards.stored.items():
        name = prefixes.name(key)
        slot = by_name.get(name)
        if slot is None:
            if not is_named(name, skip) and not is_named(key, skip):
                unexpected.append(key)
        elif not slot.persistent:
            continue  # older files hold such buffers; the module computes them in full precision
        elif stored.shape != tuple(slot.tensor.shape):
            told.add(slot)
            if _is_skipped(slot, skip):
                plan.replaced.append(slot.name)
            else:
                misfits.append(f"{key} has the shape {stored.shape}, the model's {name} {tuple(slot.tensor.shape)}")
        elif _kind(stored.dtype) != _kind(slot.tensor.dtype):
            told.add(slot)
            misfits.append(f"{key} holds {_words(stored.dtype)}, the model's {name} {_words(slot.tensor.dtype)}")
        elif slot in filled:
            misfits += _tie_faults(shards, filled[slot], key)
        else:
            plan.sources[key] = slot
            filled[slot] = key
    unexpected = _without_leftovers(model, everything, unexpected)
    plan.left_out = [key for key in unexpected if _is_beside(model, prefixes, key)]
    unexpected = [key for key in unexpected if key not in plan.left_out]

    touched = {id(module) for slot in filled for module, _ in slot.places}
    missing: list[str] = []
    for slot in everything:
        if slot in filled:
            continue
        if slot.tensor.is_meta and not slot.persistent:
            plan.anew.append(slot)
        elif _is_skipped(slot, skip):
            if slot.tensor.is_meta:
                plan.anew.append(slot)
        elif slot in told:
            continue
        elif slot.tensor.is_meta or (slot.persistent and any(id(module) in touched for module, _ in slot.places)):
            missing.append(slot.name)
        elif slot.persistent:
            plan.kept.append(slot.name)
    faults = _told(model, prefixes, missing, unexpected, misfits)
    return plan, [f"{shards.path}: {fault}" for fault in faults]


def is_named(name: str, skip: Sequence[str]) -> bool:
    """Whether `skip` means `name` or a module that it lies in."""
    parts = name.split(".")
    return any(matches(".".join(parts[:end]), skip) for end in range(1, len(parts) + 1))


def _is_skipped(slot: Slot, skip: Sequence[str]) -> bool:
    return any(is_named(name, skip) for name in slot.names)


def _unfillable(model: nn.Module) -> list[str]:
    faults = [
        f"{name} is a plain tensor attribute on the meta device, which nothing can fill; {BUILD}"
        for name in loose_tensors(model)
    ]
    for path, module in base_modules(model):
        own = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
        if any(is_lazy(tensor) for tensor in own):
            faults.append(f"{path}: {type(module).__name__} has no shape yet; give it its sizes where it is built")
        elif is_bitsandbytes(module) or other_quantizer(module) is not None:
            faults.append(
                f"{path}: {type(module).__name__} is quantized already; build the model dense, it is quantized "
                "while it is loaded"
            )
    return faults


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    return "complex" if dtype.is_complex else "floating" if dtype.is_floating_point else "integer"


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tie_faults(shards: Shards, first: str, second: str) -> list[str]:
    """Two tensors of a file for one of the model have to be equal."""
    one, other = shards.read(first), shards.read(second)
    if one.dtype == other.dtype and torch.equal(one, other):
        return []
    return [
        f"{first} and {second} differ, and are one tied tensor in the model; build the model untied "
        "(tie_word_embeddings=False in a transformers configuration)"
    ]


def _without_leftovers(model: nn.Module, everything: Iterable[Slot], unexpected: list[str]) -> list[str]:
    """`unexpected` without what older versions of a model used to store: buffers that it computes now, wherever they
    stood, and what a transformers model declares (`_keys_to_ignore_on_load_unexpected`, checked on 5.23)."""
    computed = {name.rpartition(".")[2] for slot in everything if not slot.persistent for name in slot.names}
    computed -= {name.rpartition(".")[2] for slot in everything if slot.persistent for name in slot.names}
    patterns = [
        pattern
        for _, module in base_modules(model)
        if is_transformers_model(module)
        for pattern in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    ]
    return [
        key
        for key in unexpected
        if key.rpartition(".")[2] not in computed and not any(re.search(pattern, key) for pattern in patterns)
    ]


def _is_beside(model: nn.Module, prefixes: Prefixes, key: str) -> bool:
    """Whether `key` is no part of the body that is loaded: it lacks the prefix of all that is in it, or it is of a
    module beside the body of a transformers model (`base_model_prefix`), one that this model doesn't have."""
    if prefixes.lost and not key.startswith(prefixes.lost):
        return True
    for path, module in base_modules(model):
        own = prefixes.name(key).removeprefix(f"{path}." if path else "")
        part, dot, _ = own.partition(".")
        inside = own != prefixes.name(key) or not path
        if inside and dot and is_transformers_model(module) and hasattr(module, str(module.base_model_prefix)):
            return not hasattr(module, part)
    return False


def _told(
    model: nn.Module, prefixes: Prefixes, missing: list[str], unexpected: list[str], misfits: list[str]
) -> list[str]:
    """What doesn't fit, for people."""
    faults = []
    if any(PACKED.search(key) for key in unexpected):
        return [
            "its weights are quantized already; give the file of the dense model, it is quantized while it is loaded"
        ]
    if missing:
        free = {prefixes.name(key): key for key in unexpected}
        near = [free[name] for name in nearest(missing[0], free, limit=1)] if len(missing) < 20 else []
        faults.append(
            f"lacks {_count(missing)} of the model: {some(missing, 8)}{f' (it has {near[0]})' if near else ''}; "
            "what is to start anew, such as a head, can be named in skip (modules_to_save)"
        )
    if unexpected:
        faults.append(
            f"holds {_count(unexpected)} that the model doesn't have: {some(unexpected, 8)}; "
            "what is to be left out can be named in skip"
        )
    faults += misfits[:8] + ([f"and {len(misfits) - 8} more that don't fit"] if len(misfits) > 8 else [])
    if (missing or unexpected) and any(is_transformers_model(module) for _, module in base_modules(model)):
        faults.append(
            "is read by the model's own names; for a model whose tensors transformers renames or merges as it loads "
            "them, use from_pretrained"
        )
    return faults


def _count(names: Sequence[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
