"""One piece of a frozen base, sharded over ranks by torch's FSDP2, with all that trains left as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from lightning_peft.methods._host import record_outputs_of
from lightning_peft.methods._quantized import packed
from lightning_peft.methods._sharded import is_sharded
from lightning_peft.methods._targets import base_modules, is_conv1d, is_transformers_model
from lightning_peft.methods.errors import PEFTError
from lightning_peft.strategies.units import Unit

CAST_BY_AUTOCAST = (nn.Linear, nn.modules.conv._ConvNd)
GATHERED_IN = "_peft_gathered_in"
"""An attribute of a piece: the dtype that its weights are gathered in, where it is not their own."""
SHARDS_INTEGERS = Version(torch.__version__).release >= (2, 12)
"""Whether FSDP2 takes parameters of integers: torch 2.11's asks gradients of them."""


@dataclass(frozen=True)
class Sharding:
    """How pieces are sharded.

    Args:
        mesh: the ranks: of one dimension; or of two, where the first one's hold copies of each other's shards.
        autocast: what autocast computes in, where it is on.
        cpu_offload: keep the shards in the CPU's memory until they are gathered.
    """

    mesh: DeviceMesh
    autocast: torch.dtype | None = None
    cpu_offload: bool = False

    def shard(self, unit: Unit) -> None:
        """Keep this rank's part of the unit's weights, on the mesh's device; all else stays what and where it is."""
        for module, name in unit.weights:
            module._parameters[name] = _plain(cast(nn.Parameter, module._parameters[name]))
        sharded = {id(module._parameters[name]) for module, name in unit.weights}
        ignored = {parameter for parameter in unit.module.parameters() if id(parameter) not in sharded}
        offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if self.cpu_offload else OffloadPolicy()
        before, gathered_in = type(unit.module), self._cast(unit)
        fully_shard(
            unit.module,
            mesh=self.mesh,
            # said here, since a piece that is called by no other would otherwise stay gathered
            reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(param_dtype=gathered_in, cast_forward_inputs=False),
            offload_policy=offload,
            ignored_params=ignored,
        )
        record_outputs_of(before, type(unit.module))
        if gathered_in is not None:
            vars(unit.module)[GATHERED_IN] = gathered_in

    def _cast(self, unit: Unit) -> torch.dtype | None:
        """The dtype in which weights are gathered, where autocast would bring each of them to it anyway."""

        def is_cast(module: nn.Module, name: str) -> bool:
            weight = cast(Tensor, module._parameters[name])
            is_layer = isinstance(module, CAST_BY_AUTOCAST) or is_conv1d(module)
            return is_layer and weight.dtype == torch.float32 and packed(module, name) is None

        return self.autocast if all(is_cast(module, name) for module, name in unit.weights) else None


def move_whole(module: nn.Module, device: torch.device) -> None:
    """Move all that is not sharded to `device`. Shards are where they belong, which may be the CPU's memory."""
    if not any(is_sharded(parameter) for parameter in module.parameters()):
        module.to(device)
        return
    for child in module.children():
        move_whole(child, device)
    for parameter in module.parameters(recurse=False):
        if not is_sharded(parameter):
            parameter.data = parameter.data.to(device)
    for name, buffer in module._buffers.items():
        module._buffers[name] = buffer if buffer is None else buffer.to(device)


def is_prepared(model: nn.Module) -> bool:
    """Whether some module of `model` is one of FSDP2's."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def check_dtype(model: nn.Module, autocast: torch.dtype | None, precision: str) -> None:
    """Refuse a model that an earlier run sharded to be gathered in another dtype than autocast computes in.

    Args:
        model: the model.
        autocast: what autocast computes in; None where it is off.
        precision: the Trainer's.

    Raises:
        PEFTError: it was sharded so.
    """
    gathered_in = {vars(module)[GATHERED_IN] for module in model.modules() if GATHERED_IN in vars(module)}
    if gathered_in - {autocast}:
        (dtype,) = gathered_in
        raise PEFTError(
            f"precision: {precision!r} can't be, since an earlier run sharded the module so that its weights are "
            f"gathered in {dtype_name(dtype)}; go on with that run's precision, or build the module anew"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """Such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def tell_transformers(model: nn.Module) -> None:
    """Let `generate` go on on every rank until the last one has ended, since all take part in each forward.

    transformers asks for this attribute, which FSDP2 sets on what is sharded itself; checked on 5.23.
    """
    for _, module in base_modules(model):
        if is_transformers_model(module):
            vars(module)["_is_fsdp_managed_module"] = True


def begin_together(model: nn.Module) -> None:
    """Settle which module's forward begins a pass over those in it, before any of them is called by itself."""
    # the outermost come first, and what is in them then has nothing left to do
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # private, and done by the first forward otherwise, which may be an inner one's: checked on torch 2.13
            cast(Any, module)._get_fsdp_state()._lazy_init()


def _plain(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of its own, contiguous; a packed weight's codes, whose layer keeps the scales. One that tensor
    parallelism has split stays as it is.

    Raises:
        PEFTError: it holds 8-bit codes, and torch can't shard them.
    """
    if is_sharded(parameter):
        return parameter
    is_number = parameter.dtype.is_floating_point or SHARDS_INTEGERS
    if type(parameter) is nn.Parameter and parameter.is_contiguous() and is_number:
        return parameter
    data = parameter.data.as_subclass(Tensor).contiguous()
    if not is_number:
        if data.dtype != torch.uint8 or data.numel() % 2:
            raise PEFTError(
                f"peft_fsdp: torch {torch.__version__} can't shard these codes; quantize to 4 bits, or take torch 2.12"
            )
        data = data.view(-1).view(torch.bfloat16).view(-1, 1)  # the same bytes: layers read codes of any dtype
    return nn.Parameter(data, requires_grad=False)
