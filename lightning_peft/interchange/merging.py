"""Fold adapters into the weights that they stand on, and take them out again."""

from __future__ import annotations

from typing import TypeVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_peft.methods._host import active, hosts, own_tensors
from lightning_peft.methods._targets import base_modules
from lightning_peft.methods.errors import PEFTError

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def merge(model: M) -> M:
    """Fold the active adapter into the base's weights: the model computes the same without the adapter's cost.

    The sum is taken in fp32 and stored in the base's dtype. A weight is replaced, and its original kept for `unmerge`,
    so that a tensor tied to it keeps its value (and is not tied to it until `unmerge`).

    Returns:
        The same object.

    Raises:
        PEFTError: there is nothing to merge, or it is merged already.
    """
    targets = [(path, host, adapter) for path, host in hosts(model) if (adapter := active(host)) is not None]
    if not targets:
        merged = any(host.merged_from for _, host in hosts(model))
        raise PEFTError(f"merge: {'it is merged already' if merged else 'no active adapter stands on the model'}")
    # all are computed before any is stored, so that a fault leaves the model as it was
    results = [(path, host, adapter.merged(host)) for path, host, adapter in targets]
    replaced = {(id(host), name) for _, host, tensors in results for name in tensors}
    kept: dict[int, set[str]] = {}
    for path, module in base_modules(model):
        for name, tensor in own_tensors(module).items():
            if (id(module), name) not in replaced:
                kept.setdefault(id(tensor), set()).add(f"{path}.{name}" if path else name)
    for path, host, tensors in results:
        originals = {}
        for name, value in tensors.items():
            original = own_tensors(host)[name]
            if untied := kept.get(id(original)):
                rank_zero_warn(
                    f"merge: {path}.{name} is not tied to {', '.join(sorted(untied))} any more, until unmerge"
                )
            new = value.to(original.dtype).contiguous().clone()
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
