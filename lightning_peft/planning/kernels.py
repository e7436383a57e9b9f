"""What a GPU computes otherwise than the CPU that a plan is made on, as far as it is memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten
FLASH = (torch.float16, torch.bfloat16)
"""The dtypes that the flash kernel takes."""
WIDEST = 256
"""Features of a head, above which there is no fused kernel."""
FP32 = {
    *(F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.cross_entropy, F.nll_loss, F.mse_loss, F.softplus),
    *(torch.layer_norm, torch.group_norm, torch.softmax, torch.log_softmax, Tensor.softmax, Tensor.log_softmax),
    *(torch.exp, Tensor.exp, torch.log, Tensor.log, torch.pow, Tensor.pow, torch.rsqrt, Tensor.rsqrt),
    *(torch.norm, torch.sum, Tensor.sum, torch.cumsum, Tensor.cumsum),
}
"""Functions that autocast computes in fp32 on CUDA, and leaves alone on a CPU; those that models call."""


class CudaKernels(TorchFunctionMode):
    """Lets a step on CPU tensors keep and make what the same step keeps and makes on a CUDA GPU: by the attention
    kernels that it has, and by autocast's list of functions that need fp32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func in FP32 and torch.is_autocast_enabled("cpu"):
            args = [_in_fp32(value) for value in args]
            kwargs = {name: _in_fp32(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of (batch, heads, length, features) by the kernel that CUDA has for it: the flash kernel takes 16 bits
    and no mask, the memory-efficient one as many heads of keys as of queries; else it is computed as written."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    width, heads, of_keys = query.shape[-1], query.shape[-3], key.shape[-3]
    out: Tensor
    if query.dim() == 4 and attn_mask is None and query.dtype in FLASH and width <= WIDEST:
        # as torch does it for features that are no multiple of 8
        padded = [F.pad(each, (0, -width % 8)) if width % 8 else each for each in (query, key, value)]
        out = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)[0]
        return out[..., :width]
    if query.dim() == 4 and heads == of_keys:
        bias = None
        if attn_mask is not None:
            bias = torch.zeros_like(attn_mask, dtype=query.dtype) if attn_mask.dtype == torch.bool else attn_mask
            bias = bias.expand(*query.shape[:3], key.shape[2])
        efficient = aten._scaled_dot_product_efficient_attention
        out = efficient(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]
        return out
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


def _in_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in FLASH else value


def workspace(function: Any, args: Any) -> int:
    """Bytes that a GPU's kernel takes beside its inputs and outputs while it runs: the flash kernel sums gradients of
    the queries in fp32, and makes those of keys and values for each head of the queries."""
    if function._overloadpacket is not aten._scaled_dot_product_flash_attention_backward:
        return 0
    _, query, key, *_ = args
    of_heads = 0 if query.shape[1] == key.shape[1] else 2 * query.numel() * query.element_size()
    return int(4 * query.numel() + of_heads)
