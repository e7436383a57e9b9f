"""A short identity of a frozen base: enough to tell another model from the one that an adapter was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

SAMPLES = 64
"""Values read of each tensor."""

Fingerprint = dict[str, str]


def sample_bytes(tensor: Tensor, samples: int = SAMPLES) -> bytes:
    """The bytes of up to `samples` values, evenly spaced over the tensor; of all of them where it has no more."""
    if tensor.is_meta:
        return b""
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // samples)
    return bytes(flat[::step][:samples].contiguous().view(torch.uint8).cpu().tolist()) if flat.numel() else b""


def fingerprint(base: Mapping[str, Tensor]) -> Fingerprint:
    """SHA-256 digests of the base's names and shapes, of its dtypes, and of sampled values.

    Args:
        base: the frozen parameters by name. 1 GB of them takes well under a second, since only `SAMPLES` values of each
            are read.
    """
    tensors = sorted(base.items())
    parts = {
        "structure": "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors).encode(),
        "dtypes": "\n".join(str(tensor.dtype) for _, tensor in tensors).encode(),
        "values": b"".join(hashlib.sha256(sample_bytes(tensor)).digest() for _, tensor in tensors),
    }
    return {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}


def differences(ours: Fingerprint, theirs: Fingerprint) -> list[str]:
    """What of two bases' parameters differs, in words; empty where they are the same."""
    words = {"structure": "names or shapes", "dtypes": "dtypes", "values": "values"}
    return [text for name, text in words.items() if ours.get(name) != theirs.get(name)]
