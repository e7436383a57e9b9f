"""The states of optimizers that can't step without values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

BLOCK = 256
"""Values that share a scale in an 8-bit state of bitsandbytes."""


def bitsandbytes_states(optimizer: Optimizer) -> list[Tensor] | None:
    """What an optimizer of bitsandbytes keeps for its parameters, without values; None for any other's.

    In 8 bits a state takes a byte a value, and a scale in fp32 for each `BLOCK` of them; small parameters' are in fp32.
    Attributes are those of bitsandbytes 0.50.
    """
    if not type(optimizer).__module__.startswith("bitsandbytes"):
        return None
    args = getattr(optimizer, "args", None)
    bits, smallest = getattr(args, "optim_bits", 32), getattr(args, "min_8bit_size", 4096)
    number = 1 if any(base.__name__ == "Optimizer1State" for base in type(optimizer).__mro__) else 2
    made = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            count = parameter.numel()
            if bits == 8 and count >= smallest:
                made += [torch.empty(count, dtype=torch.uint8) for _ in range(number)]
                made += [torch.empty(-(-count // BLOCK)) for _ in range(number)]
            else:
                made += [torch.empty(count) for _ in range(number)]
    return made
