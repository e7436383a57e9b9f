"""A dense matrix in, bitsandbytes' packed parameter out, with little of the matrix unpacked at once.

Imported only once something is to be packed: it imports bitsandbytes, which takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Int8Params, Params4bit
from torch import Tensor

from lightning_peft.methods.errors import PEFTError
from lightning_peft.quantization.config import Quantization

BLOCK = 64
COMPUTABLE = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that 4-bit kernels take."""
LEAST, MOST = 2**15, 2**21
"""Values that are packed at once on a CPU, where packing takes some 20 bytes for each."""


@dataclass(frozen=True)
class Coding:
    """How a 4-bit weight is coded."""

    quant_type: str
    compress_statistics: bool
    quant_storage: torch.dtype
    blocksize: int = BLOCK

    @classmethod
    def of(cls, config: Quantization) -> Coding:
        """What a configuration of 4 bits says."""
        return cls(config.type, config.double_quantization, getattr(torch, config.storage_dtype))

    @classmethod
    def like(cls, weight: Params4bit) -> Coding:
        """How `weight` is coded, or is to be."""
        return cls(weight.quant_type, bool(weight.compress_statistics), weight.quant_storage, weight.blocksize)


def packed_4bit(matrix: Tensor, coding: Coding) -> Params4bit:
    """`matrix` (out, in) in 4-bit codes, on its device: bit for bit as bitsandbytes packs the whole at once.

    Args:
        matrix: of any floating dtype and strides; what is no 16- or 32-bit number is rounded to fp32.
        coding: how.

    Raises:
        PEFTError: it holds what is not finite.
    """
    count, block = matrix.numel(), coding.blocksize
    codes = torch.empty(n_bytes(count), 1, dtype=torch.uint8, device=matrix.device)
    scales = torch.empty(-(-count // block), dtype=torch.float32, device=matrix.device)
    dtype = matrix.dtype if matrix.dtype in COMPUTABLE else torch.float32
    # rows are cut where a block ends
    for rows in _slices(matrix, block // math.gcd(block, matrix.shape[1])):
        part = matrix[rows].to(dtype).contiguous()
        first, last = rows.start * matrix.shape[1], rows.stop * matrix.shape[1]
        own, state = functional.quantize_4bit(part, blocksize=block, quant_type=coding.quant_type)
        codes[first // 2 : n_bytes(last)] = own
        scales[first // block : -(-last // block)] = state.absmax
    _check(scales)
    state = functional.QuantState(
        absmax=scales,
        shape=matrix.shape,
        code=functional.get_4bit_type(coding.quant_type, device=matrix.device),
        blocksize=block,
        quant_type=coding.quant_type,
        dtype=dtype,
    )
    if coding.compress_statistics:
        state.offset, state.nested = scales.mean(), True
        # of its own, bitsandbytes would keep a map that it makes for the meta device for all that comes after
        code = functional.create_dynamic_map().to("meta") if scales.is_meta else None
        state.absmax, state.state2 = functional.quantize_blockwise(scales - state.offset, code, blocksize=256)
    return Params4bit(
        stored_as(codes, coding.quant_storage),
        requires_grad=False,
        quant_state=state,
        bnb_quantized=True,
        **vars(coding),
    )


def packed_8bit(matrix: Tensor) -> Int8Params:
    """`matrix` (out, in) in 8 bits with one scale a row, on its device: as bitsandbytes packs its fp16 values.

    Raises:
        PEFTError: it holds what is not finite in fp16.
    """
    codes = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
    scales = torch.empty(matrix.shape[0], dtype=torch.float32, device=matrix.device)
    for rows in _slices(matrix, 1):
        part = matrix[rows].to(torch.float16).contiguous()
        codes[rows], scales[rows], _ = functional.int8_vectorwise_quant(part)
    _check(scales, "are beyond 65504 or ")
    return Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)


def _check(scales: Tensor, or_else: str = "") -> None:
    if not scales.is_meta and not scales.isfinite().all():
        raise PEFTError(f"has weights that {or_else}are not finite, which can't be packed; name it in skip_modules")


def n_bytes(count: int) -> int:
    """The bytes that `count` 4-bit codes take."""
    return -(-count // 2)


def stored_as(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bytes of codes as a column of `dtype`."""
    return codes.reshape(-1).view(dtype).reshape(-1, 1)


def _slices(matrix: Tensor, multiple: int) -> Iterator[slice]:
    """The rows of `matrix` that are packed at once, all but the last a multiple of `multiple` rows."""
    rows, columns = matrix.shape
    # elsewhere the kernels need no memory of their own
    values = min(MOST, max(LEAST, matrix.numel() // 32)) if matrix.device.type == "cpu" else matrix.numel()
    step = max(1, values // (columns * multiple)) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
