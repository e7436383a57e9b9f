"""Weights that bitsandbytes has packed into 4 or 8 bits: which they are, what values they stand for, and how far those
are from the ones that were packed.

bitsandbytes is not imported here: where a layer is packed by it, it has been.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.methods._host import own_tensors
from lightning_peft.methods._sharded import gathered, is_sharded
from lightning_peft.methods._targets import is_conv1d
from lightning_peft.methods.errors import PEFTError

CHUNK = 2**24
"""Values that are unpacked at once where not all are needed at once: 64 MB in fp32."""
SKETCH = 16
ITERATIONS = 8
"""Columns beyond the rank, and power iterations, of the search for the largest singular values of an error, whose
values are all of much the same size."""
ERROR = "_quantization_error"


@dataclass(frozen=True)
class PackedWeight:
    """One packed weight, which stands for a matrix W (out, in)."""

    data: Tensor
    """int8 (out, in), or 4-bit codes, two to a byte, in whatever dtype they are stored."""
    state: Any
    """The `QuantState` of 4-bit codes, or int8's scales SCB (out,), fp32: W = data · SCB / 127."""
    shape: torch.Size
    """(out, in)."""

    @property
    def kind(self) -> str:
        """ "nf4", "nf4-dq", "fp4", "fp4-dq" or "int8"."""
        if isinstance(self.state, Tensor):
            return "int8"
        return f"{self.state.quant_type}-dq" if self.state.nested else str(self.state.quant_type)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of what was packed; int8 forgets it."""
        return None if isinstance(self.state, Tensor) else cast(torch.dtype, self.state.dtype)

    @property
    def scales(self) -> Tensor:
        """The scales as they are stored: fp32, or 8-bit codes of them."""
        return self.state if isinstance(self.state, Tensor) else cast(Tensor, self.state.absmax)

    @property
    def is_nested(self) -> bool:
        """Whether its scales are packed, too."""
        return not isinstance(self.state, Tensor) and bool(self.state.nested)

    def plain_scales(self) -> Tensor:
        """The scales in fp32: of each block of 4-bit codes, or of each row of int8's."""
        from bitsandbytes import functional

        if not self.is_nested:
            return self.scales
        scales: Tensor = functional.dequantize_blockwise(self.scales, self.state.state2).float() + self.state.offset
        return scales

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W, unpacked in fp32 whatever it was packed from, in `dtype`.

        Raises:
            PEFTError: bitsandbytes has repacked it for inference.
        """
        from bitsandbytes import functional

        values: Tensor
        if isinstance(self.state, Tensor):
            values = functional.int8_vectorwise_dequant(self.data, self.state)
        else:
            self._check()
            values = unpacked_4bit(self.data, self.state, self.shape, torch.float32)
        return values.to(dtype)

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        """W in fp32, some rows after the other: which rows, and their values."""
        from bitsandbytes import functional

        rows, columns = self.shape
        # 4-bit codes can be cut where a row ends and a block does
        aligned = 1 if isinstance(self.state, Tensor) else math.lcm(columns, self.state.blocksize) // columns
        step = max(1, CHUNK // (columns * aligned)) * aligned
        if step >= rows:
            yield slice(0, rows), self.dense(torch.float32)
            return
        if not isinstance(self.state, Tensor):
            self._check()
            codes, size = self.data.view(torch.uint8).reshape(-1), self.state.blocksize
            scales = self.plain_scales()
        for start in range(0, rows, step):
            own = slice(start, min(start + step, rows))
            if isinstance(self.state, Tensor):
                yield own, functional.int8_vectorwise_dequant(self.data[own], self.state[own])
                continue
            first, last = own.start * columns, own.stop * columns
            shape = torch.Size((own.stop - own.start, columns))
            state = functional.QuantState(
                absmax=scales[first // size : -(-last // size)],
                shape=shape,
                code=self.state.code,
                blocksize=size,
                quant_type=self.state.quant_type,
                dtype=torch.float32,
            )
            yield own, unpacked_4bit(codes[first // 2 : -(-last // 2)], state, shape, torch.float32)

    def _check(self) -> None:
        if getattr(self.state, "packing_format_for_cpu", False):
            raise PEFTError(
                "a 4-bit weight was repacked for inference by bitsandbytes, which can't be undone without the layer; "
                "call lightning_peft.quantization.guard(model) before the model is run"
            )


def unpacked_4bit(codes: Tensor, state: Any, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The matrix of `shape` that 4-bit codes stand for, in `dtype`, which it is unpacked in.

    They are unpacked as one row: where a row ends within a block, bitsandbytes' kernel for CPUs with AVX512 takes the
    scale of a neighbour for a part of it (0.50.2), and it compiles code for each shape with rows of odd length.

    Args:
        codes: two to a byte, in whatever dtype they are stored.
        state: their `QuantState`.
        shape: (out, in).
        dtype: fp32, fp16 or bf16.
    """
    from bitsandbytes import functional

    column = codes.reshape(-1).view(torch.uint8).unsqueeze(1)
    state = copy.copy(state)
    state.shape, state.dtype = torch.Size((1, 2 * len(column))), dtype
    values: Tensor = functional.dequantize_4bit(column, state)
    return values.reshape(-1)[: shape.numel()].view(shape)


def packed(module: nn.Module, name: str = "weight", tensor: Tensor | None = None) -> PackedWeight | None:
    """What is packed under `name`; None where the module has a tensor there whose values are its own.

    Args:
        module: any module.
        name: of one of its own tensors.
        tensor: what to look at instead: one that has stood there.
    """
    bitsandbytes: Any = sys.modules.get("bitsandbytes")
    tensor = own_tensors(module).get(name) if tensor is None else tensor
    if bitsandbytes is None or tensor is None or name != "weight":
        return None
    # a sharded weight is a plain parameter that has lost its state, and the layer has it still
    state = getattr(tensor, "quant_state", None)
    if state is None and isinstance(module, bitsandbytes.nn.Linear4bit):
        state = getattr(module, "quant_state", None)
    if state is not None:
        size = tensor.numel() * tensor.element_size()
        return PackedWeight(tensor.data, state, state.shape) if size == -(-state.shape.numel() // 2) else None
    scales = getattr(tensor, "SCB", None)
    if scales is None and isinstance(module, bitsandbytes.nn.Linear8bitLt):
        scales = module.state.SCB
    is_int8 = scales is not None and tensor.dtype == torch.int8
    return PackedWeight(tensor.data, scales, tensor.shape) if is_int8 else None


def is_quantized(module: nn.Module) -> bool:
    """Whether its weight is packed."""
    return packed(module) is not None


def stored(module: nn.Module, name: str = "weight") -> Tensor | PackedWeight:
    """The module's own tensor, or what is packed there. One that is sharded is gathered: every rank has to ask for
    it."""
    found = packed(module, name)
    if found is None:
        return gathered(own_tensors(module)[name])
    return replace(found, data=gathered(found.data)) if is_sharded(found.data) else found


def dense_weight(module: nn.Module, name: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
    """The module's own tensor with all its values: of a packed weight what it stands for (out, in), a new tensor; any
    other as it stands in the module.

    Args:
        module: any module that has a tensor `name`.
        name: of one of its own tensors.
        dtype: of the result; by default the tensor's, and fp32 for a packed one.
    """
    tensor = stored(module, name)
    if isinstance(tensor, PackedWeight):
        return tensor.dense(dtype or torch.float32)
    return tensor if dtype is None else tensor.to(dtype)


def features(module: nn.Module) -> tuple[int, int]:
    """How many features a Linear, packed or not, or a Conv1D of transformers reads, and how many it gives."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    assert is_conv1d(module)
    features_in, features_out = own_tensors(module)["weight"].shape
    return features_in, features_out


@torch.no_grad()
def keep_error(module: nn.Module, weight: Tensor, rank: int) -> None:
    """Keep beside a layer that was just packed what a matrix of `rank` can hold of its error, until it is adapted.

    Args:
        module: the layer, packed.
        weight: what it was packed from (out, in).
        rank: 1 or more.
    """
    vars(module)[ERROR] = _largest(weight.to(torch.float32) - dense_weight(module), rank)


def kept_error(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """A (rank, in) and B (out, rank) in fp32 such that BA is what `keep_error` kept; None where it kept nothing."""
    return cast("tuple[Tensor, Tensor] | None", vars(module).get(ERROR))


def drop_error(module: nn.Module) -> None:
    """Forget what `keep_error` kept."""
    vars(module).pop(ERROR, None)


def _largest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) whose BA is `matrix` (out, in) cut to its largest singular values, or so nearly.

    By power iterations from a fixed start (arXiv 0909.4061, algorithm 4.4): the same on every call, and no random
    number is drawn from the global generators.
    """
    rank = min(rank, *matrix.shape)
    width = min(rank + SKETCH, *matrix.shape)
    start = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0))
    Q = torch.linalg.qr(matrix @ start.to(matrix)).Q
    for _ in range(ITERATIONS):
        Q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.mT @ matrix, full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank], (Q @ U[:, :rank]) * root
