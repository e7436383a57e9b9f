"""`peft_fsdp`: the frozen base is sharded over ranks by torch's FSDP2, and what trains is whole on each."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from lightning_peft.injection import records, trainable_parameters
from lightning_peft.methods._sharded import is_sharded
from lightning_peft.methods.errors import PEFTError
from lightning_peft.state import expanded, frozen_tensors, keep_sample, save_folder
from lightning_peft.strategies.agreement import agree_on_base, everyones, faults_told
from lightning_peft.strategies.buffers import KeepsBuffersEqual, MovingBuffers
from lightning_peft.strategies.ddp import tell_of_lost_ranks
from lightning_peft.strategies.gradients import average_gradients, make_equal
from lightning_peft.strategies.sharding import (
    Sharding,
    begin_together,
    check_dtype,
    dtype_name,
    is_prepared,
    move_whole,
    tell_transformers,
)
from lightning_peft.strategies.tensor_parallel import check_gradients, is_split, same_random_numbers
from lightning_peft.strategies.units import Unit, find_units

OTHER_DTYPE = "same dtype|should be the same"
"""What torch says of a matrix product, or a convolution, of two dtypes."""
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class PEFTFSDPStrategy(KeepsBuffersEqual, ModelParallelStrategy):
    """FSDP2 for the frozen base alone: `strategy="peft_fsdp"`.

    Each rank keeps its part of the base's matrices and gathers those of one block at a time. What trains is whole on
    every rank, and its gradients are averaged by one all-reduce a step; under manual optimization, after each backward
    pass as well. Adapters are small beside the base; so they, their optimizer's state and their checkpoints are as
    under any other strategy, on any number of ranks. To shard them with their block was measured, too (LoRA of rank 16
    and 64 on 8 blocks, two ranks of gloo, by tests/strategies/whole_or_sharded.py): it sends 8% and 30% more, in 8
    collectives in place of one, and a step takes 1.1 to 1.6 times as long. A module stays sharded after a run, for a
    later one, which has to be of the same precision where that is 16-mixed or bf16-mixed.

    Args:
        replicas: how many times the base is held: 1 shards it over all ranks; with as many as there are nodes, weights
            are gathered within a node alone (HSDP).
        shard: names or path endings of the modules to shard, where those that are found don't fit: the blocks, or the
            list of them, and others that are called as modules.
        cpu_offload: keep the shards in the CPU's memory until they are gathered.
        sync_base: where the ranks' bases differ in values, broadcast those tensors from the first rank, rather than
            raise an error.
        tensor_parallel_size: over how many ranks the module splits layers itself: its `configure_model` calls torch's
            `parallelize_module(…, self.device_mesh["tensor_parallel"], …)` with ColwiseParallel and RowwiseParallel,
            once. Adapters then stand on split layers, and are whole on each rank; not every method's can. The base is
            sharded over the other ranks, `data_parallel`.
        save_distributed_checkpoint: write a checkpoint as a folder, of which every rank writes a share
            (torch.distributed.checkpoint), on a file system that all ranks share. It is read as the one file is, by any
            strategy on any number of ranks; for adapters of some MB a file is as fast.
        process_group_backend: as in Lightning's ModelParallelStrategy.
        timeout: as in Lightning's ModelParallelStrategy.

    Raises:
        PEFTError: the sizes can't be; or as training or another run starts, on every rank: the ranks' bases differ, or
            there is nothing to shard.
    """

    strategy_name = "peft_fsdp"

    def __init__(
        self,
        *,
        replicas: int = 1,
        shard: Sequence[str] = (),
        cpu_offload: bool = False,
        sync_base: bool = False,
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        sizes = {"replicas": (replicas, "copies"), "tensor_parallel_size": (tensor_parallel_size, "ranks")}
        faults = [
            f"PEFTFSDPStrategy.{name}: {size} is no number of {what}; it must be 1 or more"
            for name, (size, what) in sizes.items()
            if size < 1
        ]
        if replicas > 1 and tensor_parallel_size > 1:
            faults.append(
                f"PEFTFSDPStrategy.replicas: {replicas} copies can't be had of layers that are split too "
                f"(tensor_parallel_size: {tensor_parallel_size}); leave out either of both"
            )
        if faults:
            raise PEFTError(faults)
        super().__init__(
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.replicas, self.names, self.cpu_offload, self.sync_base = replicas, shard, cpu_offload, sync_base
        self.split_over = tensor_parallel_size
        self._are_gradients_checked = tensor_parallel_size == 1
        self._batches_predicted = 0
        self._again: Counter[int] = Counter()
        """How often the last of so many batches is predicted again."""

    def setup_environment(self) -> None:
        """Start the process group, with the ranks in a data-parallel and a tensor-parallel dimension.

        Raises:
            PEFTError: the ranks can't be divided so.
        """
        world = self.num_nodes * self.num_processes
        if world % self.replicas:
            raise PEFTError(f"PEFTFSDPStrategy.replicas: {world} ranks can't be divided into {self.replicas} groups")
        if world % self.split_over:
            raise PEFTError(
                f"PEFTFSDPStrategy.tensor_parallel_size: {world} ranks can't be divided into groups of "
                f"{self.split_over}"
            )
        self._data_parallel_size = world // self.split_over
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Shard the base, and set up the optimizers over what trains.

        Raises:
            PEFTError: nothing was injected, the base has no weights yet, or it differs between ranks.
        """
        assert self.lightning_module is not None
        with faults_told():
            _check(self.lightning_module)
            check_dtype(self.lightning_module, self._autocast, str(self.precision_plugin.precision))
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            # FSDP2 would allocate what it gathers into as inference tensors, which no later run could train with
            loop.inference_mode = False
        same_random_numbers(self.device_mesh)
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Move, compare and shard one piece of the base after the other, and move the rest."""
        module = self.lightning_module
        assert module is not None
        if not is_prepared(module):
            with faults_told():
                units = find_units(module, self.names)
                if not units:
                    raise PEFTError(
                        f"peft_fsdp: {type(module).__name__} has no frozen matrix to shard; use strategy='peft_ddp'"
                    )
            for unit in units:
                self._shard(unit)
        begin_together(module)
        tell_transformers(module)
        move_whole(module, self.root_device)
        # which `module.to` does, too; private, checked on lightning 2.6.6
        _update_properties(module, device=self.root_device)
        self._agree(module, "")
        frozen = {id(tensor) for tensor in frozen_tensors(module).values()}
        make_equal(tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in frozen)
        self.buffers = MovingBuffers(module)

    def on_train_start(self) -> None:
        """The ranks that compute one batch together draw the same random numbers, whatever a checkpoint restored."""
        super().on_train_start()
        same_random_numbers(self.device_mesh)

    def pieces(self, module: pl.LightningModule, whole: Container[str]) -> dict[str, Callable[[], None]]:
        """How to shard a base that is yet to be loaded, so that no rank ever has all of it: see `load_base`.

        Args:
            module: on the meta device, without adapters; all of it is frozen.
            whole: paths of modules that are to be copied, and so stay as they are.

        Returns:
            By paths of modules, inner ones first: what to call as soon as all in one is loaded.
        """
        module.requires_grad_(False)
        return {unit.path: partial(self._shard, unit) for unit in find_units(module, self.names, whole)}

    def _shard(self, unit: Unit) -> None:
        if unit.weights:
            move_whole(unit.module, self.root_device)
            self._agree(unit.module, f"{unit.path}.")
        for owner, name in unit.weights:
            keep_sample(owner, name)
        self._sharding.shard(unit)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Step on the mean of the ranks' gradients, which is taken before they are unscaled, clipped or logged."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

        def averaged() -> Any:
            result = closure()
            self._average(parameters)
            return result

        return super().optimizer_step(optimizer, averaged, model, **kwargs)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Under manual optimization, take the mean of the ranks' gradients here: the module may clip them before it
        steps, and step past this strategy."""
        super().post_backward(closure_loss)
        module = cast(pl.LightningModule, self.lightning_module)
        if not module.automatic_optimization:
            self._average(trainable_parameters(module).values())

    def _average(self, parameters: Iterable[nn.Parameter]) -> None:
        if not self._are_gradients_checked:
            check_gradients(trainable_parameters(cast(nn.Module, self.lightning_module)), self.device_mesh)
            self._are_gradients_checked = True
        average_gradients(parameters)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own. A rank with fewer batches than others runs its last one again, without effect, as often as
        they wait for its part of the weights."""
        result = super().predict_step(*args, **kwargs)
        self._batches_predicted += 1
        for _ in range(self._again[self._batches_predicted]):
            super().predict_step(*args, **kwargs)
        return result

    def on_predict_start(self) -> None:
        """Tell each other how many batches there are of each loader."""
        super().on_predict_start()
        assert self.lightning_module is not None
        own = [int(count) if count != math.inf else 0 for count in self.lightning_module.trainer.num_predict_batches]
        most = map(max, zip(*everyones(own), strict=True))
        self._batches_predicted, self._again = 0, Counter()
        # loaders come one after the other
        for end, here, longest in zip(accumulate(own), own, most, strict=True):
            self._again[end] += longest - here

    def on_exception(self, exception: BaseException) -> None:
        """Say what to do where another rank is gone, and where a sharded weight was read without a call."""
        super().on_exception(exception)
        tell_of_lost_ranks(exception)
        if isinstance(exception, RuntimeError) and "mixed torch.Tensor and DTensor" in str(exception):
            exception.args = (
                f"{exception}\nA weight was read of a module that was not called, so that it was not gathered: name "
                "the modules to shard in PEFTFSDPStrategy(shard=[…]), such as the list of blocks, without that one.",
            )
        dtype = self._autocast
        if dtype is not None and isinstance(exception, RuntimeError) and re.search(OTHER_DTYPE, str(exception)):
            exception.args = (
                f"{exception}\nWeights are gathered in {dtype_name(dtype)}, as autocast would cast them, also where "
                "the module turns it off: bring the input to the weight's dtype there; or name the modules to shard in "
                "PEFTFSDPStrategy(shard=[…]), without that one; or use precision='32-true'.",
            )

    # what is saved and loaded is whole on every rank: as for one device, without ModelParallelStrategy's gathering

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """False, as for one device."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True, as for one device."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's; nothing is gathered."""
        return Strategy.lightning_module_state_dict(self)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The optimizer's own."""
        return Strategy.optimizer_state(self, optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Write one file, on the first rank; or a folder, of which every rank writes a share."""
        if not self._save_distributed_checkpoint:
            Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)
            return
        if "://" in str(filepath) or storage_options is not None:
            raise PEFTError(
                f"PEFTFSDPStrategy.save_distributed_checkpoint: {filepath} is no folder of a file system; name one "
                "that all ranks share, or write one file (save_distributed_checkpoint=False)"
            )
        assert self.lightning_module is not None
        # a rank that was interrupted is alone in here
        together = not self.lightning_module.trainer.interrupted
        if together or self.is_global_zero:
            target = expanded(self.broadcast(filepath) if together else filepath)
            save_folder(checkpoint, target, together=together)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file or folder, whole, on each rank."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Into the adapters; the base is in no checkpoint."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Into the optimizers."""
        Strategy.load_optimizer_state_dict(self, checkpoint)

    @property
    def _autocast(self) -> torch.dtype | None:
        return AUTOCAST.get(str(self.precision_plugin.precision))

    @cached_property
    def _sharding(self) -> Sharding:
        mesh = self.device_mesh["data_parallel"]
        if self.replicas > 1:
            sizes = (self.replicas, self.world_size // self.replicas)
            mesh = init_device_mesh(self.root_device.type, sizes, mesh_dim_names=("replicate", "shard"))
        return Sharding(mesh, self._autocast, self.cpu_offload)

    def _agree(self, module: nn.Module, prefix: str) -> None:
        here = {
            f"{prefix}{name}": tensor
            for name, tensor in frozen_tensors(module).items()
            if not is_sharded(tensor) or is_split(tensor)
        }
        agree_on_base(here, sync=self.sync_base, mesh=self.device_mesh)


def _check(module: nn.Module) -> None:
    if not records(module):
        raise PEFTError("peft_fsdp: no adapters stand on the module; give the Trainer the PEFT callback")
    names = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if names:
        raise PEFTError(
            f"peft_fsdp: {names[0]} is on the meta device; give PEFT(base_weights=…), the file or folder of its weights"
        )
