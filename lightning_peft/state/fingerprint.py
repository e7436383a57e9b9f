"""A short identity of a frozen base: enough to tell another model from the one that an adapter was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lightning_peft.methods._quantized import PackedWeight, stored

SAMPLES = 64
"""Values read of each tensor."""
SCALES = 8
"""Scales of those that are packed themselves."""

Fingerprint = dict[str, str]
KEPT = "_sampled"


@dataclass(frozen=True)
class Sampled:
    """What a fingerprint takes of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    values: bytes

    @classmethod
    def of(cls, tensor: Tensor | PackedWeight) -> Sampled:
        """Of a tensor, or a packed weight, that is here as a whole."""
        return cls(tuple(tensor.shape), _dtype(tensor), _sample(tensor))


def keep_sample(module: nn.Module, name: str) -> None:
    """Keep what a fingerprint takes of the module's own tensor `name`, which is about to be sharded."""
    vars(module).setdefault(KEPT, {})[name] = Sampled.of(stored(module, name))


def kept_sample(module: nn.Module, name: str) -> Sampled | None:
    """What `keep_sample` kept."""
    return cast("Sampled | None", vars(module).get(KEPT, {}).get(name))


def sample_bytes(tensor: Tensor, samples: int = SAMPLES) -> bytes:
    """The bytes of up to `samples` values, evenly spaced over the tensor; of all of them where it has no more."""
    if tensor.is_meta:
        return b""
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // samples)
    return bytes(flat[::step][:samples].contiguous().view(torch.uint8).cpu().tolist()) if flat.numel() else b""


def fingerprint(base: Mapping[str, Tensor | PackedWeight | Sampled]) -> Fingerprint:
    """SHA-256 digests of the base's names and shapes, of its dtypes, and of sampled values.

    A packed weight has the shape that it stands for, its kind for a dtype, and its scales for values: a CPU and a GPU
    don't pack every value of fp4 or int8 into the same code, but the largest of a block is the same.

    Args:
        base: the frozen parameters by name. 1 GB of them takes well under a second, since only `SAMPLES` values of each
            are read.
    """
    taken = [(name, it if isinstance(it, Sampled) else Sampled.of(it)) for name, it in sorted(base.items())]
    parts = {
        "structure": "\n".join(f"{name} {sampled.shape}" for name, sampled in taken).encode(),
        "dtypes": "\n".join(sampled.dtype for _, sampled in taken).encode(),
        "values": b"".join(hashlib.sha256(sampled.values).digest() for _, sampled in taken),
    }
    return {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}


def _dtype(tensor: Tensor | PackedWeight) -> str:
    return tensor.kind if isinstance(tensor, PackedWeight) else str(tensor.dtype)


def _sample(tensor: Tensor | PackedWeight) -> bytes:
    if isinstance(tensor, PackedWeight):
        if tensor.data.is_meta:
            return b""
        if not tensor.is_nested:
            return sample_bytes(tensor.scales)
        # their mean has other last bits on another device, so that of each scale only the size counts
        scales = tensor.plain_scales()
        sizes = scales[:: max(1, len(scales) // SCALES)][:SCALES].clamp(min=1e-30).log2().mul(8).round()
        return bytes(sizes.short().view(torch.uint8).cpu().tolist())
    return sample_bytes(tensor)


def differences(ours: Fingerprint, theirs: Fingerprint) -> list[str]:
    """What of two bases' parameters differs, in words; empty where they are the same."""
    words = {"structure": "names or shapes", "dtypes": "dtypes", "values": "values"}
    return [text for name, text in words.items() if ours.get(name) != theirs.get(name)]
