"""What no optimizer moves: the tensors that are the same on every process, and in no checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lightning_peft.methods._host import own_tensors
from lightning_peft.methods._quantized import packed
from lightning_peft.methods._targets import base_modules


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The base's parameters that require no gradient and its buffers, by name, with the scales of packed weights.

    All that is in adapters is left out, trained or not. One that has several names comes once.
    """
    seen = set[int]()
    found = {}
    for path, module in base_modules(model):
        for name, tensor in (*own_tensors(module).items(), *packed_scales(module)):
            if not tensor.requires_grad and id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{path}.{name}" if path else name] = tensor
    return found


def frozen_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those of `frozen_tensors` that are buffers."""
    buffers = {id(buffer) for buffer in model.buffers()}
    return {name: tensor for name, tensor in frozen_tensors(model).items() if id(tensor) in buffers}


def packed_scales(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What stands beside a packed weight's codes: 8-bit scales, or the tensors of a 4-bit weight's state."""
    weight = packed(module)
    if weight is None:
        return
    if isinstance(weight.state, Tensor):
        yield "weight.SCB", weight.state
        return
    for label, part in (("quant_state", weight.state), ("quant_state.state2", weight.state.state2)):
        for name, value in vars(part).items() if part is not None else ():
            if isinstance(value, Tensor):
                yield f"weight.{label}.{name}", value
