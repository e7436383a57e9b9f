"""Tensors that have a shape, a dtype and a storage, but no values: torch's fake tensors, and modules made of them.

Their module, that of dispatch modes and the engine of gradients are private to torch, and named here alone; checked on
torch 2.11 and 2.13.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import Metric

from lightning_peft.methods._quantized import packed

aten = torch.ops.aten
FROM_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
"""What torch raises where an operator's output depends on values."""
MADE = {aten.empty, aten.empty_strided, aten.full, aten.ones, aten.rand, aten.randn, aten.zeros}
SMALL = 2**12
"""Numbers up to which a tensor that is made of none is given values."""
RARE = {aten.any, aten.isinf, aten.isnan}
"""What asks for something that a step doesn't have as a rule."""
IS_RARE = "_planned_rare"


def fake_mode() -> FakeTensorMode:
    """The mode in which tensors are made without values, on the CPU; others that it meets are taken for their shape."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def make_fake(module: nn.Module) -> None:
    """Give `module` fake tensors on the CPU in place of all that it has, on whatever device, in place; to be called
    inside of `fake_mode`. What is tied stays tied. Metrics stand still."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = tensor, nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)][1]

    for part in module.modules():
        if isinstance(part, Metric):
            vars(part).update(forward=_nothing, update=_nothing, compute=_nothing)
            continue
        found = packed(part)
        if found is not None and isinstance(found.state, Tensor):
            cast(Any, part).state.SCB = fake(found.state)
        elif found is not None:
            vars(part)["quant_state"] = _fake_state(found.state, fake)
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is not None:
                setattr(part, name, fake(tensor))  # not in _parameters: a recurrent layer keeps a list of them beside
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                vars(part)[name] = fake(value)


def _fake_state(state: Any, fake: Any) -> Any:
    """A `QuantState` whose tensors are fake."""
    state = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, Tensor):
            setattr(state, name, fake(value))
    if getattr(state, "state2", None) is not None:
        state.state2 = _fake_state(state.state2, fake)
    return state


def _nothing(*_: Any, **__: Any) -> Tensor:
    return torch.zeros(())


def run(function: Any, args: Sequence[Any], kwargs: dict[str, Any], mode: FakeTensorMode) -> Any:
    """What an operator gives: with values where all that it is given has some, such as token ids and the masks and
    positions that are made of them, by which models choose what to do; without, where that is not so or much would be
    made. Where it depends on values that there are none of, what it gives for a batch without padding: masks hold
    everywhere, whatever is asked about all elements is true, and about any, or for NaN and infinity, is false."""
    chosen = _every_element(function, args)
    if chosen is not None:
        return chosen
    packet = function._overloadpacket
    try:
        if packet is aten.set_ and isinstance(args[0], FakeTensor):
            with _uncached(mode):
                return function(*args, **kwargs)
        with mode if _makes_much(packet, args, kwargs) else nullcontext():
            out = function(*args, **kwargs)
    except FROM_VALUES:
        return _guess(packet, args)
    if packet in RARE and isinstance(out, FakeTensor):
        setattr(out, IS_RARE, True)
    return out


def backward(loss: Tensor) -> None:
    """`loss.backward()`, in which a function mode stays in force; by the engine itself, since torch's functions leave
    the mode first, and blocks that are run again would be run without it."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _makes_much(packet: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    if packet not in MADE:
        return False
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return dtype.is_floating_point and math.prod(args[0]) > SMALL


@contextmanager
def _uncached(mode: FakeTensorMode) -> Iterator[None]:
    """Without the mode's cache, which would keep a storage that an operator is given alive."""
    mode.cache_enabled = False
    try:
        yield
    finally:
        mode.cache_enabled = True


def _every_element(function: Any, args: Sequence[Any]) -> Tensor | None:
    """The output of an operator that picks elements by a mask, for one that picks all of them; None for others."""
    packet = function._overloadpacket
    if packet is aten.nonzero and isinstance(args[0], FakeTensor):
        return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
    if packet is aten.masked_select and isinstance(args[0], FakeTensor):
        return args[0].new_empty(args[0].numel())
    if packet not in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        return None
    masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
    if not masks or len(args[1]) != 1:
        return None
    tensor, mask = args[0], masks[0]
    if not isinstance(tensor, FakeTensor):
        return None
    if packet is aten.index:
        count = mask.numel() if isinstance(mask, FakeTensor) else int(mask.sum())
        return tensor.new_empty((count, *tensor.shape[mask.dim() :]))
    return torch.empty_like(tensor) if packet is aten.index_put else tensor


def _guess(packet: Any, args: Sequence[Any]) -> Any:
    if packet is aten.equal:
        return True
    if packet is aten._local_scalar_dense:
        tensor: Tensor = args[0]
        if tensor.dtype == torch.bool:
            return not getattr(tensor, IS_RARE, False)
        return 1.0 if tensor.is_floating_point() else 1
    raise


__all__ = ["TorchDispatchMode", "backward", "fake_mode", "make_fake", "run"]
