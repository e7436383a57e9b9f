"""Layers that tensor parallelism has split: each process computes some of a layer's outputs (Colwise), or a summand of
all of them from some of its inputs (Rowwise).

Adapters stay whole on each, and act on the part that is here: what belongs to it is sliced out of their tensors, and
gradients are summed over the processes before an adapter's tensor gets them, so that it has all of its gradient
everywhere. Source of the split: Megatron-LM, arXiv 1909.08053, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_peft.methods._host import Adapter, own_tensors
from lightning_peft.methods._low_rank import dropout_seed, dropped, linear_update
from lightning_peft.methods._sharded import is_sharded
from lightning_peft.methods.errors import PEFTError, some

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

WHOLE, SLICE, SUMMAND = "whole", "slice", "summand"


def split_faults(method: str, adapters: Iterable[tuple[str, nn.Module, Adapter]]) -> list[str]:
    """What of `method` can't stand on modules that are split, or have split layers in them; empty where all can.

    Args:
        method: its name, for the message.
        adapters: paths, modules, and the adapters made for them.
    """
    refused = [path for path, module, adapter in adapters if not _stands(module, adapter)]
    if not refused:
        return []
    return [
        f"{method}: its adapters need whole layers, and {some(refused, 1)} are split by tensor parallelism; leave them "
        "out (exclude_modules), or out of the plan of parallelize_module, or use LoRA"
    ]


def _stands(module: nn.Module, adapter: Adapter) -> bool:
    if any(is_sharded(tensor) for tensor in own_tensors(module).values()):
        return adapter.on_split and isinstance(module, nn.Linear)
    return adapter.around_split or not any(is_sharded(parameter) for parameter in module.parameters())


def update_of_part(y: Tensor, x: Tensor, A: Tensor, B: Tensor, *, scale: float, p: float, training: bool) -> Tensor:
    """`linear_update` of a split Linear.

    Args:
        y: DTensor (…, out), the frozen layer's output: a slice of its last dimension, or a summand.
        x: DTensor (…, in), the layer's input: whole, or a slice of its last dimension.
        A: (r, in), whole. B: (out, r), whole.
        scale: as in `linear_update`.
        p: as in `linear_update`.
        training: as in `linear_update`.

    Raises:
        PEFTError: x and y are divided in another way.
    """
    given, made = Part(x), Part(y)
    if (given.kind, made.kind) not in ((WHOLE, SLICE), (SLICE, SUMMAND)):
        raise PEFTError(
            f"a split layer is given {given} and gives {made}; adapters know torch's ColwiseParallel and "
            "RowwiseParallel alone"
        )
    A, B = whole_gradients(given.group, A, B)
    if given.kind == SLICE:
        # every process draws the same seed, and drops of another part of the input
        seed = dropout_seed(p, training)
        local = dropped(given.local(), p, None if seed is None else seed + given.rank)
        return made.again(linear_update(made.local(), local, given.slice(A), B, scale=scale, p=0.0, training=training))
    local = given.local(summed=True)
    return made.again(linear_update(made.local(), local, A, made.slice(B, 0), scale=scale, p=p, training=training))


class Part:
    """This process's part of a DTensor over the processes of one dimension of a mesh.

    Args:
        tensor: the DTensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = cast("DTensor", tensor)
        (placement,) = self._tensor.placements
        kinds = {WHOLE: placement.is_replicate(), SUMMAND: placement.is_partial()}
        kinds[SLICE] = placement.is_shard(tensor.dim() - 1)
        self.kind = next((kind for kind, is_so in kinds.items() if is_so), None)
        """How it is divided: not at all, along its last dimension, or into summands; None is in another way."""
        self.rank, self.count = self._tensor.device_mesh.get_local_rank(), self._tensor.device_mesh.size()

    @property
    def group(self) -> Any:
        """The processes."""
        return self._tensor.device_mesh.get_group()

    def local(self, *, summed: bool = False) -> Tensor:
        """The tensor that is here.

        Args:
            summed: each process has a summand of the gradient of what is here whole.
        """
        from torch.distributed.tensor import Partial, Replicate

        placements = self._tensor.placements if self.kind == SLICE else [Partial() if summed else Replicate()]
        return self._tensor.to_local(grad_placements=placements)

    def slice(self, tensor: Tensor, dim: int = -1) -> Tensor:
        """What of a dimension of a whole tensor belongs to this slice."""
        size = tensor.shape[dim]
        # as DTensor divides: equal parts, but for the last ones
        step = -(-size // self.count)
        start = min(self.rank * step, size)
        return tensor.narrow(dim, start, min(step, size - start))

    def of(self, tensor: Tensor) -> Tensor:
        """What of a whole, trained tensor (features,) belongs to this part."""
        if self.kind == WHOLE:
            return tensor
        (tensor,) = whole_gradients(self.group, tensor)
        return self.slice(tensor) if self.kind == SLICE else tensor

    def again(self, local: Tensor) -> Tensor:
        """A DTensor that is divided as this one, of other values."""
        from torch.distributed.tensor import DTensor

        ours = self._tensor
        shape: Any = {"shape": ours.shape, "stride": ours.stride()}
        return DTensor.from_local(local.contiguous(), ours.device_mesh, ours.placements, run_check=False, **shape)

    def __str__(self) -> str:
        return f"{tuple(self._tensor.shape)} as {self._tensor.placements[0]}"


def on_whole(output: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """What `change` makes of a layer's output, for which the whole of one that is split is put together."""
    if not is_sharded(output):
        return change(output)
    from torch.distributed.tensor import DTensor, Replicate

    mesh = cast("DTensor", output).device_mesh
    return DTensor.from_local(change(whole(output)), mesh, [Replicate()], run_check=False)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be split, for every process to compute the same with it."""
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    return cast("DTensor", tensor).redistribute(placements=[Replicate()]).to_local()


def whole_gradients(group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as they are; their gradients are summed over the processes, by one all-reduce.

    Args:
        group: the processes.
        tensors: of one dtype, the same on all of them.
    """
    return cast("tuple[Tensor, ...]", _WholeGradients.apply(group, *tensors))  # type: ignore[no-untyped-call]


class _WholeGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        sent = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(sent, group=ctx.group)
        sums = torch.split(sent, [gradient.numel() for gradient in gradients])
        return None, *(total.view(gradient.shape) for total, gradient in zip(sums, gradients, strict=True))
