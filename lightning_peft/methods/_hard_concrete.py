"""Hard-concrete gates: random numbers in [0, 1] that are 0 or 1 with a probability that can be trained.

Source: Louizos et al., arXiv 1712.01312, section 2.2; with the bounds of diff pruning, arXiv 2012.07463.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

LOWER, UPPER = -1.5, 1.5
"""l and r: a gate is a number of (0, 1), stretched to (l, r) and clamped to [0, 1]."""
Uniform = Callable[[Tensor], Tensor]
"""Draws numbers from [0, 1) of a tensor's shape, dtype and device."""


def gates(alpha: Tensor, uniform: Uniform | None) -> Tensor:
    """z = min(1, max(0, s·(r − l) + l)) with s = σ(log u − log(1 − u) + α), of α's shape and dtype.

    Args:
        alpha: the gates' locations.
        uniform: draws u; None for u = 1/2, which is what stands for the gate in evaluation.
    """
    location = alpha if uniform is None else alpha + torch.logit(uniform(alpha))
    return (torch.sigmoid(location) * (UPPER - LOWER) + LOWER).clamp(0, 1)


def open_probability(alpha: Tensor) -> Tensor:
    """P(z ≠ 0) = σ(α − log(−l / r)), of α's shape and dtype."""
    return torch.sigmoid(alpha - math.log(-LOWER / UPPER))


def seeded(seed: int, device: torch.device) -> Uniform:
    """Draws one tensor after the other; the same ones for the same seed."""
    return partial(_uniform, generator=torch.Generator(device).manual_seed(seed))


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    # of the shape but not of the strides: a recomputed gate may be laid out in memory otherwise
    return torch.empty(like.shape, dtype=like.dtype, device=like.device).uniform_(generator=generator)


class _Recomputed(torch.autograd.Function):
    """function(*tensors), which the backward pass computes again instead of keeping what it went through."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[1:]
        # on where a gradient of this gradient is asked for
        twice = torch.is_grad_enabled()
        with torch.enable_grad():
            output = ctx.function(*tensors)
        wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=twice, allow_unused=True))
        return None, *(next(found) if need else None for need in needs)


def recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors), of which nothing but `tensors` is kept for the backward pass.

    Args:
        function: has to give the same result each time. A tensor that it leaves unread gets no gradient, and still is
            part of the graph.
        *tensors: what gradients flow to; those that need none may be among them.
    """
    if torch.compiler.is_compiling():
        # the compiler chooses by itself what to keep and what to recompute
        return function(*tensors)
    result: Tensor = _Recomputed.apply(function, *tensors)  # type: ignore[no-untyped-call]
    return result
