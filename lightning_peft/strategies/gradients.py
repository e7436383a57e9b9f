"""What every rank holds whole: made equal as training starts, and kept so by equal gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


@torch.no_grad()
def make_equal(tensors: Iterable[Tensor]) -> None:
    """Give every rank the first one's values, in place, by one broadcast for each dtype; every rank has to call it.

    Args:
        tensors: of the same shapes on every rank, on the devices that the process group sends from.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor.detach())
    for group in by_dtype.values():
        sent = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.broadcast(sent, 0)
        for tensor, values in zip(group, torch.split(sent, [tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(values.view_as(tensor))


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every rank the mean of all ranks' gradients, by one all-reduce for each dtype; every rank has to call it.

    A parameter that no rank has a gradient of keeps none; where some ranks have none, theirs counts as zero. To average
    twice does no harm: equal gradients stay what they are, and what was added since is averaged.

    Args:
        parameters: the same on every rank, on the devices that the process group sends from.
    """
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for group in by_dtype.values():
        has = [parameter.grad is not None for parameter in group]
        flags = torch.tensor(has, dtype=group[0].dtype, device=group[0].device)
        grads = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in group]
        sizes = [grad.numel() for grad in grads]
        # divided before it is summed: a loss that is scaled for 16 bits may be near the largest number
        sent = torch.cat([flags, *(grad.reshape(-1) for grad in grads)]).div_(dist.get_world_size())
        dist.all_reduce(sent)
        used, *means = torch.split(sent, [len(group), *sizes])
        torch._foreach_copy_(grads, [mean.view_as(grad) for mean, grad in zip(means, grads, strict=True)])
        if not all(has):
            # only here does the host wait for the device
            for parameter, grad, is_used in zip(group, grads, (used > 0).tolist(), strict=True):
                if parameter.grad is None and is_used:
                    parameter.grad = grad
