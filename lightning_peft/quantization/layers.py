"""Linear layers whose weight bitsandbytes has packed, mended where its own corrupt, forget or can't load.

Imported only once something is to be packed: it imports bitsandbytes, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import bitsandbytes
import torch
import torch.nn.functional as F
from bitsandbytes import functional
from bitsandbytes.nn import Int8Params, Params4bit
from torch import Tensor, nn

from lightning_peft.methods._quantized import dense_weight, keep_error, unpacked_4bit
from lightning_peft.methods._sharded import is_sharded
from lightning_peft.methods.errors import PEFTError
from lightning_peft.quantization.config import Quantization
from lightning_peft.quantization.others import is_conv1d_class
from lightning_peft.quantization.packing import COMPUTABLE, Coding, n_bytes, packed_4bit, packed_8bit, stored_as

THEIRS = (
    *("compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "support_avx512bf16_for_cpu"),
    *("state", "index"),
)
"""What bitsandbytes' layers, of 4 and of 8 bits, have beyond nn.Linear."""


class PackedLinear(nn.Linear):
    """What the 4-bit and the 8-bit layer have in common: how they load, and what they compute in.

    While `weight` is a dense matrix (out, in), as it is where an adapter is merged into it, both are an nn.Linear.
    """

    source_cls: type[nn.Module]
    """The class that the layer had before; transformers calls it so, too."""

    def is_packed(self) -> bool:
        """Whether `weight` is packed."""
        raise NotImplementedError

    def link(self) -> None:
        """Let the layer and its weight hold the same scales again, after one of them moved or was copied."""
        raise NotImplementedError

    def packed_from(self, given: Mapping[str, Tensor], device: torch.device, copy: bool) -> nn.Parameter:
        """The weight on `device` that a state dict's entries make: those of a packed layer, which are copied if asked
        for, or a dense matrix as the layer had it before.

        Raises:
            ValueError: they don't fit this layer.
        """
        raise NotImplementedError

    def matrix_from(self, given: Tensor) -> Tensor:
        """`given` as a matrix (out, in), from a weight as the layer had it before: (in, out) for a Conv1D.

        Raises:
            ValueError: it has another shape, or other numbers.
        """
        transposed = is_conv1d_class(self.source_cls)
        shape = (self.in_features, self.out_features) if transposed else (self.out_features, self.in_features)
        if tuple(given.shape) != shape or not given.is_floating_point():
            dtype = str(given.dtype).removeprefix("torch.")
            raise ValueError(
                f"is {tuple(given.shape)} in {dtype}, without scales; a dense weight would be {shape} in a "
                "floating-point dtype"
            )
        return given.T if transposed else given

    def operands(self, x: Tensor, compute_dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None, torch.dtype]:
        """The input and the bias in the dtype to multiply in, and the dtype of the output: as nn.Linear has it, the
        input's or autocast's."""
        if not x.is_floating_point():
            raise PEFTError(
                f"a quantized {self.source_cls.__name__} was given {str(x.dtype).removeprefix('torch.')}: the model "
                "casts its input to the dtype of the layer's weight; name the layer in skip_modules"
            )
        output = x.dtype
        if torch.is_autocast_enabled(x.device.type) and output != torch.float64:
            output = torch.get_autocast_dtype(x.device.type)
        dtype = compute_dtype or output
        return x.to(dtype), None if self.bias is None else self.bias.to(dtype), output

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}weight"
        given = {}
        if self.is_packed():
            names = (key, f"{prefix}SCB", f"{prefix}weight_format")
            given = {name: value for name, value in state_dict.items() if name in names or name.startswith(f"{key}.")}
        rest = {name: value for name, value in state_dict.items() if name not in given}
        missing: list[str] = []
        nn.Linear._load_from_state_dict(
            self, rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        missing_keys += [name for name in missing if name != key or key not in given]
        if key not in given:
            unexpected_keys += given
            return
        weight = self.weight
        assign = bool(local_metadata.get("assign_to_params_buffers", False)) or weight.is_meta
        try:
            with torch.no_grad():
                packed = self.packed_from(
                    {name.removeprefix(prefix): value for name, value in given.items()},
                    given[key].device if assign else weight.device,
                    copy=not assign,
                )
        except (ValueError, KeyError, AssertionError, RuntimeError) as error:
            error_msgs.append(f"{key}: {error}")
            return
        if assign:
            self.weight = packed
        else:
            # the parameter stays the same object, as it does in any other layer
            weight.data = packed.data
            vars(weight).update(vars(packed))
        self.link()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.link()


class Linear4bit(PackedLinear, bitsandbytes.nn.Linear4bit):
    """y = Wx + b with W in 4-bit codes, unpacked for each use.

    As bitsandbytes' layer of this name, but: it is never repacked into a layout for inference, which has no gradient
    (on CPUs with AVX512-BF16 the original is, by a forward without gradients); it loads what it saves; it multiplies in
    the dtype of its input or of autocast, whatever its first input was; its bias keeps its dtype, and `.to(dtype)`
    leaves the codes alone.
    """

    def is_packed(self) -> bool:
        weight: Any = self._parameters["weight"]
        # a sharded one is a plain parameter
        is_matrix = weight.is_floating_point() and tuple(weight.shape) == (self.out_features, self.in_features)
        return isinstance(weight, Params4bit) or not is_matrix

    def link(self) -> None:
        weight: Any = self._parameters["weight"]
        state = getattr(weight, "quant_state", None)
        if state is None:
            return  # a sharded weight is a plain parameter, and the layer has its scales
        if not isinstance(weight, Params4bit):
            # unpickled: a plain parameter with the attributes of a packed one
            kept = {name: value for name, value in vars(weight).items() if name not in ("data", "requires_grad")}
            self.weight = Params4bit(weight.data, **kept)
        self.quant_state = state

    def packed_from(self, given: Mapping[str, Tensor], device: torch.device, copy: bool) -> nn.Parameter:
        codes = given["weight"]
        if len(given) == 1:
            return packed_4bit(self.matrix_from(codes).to(device), Coding.like(cast(Params4bit, self.weight)))
        scales = {name: value.to(device, copy=copy) for name, value in given.items() if name != "weight"}
        loaded = Params4bit.from_prequantized(codes.to(device, copy=copy), scales, device=device)
        shape = (self.out_features, self.in_features)
        if tuple(loaded.quant_state.shape) != shape:
            raise ValueError(f"is a packed {tuple(loaded.quant_state.shape)}, and the layer has {shape}")
        if (size := loaded.numel() * loaded.element_size()) != n_bytes(shape[0] * shape[1]):
            raise ValueError(f"has {size} bytes of codes, and the layer {n_bytes(shape[0] * shape[1])}")
        loaded.data = stored_as(loaded.data, self.quant_storage)
        loaded.quant_storage = self.quant_storage
        return loaded

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not self.is_packed():
            return F.linear(x, weight, self.bias)
        # a sharded weight has lost its state
        state: Any = getattr(weight, "quant_state", None)
        state = self.quant_state if state is None else state
        x, bias, output = self.operands(x, self.compute_dtype or (None if x.dtype in COMPUTABLE else torch.float32))
        result: Tensor
        if x.device.type == "cpu" or len(weight) < 2:
            # bitsandbytes would do the same, with other values for some shapes: see `unpacked_4bit`
            result = _Unpacked.apply(x, bias, partial(unpacked_4bit, weight.data, state, state.shape))  # type: ignore[no-untyped-call]
        else:
            result = bitsandbytes.matmul_4bit(x, weight, quant_state=state, bias=bias)
        return result.to(output)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4bit:
        storage = self.weight.dtype
        as_numbers = self.is_packed() and storage.is_floating_point and not is_sharded(self.weight)
        if as_numbers:
            # they would be cast
            self.weight.data = stored_as(self.weight.data, torch.uint8)
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            if as_numbers:
                self.weight.data = stored_as(self.weight.data, storage)
        self.link()
        return self


class Linear8bit(PackedLinear, bitsandbytes.nn.Linear8bitLt):
    """y = Wx + b with W in 8 bits and one scale a row, unpacked for each use; x stays in its dtype.

    As bitsandbytes' Linear8bitLt in names and attributes, but: it gives the same in training and in evaluation, where
    the original rounds x to 8 bits too; it loads what it saves; its scales move with it; its bias keeps its dtype.
    """

    def is_packed(self) -> bool:
        weight: Any = self._parameters["weight"]
        return bool(weight.dtype == torch.int8)

    def link(self) -> None:
        weight: Any = self._parameters["weight"]
        if not self.is_packed() or is_sharded(weight):
            return
        scales: Any = getattr(weight, "SCB", None)
        scales = self.state.SCB if scales is None else scales
        if not isinstance(weight, Int8Params):
            weight = self.weight = Int8Params(weight.data, requires_grad=False)
        moved = scales.to(weight.device)
        weight.CB, weight.SCB = weight.data, moved
        self.state.CB, self.state.SCB = None, moved

    def packed_from(self, given: Mapping[str, Tensor], device: torch.device, copy: bool) -> nn.Parameter:
        codes, scales = given["weight"], given.get("SCB")
        if scales is None:
            return packed_8bit(self.matrix_from(codes).to(device))
        shape = (self.out_features, self.in_features)
        if tuple(codes.shape) != shape or codes.dtype != torch.int8 or tuple(scales.shape) != shape[:1]:
            raise ValueError(
                f"is {tuple(codes.shape)} in {str(codes.dtype).removeprefix('torch.')} with {tuple(scales.shape)} "
                f"scales, and the layer is {shape} in int8 with {shape[:1]}"
            )
        data = codes.to(device, copy=copy)
        return Int8Params(data, requires_grad=False, CB=data, SCB=scales.to(device, torch.float32, copy=copy))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not self.is_packed():
            return F.linear(x, weight, self.bias)
        scales: Any = getattr(weight, "SCB", None)
        scales = self.state.SCB if scales is None else scales
        x, bias, _ = self.operands(x, None)
        result: Tensor = _Unpacked.apply(x, bias, partial(_unpacked_8bit, weight.data, scales))  # type: ignore[no-untyped-call]
        return result

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Linear._save_to_state_dict(self, destination, prefix, keep_vars)
        if self.is_packed():
            scales = cast(Tensor, self.state.SCB)
            destination[f"{prefix}SCB"] = scales if keep_vars else scales.detach()
            destination[f"{prefix}weight_format"] = torch.tensor(0, dtype=torch.uint8)  # by rows, bitsandbytes' only

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear8bit:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.link()
        return self


class _Unpacked(torch.autograd.Function):
    """Wx + b with a frozen W that `unpack` gives in a dtype, and gives again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, unpack: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.unpack = unpack
        return F.linear(x, unpack(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad @ ctx.unpack(grad.dtype) if needs_x else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if needs_bias else None
        return grad_x, grad_bias, None


def _unpacked_8bit(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    # a code is exact in any floating dtype, so that the product alone is rounded
    return codes.to(dtype).mul_(scales.unsqueeze(1) / 127)


def pack(module: nn.Module, config: Quantization, weight: Tensor | None = None, *, error_rank: int = 0) -> None:
    """Make a Linear or Conv1D a packed layer, in place: its class and weight change, all else stays.

    Args:
        module: exactly an nn.Linear or transformers' Conv1D; its own weight may be on the meta device if another is
            given.
        config: how to pack.
        weight: the dense weight as the layer stores it, (out, in) or for Conv1D (in, out), on the device where it is
            packed and stays; by default the layer's own.
        error_rank: above 0, as much of what is lost is kept beside the layer; see `keep_error`.
    """
    source = type(module)
    dense = cast(Tensor, module._parameters["weight"] if weight is None else weight).data
    matrix = dense.T if is_conv1d_class(source) else dense
    rows, columns = matrix.shape
    packed = packed_8bit(matrix) if config.type == "int8" else packed_4bit(matrix, Coding.of(config))
    vars(module).update(in_features=columns, out_features=rows, source_cls=source)
    if isinstance(packed, Int8Params):
        _become_8bit(module, packed)
    else:
        _become_4bit(module, packed, getattr(torch, config.compute_dtype) if config.compute_dtype else None)
    if error_rank and not matrix.is_meta:
        keep_error(module, matrix, error_rank)


def adopt(module: nn.Module, config: Quantization | None) -> None:
    """Make a layer of bitsandbytes one of ours, in place; one whose weight is not packed yet is.

    A subclass, or a layer that an adapter stands on, keeps its class, and is kept from being repacked.

    Args:
        module: a Linear4bit or Linear8bitLt.
        config: what it shall multiply in is taken from here; without, it stays as it was.
    """
    theirs: Any = module
    weight = theirs.weight
    vars(module).setdefault("source_cls", nn.Linear)
    if isinstance(module, PackedLinear):
        return
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        if type(module) is not bitsandbytes.nn.Linear8bitLt:
            return
        if weight.dtype != torch.int8:
            weight = packed_8bit(weight.data)
        elif getattr(weight, "SCB", None) is None:
            weight = Int8Params(weight.data, requires_grad=False, SCB=theirs.state.SCB)
        _become_8bit(module, weight)
        return
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        _undo_repacking(weight)
    theirs.support_avx512bf16_for_cpu = False
    if type(module) not in (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.LinearNF4, bitsandbytes.nn.LinearFP4):
        return
    if not weight.bnb_quantized:
        weight = packed_4bit(weight.data, Coding.like(weight))
    weight.module = None  # a copy of this layer would keep this one alive
    compute_dtype = theirs.compute_dtype
    if config is not None:
        # transformers says float32 where nobody chose
        compute_dtype = None if compute_dtype == torch.float32 else compute_dtype
        compute_dtype = getattr(torch, config.compute_dtype) if config.compute_dtype else compute_dtype
    _become_4bit(module, weight, compute_dtype)


def unpack(module: PackedLinear, dtype: torch.dtype) -> None:
    """Give a packed layer the class that it had before and a dense, frozen weight in `dtype`, in place."""
    dense, source = dense_weight(module, dtype=dtype), module.source_cls
    for name in (*THEIRS, "source_cls"):
        vars(module).pop(name, None)
    if is_conv1d_class(source):
        dense = dense.T.contiguous()
        vars(module).update(nf=vars(module).pop("out_features"), nx=vars(module).pop("in_features"))
    module._parameters["weight"] = nn.Parameter(dense, requires_grad=False)
    module.__class__ = source  # type: ignore[assignment]


def _become_4bit(module: nn.Module, weight: Params4bit, compute_dtype: torch.dtype | None) -> None:
    vars(module).update(
        compute_dtype=compute_dtype,
        compute_type_is_set=True,
        quant_storage=weight.quant_storage,
        support_avx512bf16_for_cpu=False,
    )
    module._parameters["weight"] = weight
    module.__class__ = Linear4bit
    cast(Linear4bit, module).link()


def _become_8bit(module: nn.Module, weight: Int8Params) -> None:
    state = bitsandbytes.MatmulLtState()
    state.has_fp16_weights = False
    vars(module).update(state=state, index=None)
    module._parameters["weight"] = weight
    module.__class__ = Linear8bit
    cast(Linear8bit, module).link()


def _undo_repacking(weight: Any) -> None:
    """Give a weight that was repacked for inference its codes again, and the scales that it has been run with.

    They were rounded to bfloat16, and bitsandbytes' inverse leaves them transposed; the function is its own, checked on
    0.50.2.
    """
    state = weight.quant_state
    scales = state.absmax.T.reshape(-1).float().contiguous()
    state.original_nested = False
    weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax, state.nested, state.state2, state.offset = scales, False, None, None
    weight.compress_statistics = False
