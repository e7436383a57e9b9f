"""Fold adapters into the weights that they stand on, and take them out again."""

from __future__ import annotations

from collections import Counter
from typing import TypeVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_peft.methods._host import Adapter, Host, active, hosts, own_tensors
from lightning_peft.methods._quantized import packed
from lightning_peft.methods._sharded import ON_ONE, refuse_sharded
from lightning_peft.methods._targets import base_modules
from lightning_peft.methods.errors import PEFTError

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def merge(model: M, *, dtype: torch.dtype | None = None) -> M:
    """Fold the active adapter into the base's weights: the model computes the same without the adapter's cost.

    The sum is taken in fp32 and stored in the base's dtype. A weight is replaced, and its original kept for `unmerge`,
    so that a tensor tied to it keeps its value (and is not tied to it until `unmerge`). A quantized weight is unpacked
    for it and stays dense until `unmerge`: packed again, it would lose as much as the adapter may have learned.

    Args:
        model: a model with adapters.
        dtype: of the layers whose weight was quantized; by default that of most of the base that is not.

    Returns:
        The same object.

    Raises:
        PEFTError: there is nothing to merge, it is merged already, the base is sharded, or `dtype` is no floating-point
            dtype.
    """
    refuse_sharded(model, "merge", ON_ONE)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise PEFTError(f"merge: dtype {dtype!r} is no floating-point dtype; give one such as torch.bfloat16")
    targets = [(path, host, adapter) for path, host in hosts(model) if (adapter := active(host)) is not None]
    if not targets:
        merged = any(host.merged_from for _, host in hosts(model))
        raise PEFTError(f"merge: {'it is merged already' if merged else 'no active adapter stands on the model'}")
    dense_dtype = dtype or dense_dtype_of(model)
    # all are computed before any is stored, so that a fault leaves the model as it was
    results = [(path, host, _merged(host, adapter, dense_dtype)) for path, host, adapter in targets]
    replaced = {(id(host), name) for _, host, tensors in results for name in tensors}
    kept: dict[int, set[str]] = {}
    for path, module in base_modules(model):
        for name, tensor in own_tensors(module).items():
            if (id(module), name) not in replaced:
                kept.setdefault(id(tensor), set()).add(f"{path}.{name}" if path else name)
    for path, host, tensors in results:
        originals = {}
        for name, new in tensors.items():
            original = own_tensors(host)[name]
            if untied := kept.get(id(original)):
                rank_zero_warn(
                    f"merge: {path}.{name} is not tied to {', '.join(sorted(untied))} any more, until unmerge"
                )
            if isinstance(original, nn.Parameter):
                host._parameters[name] = nn.Parameter(new, requires_grad=False)
            else:
                host._buffers[name] = new
            originals[name] = original
        host.merged_from = originals
    return model


def unmerge(model: M) -> M:
    """Undo `merge`: the base's weights are the ones from before, bit for bit.

    Returns:
        The same object; one that is not merged is left as it is.
    """
    for _, host in hosts(model):
        host.restore_merged()
    return model


def dense_dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that a quantized weight of `model` gets when it is unpacked: the one that most of the base's
    floating-point numbers have which are not quantized, or, where all are, the one that was packed."""
    counts: Counter[torch.dtype] = Counter()
    before: Counter[torch.dtype] = Counter()
    for _, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if (found := packed(module, name)) is not None:
                before[found.dtype or torch.float32] += 1
            elif parameter.is_floating_point():
                counts[parameter.dtype] += parameter.numel()
    most = (counts or before).most_common(1)
    return most[0][0] if most else torch.float32


def _merged(host: Host, adapter: Adapter, dense_dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that take the place of the module's own, in the dtypes that they will have there."""
    own, tensors = own_tensors(host), adapter.merged(host)
    if not any(packed(host, name) for name in tensors):
        return {name: value.to(own[name].dtype).contiguous().clone() for name, value in tensors.items()}
    # a dense layer multiplies and adds in one dtype
    bias = own.get("bias")
    tensors = tensors if bias is None else {"bias": bias, **tensors}
    return {name: value.to(dense_dtype).contiguous().clone() for name, value in tensors.items()}
