"""Tensor parallelism beside FSDP2: layers that the module's own code has split over the mesh's second dimension.

The ranks of one tensor-parallel group compute one batch together. Adapters are whole on each, as everywhere, and their
gradients leave the backward pass whole (see `methods._split`), so that nothing else has to know of the split: averages
over all ranks are averages over the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_peft.methods._sharded import is_sharded
from lightning_peft.methods.errors import PEFTError
from lightning_peft.state import rng_state, set_rng_state

DATA, TENSOR = "data_parallel", "tensor_parallel"
"""What Lightning calls the dimensions of its mesh."""
UNEQUAL = 1e-2
"""Relative difference of a gradient's size between ranks from which it is no rounding."""


def is_split(tensor: Tensor) -> bool:
    """Whether tensor parallelism alone divides it."""
    return is_sharded(tensor) and cast(DTensor, tensor).device_mesh.mesh_dim_names == (TENSOR,)


def check_split(model: nn.Module, mesh: DeviceMesh, *, loads: bool) -> None:
    """Refuse a model that is distributed in another way than by the mesh's second dimension.

    Args:
        model: configured, without adapters.
        mesh: of Lightning, of both dimensions.
        loads: whether its base is to be quantized or read from a file, which has to come before.

    Raises:
        PEFTError: it is.
    """
    split = {name: tensor for name, tensor in model.named_parameters() if is_sharded(tensor)}
    if split and loads:
        raise PEFTError(
            f"quantization, base_weights: {next(iter(split))} is split by tensor parallelism, and can't be quantized "
            "or read from a file then; leave them out, or tensor_parallel_size"
        )
    for name, tensor in split.items():
        if cast(DTensor, tensor).device_mesh != mesh[TENSOR]:
            raise PEFTError(
                f"{name} is distributed over {cast(DTensor, tensor).device_mesh}, which is not the strategy's; leave "
                "fully_shard and transformers' tp_plan out, and in configure_model call "
                f"parallelize_module(…, self.device_mesh[{TENSOR!r}], …)"
            )
    if not split and mesh[TENSOR].size() > 1:
        raise PEFTError(
            f"PEFTFSDPStrategy.tensor_parallel_size: {mesh[TENSOR].size()}, but {type(model).__name__} has no split "
            f"layer; in its configure_model, call parallelize_module(…, self.device_mesh[{TENSOR!r}], …)"
        )


def same_random_numbers(mesh: DeviceMesh) -> None:
    """Let the ranks of a tensor-parallel group draw the same numbers from here on, the first one's."""
    if mesh[TENSOR].size() == 1:
        return
    group = mesh[TENSOR].get_group()
    states = [rng_state()]
    dist.broadcast_object_list(states, group=group, group_src=0)
    set_rng_state(states[0])


@torch.no_grad()
def check_gradients(trained: Mapping[str, nn.Parameter], mesh: DeviceMesh) -> None:
    """Refuse gradients that the ranks of a tensor-parallel group have different ones of; every rank has to call it.

    A module that is not split is taken for one that sees the same on all of them. One that computes with some heads or
    tokens alone would have a part of its gradient.

    Raises:
        PEFTError: on every rank: there are such gradients.
    """
    sizes = [0.0 if p.grad is None else float(torch.linalg.vector_norm(p.grad)) for p in trained.values()]
    of_ranks: list[list[float]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, sizes)
    for group in mesh.mesh.tolist():
        for name, *values in zip(trained, *(of_ranks[rank] for rank in group), strict=True):
            if max(values) - min(values) > UNEQUAL * max(values):
                raise PEFTError(
                    f"{name} has a gradient of size {', '.join(f'{value:.3g}' for value in values)} on the ranks of a "
                    "tensor-parallel group: its module is not split, but sees a part of the heads or tokens on each; "
                    "leave it out (exclude_modules)"
                )
