"""What a step on a GPU keeps otherwise than one on a CPU, and states that no step can make."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_peft.planning.fakes import fake_mode
from lightning_peft.planning.kernels import CudaKernels
from lightning_peft.planning.optimizers import bitsandbytes_states


def test_autocast_computes_norms_in_fp32_on_a_gpu() -> None:
    with fake_mode(), torch.autocast("cpu", torch.bfloat16):
        x = torch.empty(2, 8, dtype=torch.bfloat16)
        assert F.layer_norm(x, (8,)).dtype == torch.bfloat16
        with CudaKernels():
            assert F.layer_norm(x, (8,)).dtype == torch.float32
            assert F.softmax(x, -1).dtype == torch.float32
            assert F.linear(x, x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "keys", "is_masked", "kernel"),
    [
        (torch.bfloat16, 2, False, "FlashAttention"),
        (torch.bfloat16, 4, True, "EfficientAttention"),
        (torch.float32, 4, False, "EfficientAttention"),
        (torch.float32, 2, False, "Bmm"),
    ],
)
def test_attention_is_that_of_a_gpu(dtype: torch.dtype, keys: int, is_masked: bool, kernel: str) -> None:
    with fake_mode(), CudaKernels():
        query = torch.empty(1, 4, 16, 20, dtype=dtype, requires_grad=True)
        key = torch.empty(1, keys, 16, 20, dtype=dtype, requires_grad=True)
        mask = torch.ones(1, 1, 16, 16, dtype=torch.bool) if is_masked else None
        out = F.scaled_dot_product_attention(query, key, key, mask, enable_gqa=keys == 2)
        assert out.shape == query.shape
        names, waiting = set(), [out.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node.name() not in names:
                names.add(node.name())
                waiting += [other for other, _ in node.next_functions]
    assert any(kernel in name for name in names), names


def test_states_in_eight_bits() -> None:
    parameters = [nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.zeros(100))]
    states = bitsandbytes_states(bitsandbytes.optim.AdamW8bit(parameters))
    assert states is not None
    assert sum(state.nbytes for state in states) == 2 * (4096 + 4 * 16) + 2 * 4 * 100
    whole = bitsandbytes_states(bitsandbytes.optim.Lion(parameters))
    assert whole is not None
    assert sum(state.nbytes for state in whole) == 4 * (4096 + 100)
    assert bitsandbytes_states(torch.optim.AdamW(parameters)) is None
