"""Packing some rows at a time gives the bits that bitsandbytes gives for the whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

functional: Any = pytest.importorskip("bitsandbytes").functional
packing: Any = pytest.importorskip("lightning_peft.quantization.packing")


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Of any size and dtype, contiguous or transposed, some rows all zero."""
    rows, columns = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    torch.manual_seed(draw(st.integers(0, 99)))
    matrix = torch.randn(rows, columns) * (torch.rand(rows, 1) > 0.1)
    matrix = matrix.to(draw(st.sampled_from(packing.COMPUTABLE)))
    return matrix if draw(st.booleans()) else matrix.T.contiguous().T


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with patch.multiple(packing, LEAST=1000, MOST=1000):
        yield


def flat(state: Any) -> dict[str, Any]:
    return {name: value for name, value in state.as_dict(packed=False).items() if value is not None}


codings = st.builds(
    packing.Coding,
    quant_type=st.sampled_from(["nf4", "fp4"]),
    compress_statistics=st.booleans(),
    quant_storage=st.just(torch.uint8),
    blocksize=st.sampled_from([64, 128]),
)


@settings(max_examples=60, deadline=None)
@given(matrix=matrices(), coding=codings)
def test_four_bits(matrix: Tensor, coding: Any) -> None:
    packed = packing.packed_4bit(matrix, coding)
    expected, whole = functional.quantize_4bit(matrix.contiguous(), **vars(coding))
    assert torch.equal(packed.data, expected)
    found, wanted = flat(packed.quant_state), flat(whole)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value


@settings(max_examples=30, deadline=None)
@given(matrix=matrices())
def test_eight_bits(matrix: Tensor) -> None:
    packed = packing.packed_8bit(matrix)
    expected, scales, _ = functional.int8_vectorwise_quant(matrix.to(torch.float16).contiguous())
    assert torch.equal(packed.data, expected)
    assert torch.equal(packed.SCB, scales)


def test_codes_are_stored_as_is_asked() -> None:
    coding = packing.Coding("nf4", False, torch.bfloat16)
    matrix = torch.randn(40, 64)
    packed = packing.packed_4bit(matrix, coding)
    expected, _ = functional.quantize_4bit(matrix, **vars(coding))
    assert (packed.dtype, packed.shape) == (torch.bfloat16, expected.shape)
    assert torch.equal(packed.data.view(torch.uint8), expected.view(torch.uint8))
    bytes_of = packing.packed_4bit(matrix, replace(coding, quant_storage=torch.uint8))
    assert torch.equal(packed.data.view(torch.uint8).reshape(-1), bytes_of.data.reshape(-1))
