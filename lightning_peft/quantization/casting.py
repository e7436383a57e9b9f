"""The base in a lower precision: which of its tensors, and how an input of another precision meets them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_peft.methods._host import own_tensors
from lightning_peft.methods._quantized import packed
from lightning_peft.methods._targets import base_modules, inside, is_conv1d, matches
from lightning_peft.methods.errors import PEFTError, suggestion

M = TypeVar("M", bound=nn.Module)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HALF = (torch.bfloat16, torch.float16)
FREQUENCIES = ("inv_freq", "original_inv_freq")
"""Buffers of rotary embeddings: positions are multiplied by them, and 8 bits would misplace the far ones."""
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def base_dtype_of(name: str | torch.dtype) -> torch.dtype:
    """The dtype that `base_dtype` names.

    Raises:
        PEFTError: it names none that a base can have.
    """
    known = DTYPES.get(str(name).removeprefix("torch."))
    if known is None:
        raise PEFTError(f"base_dtype: {str(name)!r} is none of {', '.join(DTYPES)}{suggestion(str(name), DTYPES)}")
    return known


@torch.no_grad()
def cast_base(model: M, dtype: torch.dtype, *, skip: Sequence[str] = ()) -> M:
    """Bring the floating-point parameters and buffers of `model` to `dtype`, in place and one at a time.

    Parameters stay the same objects, and so stay tied. Left as they are: adapters, packed weights, and where `dtype`
    has 16 bits what needs more: a normalization with running statistics, the frequencies of rotary embeddings, and what
    a transformers model declares (`_keep_in_fp32_modules` for float16, `_keep_in_fp32_modules_strict` for both).

    A layer whose weight has 16 bits gets a forward pre-hook, which casts a floating-point input of another dtype: an
    image in fp32, say. The copy has the size of that input in 16 bits, and the layer then works in 16 bits and keeps
    the copy alone. An input that has the weight's dtype costs nothing. Under autocast that is autocast's work, but for
    normalizations, which it hands on as they are on a CPU.

    Args:
        model: any module, on any device, meta included.
        dtype: of the frozen tensors.
        skip: names or path endings of modules to leave as they are, with all that is in them.

    Returns:
        The same object.
    """
    modules = dict(base_modules(model))
    left = {id(tensor) for tensor in _left(modules, skip, dtype)}
    for module in modules.values():
        for tensor in own_tensors(module).values():
            if id(tensor) not in left and tensor.is_floating_point() and tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # cuDNN wants them in one piece
        if dtype in HALF and _needs_hook(module):
            module.register_forward_pre_hook(CastInputs(dtype), with_kwargs=True)
    return model


class CastInputs:
    """A forward pre-hook that gives a layer its floating-point inputs in its weight's dtype.

    Args:
        dtype: of the inputs of a layer whose weight is packed.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        weight = next(parameter for parameter in module._parameters.values() if parameter is not None)
        # of a packed or sharded weight the dtype says nothing
        dtype = weight.dtype if type(weight) is nn.Parameter and weight.is_floating_point() else self.dtype
        if not any(_differs(value, dtype) for value in (*args, *kwargs.values())):
            return None
        if not isinstance(module, NORMS) and torch.is_autocast_enabled(weight.device.type):
            return None
        return _cast(args, dtype), {name: _cast(value, dtype) for name, value in kwargs.items()}


def _needs_hook(module: nn.Module) -> bool:
    """Whether it is a layer that takes inputs in its weight's dtype alone, and nothing casts them yet."""
    is_layer = isinstance(module, (*LAYERS, *NORMS)) or is_conv1d(module)
    has_weight = any(parameter is not None for parameter in module._parameters.values())
    return is_layer and has_weight and not any(type(hook) is CastInputs for hook in module._forward_pre_hooks.values())


def _differs(value: Any, dtype: torch.dtype) -> bool:
    if isinstance(value, Tensor):
        return value.dtype != dtype and value.is_floating_point()
    return type(value) is tuple and any(_differs(item, dtype) for item in value)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if _differs(value, dtype):
        return value.to(dtype) if isinstance(value, Tensor) else tuple(_cast(item, dtype) for item in value)
    return value


def _left(modules: Mapping[str, nn.Module], skip: Sequence[str], dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensors that are left as they are, whatever other name they have."""
    skipped = {path for path in modules if path and matches(path, skip)}
    for path, module in modules.items():
        own = own_tensors(module)
        if inside(path, skipped) or (dtype in HALF and "running_mean" in own):
            yield from own.values()
        for name, tensor in own.items():
            if packed(module, name) is not None or (dtype in HALF and name in FREQUENCIES):
                yield tensor
        yield from _declared(module, dtype)


def _declared(model: nn.Module, dtype: torch.dtype) -> Iterator[Tensor]:
    """What a transformers model keeps in fp32: the tensors in whose names one of its patterns is found.

    The two attributes, and how their patterns are read, are transformers' own; checked on 5.23.
    """
    fields = {torch.float16: ("_keep_in_fp32_modules",), torch.bfloat16: ()}.get(dtype)
    if fields is None:
        return
    names = (*fields, "_keep_in_fp32_modules_strict")
    patterns = [
        re.compile(pattern.replace("*", ".*")) for name in names for pattern in getattr(model, name, None) or ()
    ]
    for path, module in base_modules(model) if patterns else ():
        for name, tensor in own_tensors(module).items():
            if any(pattern.search(f"{path}.{name}") for pattern in patterns):
                yield tensor
