"""The arithmetic of low-rank updates: y + s·BAx with nothing kept for the backward pass but x, A and B."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Delta = Callable[[Tensor, Tensor, Tensor], Tensor]


def dropout_seed(p: float, training: bool) -> int | None:
    """A fresh seed from torch's CPU generator, or None where nothing is dropped.

    Drawn on the CPU, so that a GPU is never waited for; under activation checkpointing torch gives that generator back
    its state, and the recomputed layer draws the same seed.
    """
    return int(torch.empty((), dtype=torch.int64).random_().item()) if training and p > 0 else None


def dropped(x: Tensor, p: float, seed: int | None) -> Tensor:
    """`x` with elements dropped at probability `p` and the rest scaled by 1/(1-p); the same for the same seed."""
    if seed is None:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    # of x's shape but not of its strides: the same elements have to go from x's gradient, whose strides may be others
    keep = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - p, generator=generator)
    return x * keep.div_(1 - p)


def as_written(device_type: str) -> AbstractContextManager[Any]:
    """A context in which autocast, where it is on, leaves dtypes as they are written."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class _LinearUpdate(torch.autograd.Function):
    """y + s·B(A·drop(x)), where y is given or is the frozen Wx + b.

    Computed in y's dtype: x, which may be fp32 under autocast, is cast down for the products and never copied up.
    Backward recomputes A·drop(x), which is r wide, and the mask from its seed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor | None,
        x: Tensor,
        W: Tensor | None,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        p: float,
        seed: int | None,
    ) -> Tensor:
        frozen = F.linear(x, W, b) if W is not None else y
        assert frozen is not None
        dtype = frozen.dtype
        ctx.save_for_backward(x, W, A, B)
        ctx.options = dtype, scale, p, seed
        # a y that was made here may be added to in place; the caller's own may not
        in_place = W is not None and frozen.is_contiguous()
        out = frozen if in_place else torch.empty_like(frozen, memory_format=torch.contiguous_format)
        rows = _rows(frozen)
        with as_written(x.device.type):
            h = dropped(_rows(x).to(dtype), p, seed) @ A.to(dtype).T
            torch.addmm(rows, h, B.to(dtype).T, alpha=scale, out=rows if in_place else _rows(out))
        # F.linear may give a view, which autograd would not let a caller change in place
        if not in_place:
            return out
        return frozen.new_empty(0).set_(
            frozen.untyped_storage(), frozen.storage_offset(), frozen.shape, frozen.stride()
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B = ctx.saved_tensors
        dtype, scale, p, seed = ctx.options
        _, needs_x, needs_W, needs_b, needs_A, needs_B, *_ = ctx.needs_input_grad
        g = _rows(grad).to(dtype)
        g_h = scale * (g @ B.to(dtype))
        grad_x = grad_W = grad_A = grad_B = None
        if needs_A or needs_B:
            x_dropped = dropped(_rows(x).to(dtype), p, seed)
            grad_A = (g_h.T @ x_dropped).to(A.dtype) if needs_A else None
            grad_B = (g.T @ (scale * (x_dropped @ A.to(dtype).T))).to(B.dtype) if needs_B else None
        if needs_x:
            grad_x = dropped(g_h @ A.to(dtype), p, seed)
            grad_x = grad_x if W is None else torch.addmm(grad_x, g, W.to(dtype))
            grad_x = grad_x.to(x.dtype).view(x.shape)
        if needs_W:
            grad_W = (g.T @ _rows(x).to(dtype)).to(W.dtype)
        grad_b = g.sum(0) if needs_b else None
        return (grad if W is None else None), grad_x, grad_W, grad_b, grad_A, grad_B, None, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _RecomputedUpdate(torch.autograd.Function):
    """y + delta(x, A, B) for any `delta`, which the backward pass computes again instead of keeping what it went
    through."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, delta: Delta) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.delta, ctx.dtype = delta, y.dtype
        return y + _in_dtype(delta, x, A, B, y.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:4]
        x, A, B = ctx.saved_tensors
        # on where a gradient of this gradient is asked for
        twice = torch.is_grad_enabled()
        with torch.enable_grad():
            output = _in_dtype(ctx.delta, x, A, B, ctx.dtype)
        wanted = [tensor for tensor, need in zip((x, A, B), needs, strict=True) if need]
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=twice))
        return grad, *(next(found) if need else None for need in needs), None


def _in_dtype(delta: Delta, x: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype) if x.is_floating_point() else x
    with as_written(x.device.type):
        return delta(x, A.to(dtype), B.to(dtype))


def linear_update(y: Tensor, x: Tensor, A: Tensor, B: Tensor, *, scale: float, p: float, training: bool) -> Tensor:
    """y + scale·B(A·dropout(x)).

    Args:
        y: (…, out), the frozen layer's output; its dtype is the one computed in.
        x: (…, in), any floating dtype.
        A: (r, in). B: (out, r). Their gradients come in their own dtype.
        scale: s = α/r (or α/√r).
        p: probability of dropping an element of x while `training`.

    Source: LoRA, arXiv 2106.09685, eq. 3.
    """
    return _update(y, x, None, None, A, B, scale, p, training)


def adapted_linear(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, *, scale: float, p: float, training: bool
) -> Tensor:
    """Wx + b + scale·B(A·dropout(x)): `linear_update` with the frozen layer in the same node of the graph.

    One sum into y and one into the gradient of x less than in two nodes, and under autocast no cast copy of W is kept.
    """
    return _update(None, x, W, b, A, B, scale, p, training)


def _update(
    y: Tensor | None,
    x: Tensor,
    W: Tensor | None,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    p: float,
    training: bool,
) -> Tensor:
    if torch.compiler.is_compiling() and training and p > 0:
        # a generator with a seed of its own can't be traced; the compiler recomputes its own dropout's mask
        x, p = F.dropout(x, p), 0.0
    seed = dropout_seed(p, training)
    result: Tensor = _LinearUpdate.apply(y, x, W, b, A, B, scale, p, seed)  # type: ignore[no-untyped-call]
    return result


def recomputed_update(y: Tensor, x: Tensor, A: Tensor, B: Tensor, delta: Delta) -> Tensor:
    """y + delta(x, A, B) in y's dtype; of `delta` nothing but x, A and B is kept for the backward pass."""
    if torch.compiler.is_compiling():
        # the compiler chooses by itself what to keep and what to recompute
        return y + _in_dtype(delta, x, A, B, y.dtype)
    result: Tensor = _RecomputedUpdate.apply(y, x, A, B, delta)  # type: ignore[no-untyped-call]
    return result
