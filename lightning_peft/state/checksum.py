"""Whether a tensor is the same in two places, by a number."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WORDS = 1 << 18
"""Of 8 bytes, that a checksum takes at a time: few enough for a CPU's cache, enough to keep a GPU busy."""
ODD = -7046029254386353131


def checksum(tensor: Tensor) -> int:
    """64 bits over every byte of `tensor`, for comparing tensors of the same shape and dtype that lie in two places.

    A sum of integers that wrap, weighted by their place: it depends neither on the device nor on an order of summation,
    and takes little more time than reading the tensor. Zero where there are no bytes, as
    on the meta device.
    """
    if tensor.is_meta or not tensor.numel():
        return 0
    data = tensor.detach().as_subclass(Tensor).contiguous().view(-1).view(torch.uint8)
    places = torch.arange(1, min(WORDS, -(-data.numel() // 8)) + 1, device=data.device) * ODD
    # odd, so that no bit is lost, and of no small ratio to each other, which differences of two words can have
    weights = ((places >> 31) ^ places) * ODD | 1
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, data.numel(), 8 * WORDS):
        part = data[start : start + 8 * WORDS]
        if part.numel() % 8 or part.storage_offset() % 8:
            part = nn.functional.pad(part, (0, -part.numel() % 8))
        words = part.view(torch.int64)
        # the shift lets high bits meet low ones: a product that wraps carries them upwards alone
        mixed = (words >> 29).bitwise_xor_(words).mul_(weights[: words.numel()])
        total = total * ODD + mixed.sum()
    return int(total) & (1 << 64) - 1
