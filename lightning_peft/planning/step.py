"""One training step without values: the bytes that are alive at its peaks, and what they are."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.callback.memory import SMALLEST
from lightning_peft.callback.optimizers import optimizers_in
from lightning_peft.methods.errors import PEFTError
from lightning_peft.planning.batches import prepare_task, with_tensors
from lightning_peft.planning.blocks import FEW, Run, cut, equal_runs
from lightning_peft.planning.fakes import backward, make_fake
from lightning_peft.planning.kernels import CudaKernels
from lightning_peft.planning.ledger import GRADIENTS, KINDS, OPTIMIZER, WEIGHTS, Bytes, Ledger
from lightning_peft.planning.optimizers import bitsandbytes_states
from lightning_peft.planning.trainer import PlanningTrainer
from lightning_peft.state.frozen import packed_scales

Peaks = dict[str, Bytes]
"""The bytes alive at the peak of each part of a step, by its name: forward or backward, and in which block."""


@dataclass
class Step:
    """What a step takes on one device."""

    peaks: Peaks
    states: int
    """Bytes of the optimizers' states, as a checkpoint holds them."""


CUDA_BLOCK = 512
"""Bytes, of which CUDA's allocator gives out multiples."""


def step(
    module: pl.LightningModule, trainer: PlanningTrainer, batch: Any, *, on_gpu: bool, offload: bool = False
) -> Step:
    """The memory of a training step that is not the first: the optimizer has its states, and gradients are those of the
    step before until they are set to None.

    Of equal blocks in a row two are run, and then three, and the difference stands for each of the others: a peak in
    the first or the last block, or outside, is linear in their number, and none in between is above both.

    Args:
        module: on the meta device or any other, and without a Trainer; it is not changed.
        trainer: what it is attached to.
        batch: what one device is given; tensors on the meta device are taken for their shapes.
        on_gpu: whether to count as a CUDA GPU does.
        offload: whether activations wait in the CPU's memory for the backward pass.

    Raises:
        PEFTError: the step can't be run without values.
    """
    runs = equal_runs(module)

    def of(runs: Sequence[Run], kept: Sequence[int]) -> Step:
        with cut(module, runs, kept) as left:
            part = copy.deepcopy(module)
        return _Step(part, trainer, on_gpu, offload).run(batch, left)

    if runs:
        # whatever can't be done with a few, such as asking for the fifth, may be possible with all
        with suppress(Exception):
            return _by_few(partial(of, runs), runs)
    try:
        return of([], [])
    except PEFTError:
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        raise PEFTError(
            f"plan: a step of {type(module).__name__} can't be simulated without values "
            f"({type(error).__name__}: {message[:300]})"
        ) from error


def _by_few(of: Callable[[Sequence[int]], Step], runs: Sequence[Run]) -> Step:
    """What `step` finds by two and three blocks of each run; `of` says it for so many."""
    least = of([FEW] * len(runs))
    found = Step({place: total.copy() for place, total in least.peaks.items()}, least.states)
    for index, run in enumerate(runs):
        more = of([FEW + (other == index) for other in range(len(runs))])
        times = len(run.names) - FEW
        found.states += times * (more.states - least.states)
        for place, total in found.peaks.items():
            for kind in KINDS:
                total[kind] += times * (more.peaks[place][kind] - least.peaks[place][kind])
    return found


class _Step:
    """One step of a module, which is given up to it.

    Args:
        module: without a Trainer.
        trainer: to attach it to.
        on_gpu: see `step`.
        offload: see `step`.
    """

    def __init__(self, module: pl.LightningModule, trainer: PlanningTrainer, on_gpu: bool, offload: bool) -> None:
        if not module.automatic_optimization:
            raise PEFTError(
                f"plan: {type(module).__name__} optimizes by hand, which a plan can't follow; measure a run of it"
            )
        self.module, self.trainer, self.on_gpu, self.offload = module, trainer, on_gpu, offload
        self.ledger = Ledger(CUDA_BLOCK if on_gpu else 1, on_gpu)

    def run(self, given: Any, runs: Mapping[str, Sequence[str]]) -> Step:
        """Run it.

        Args:
            given: the batch.
            runs: the paths of the blocks to tell apart, by the label of their run.

        Raises:
            ValueError: one of these gives another shape than it is given, so that the next has other work to do.
        """
        module, ledger = self.module, self.ledger
        with ExitStack() as stack:
            with ledger.mode:
                make_fake(module)
            stack.enter_context(ledger)
            if self.on_gpu:
                stack.enter_context(CudaKernels())
            self.trainer.take(module)
            # there are no results to log into
            vars(module).update(log=_nothing, log_dict=_nothing)
            scales = (tensor for part in module.modules() for _, tensor in packed_scales(part))
            ledger.are(WEIGHTS, [*module.parameters(), *module.buffers(), *scales])
            prepare_task(module, self.trainer)
            optimizers, kept = self._optimizers()
            for label, paths in runs.items():
                self._watch(label, paths)
            batch = with_tensors(given, partial(_on_device, ledger))
            ledger.peaks.clear()
            ledger.enter("forward before")
            loss = self._forward(batch)
            if self.trainer.accumulate_grad_batches == 1:
                for optimizer in optimizers:
                    optimizer.zero_grad()
            ledger.enter("backward after")
            backward(loss)
            del loss
            ledger.enter("step")
            for optimizer in optimizers:
                _take_step(optimizer)
        return Step(ledger.peaks, sum(tensor.nbytes for tensor in kept))

    def _optimizers(self) -> tuple[list[Optimizer], list[Tensor]]:
        """The module's optimizers after a step, with the gradients of it, and what they keep outside of themselves."""
        optimizers = optimizers_in(self.module.configure_optimizers())
        kept: list[Tensor] = []
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                self.ledger.are(GRADIENTS, [parameter.grad])
                parameter.register_post_accumulate_grad_hook(self._is_gradient)  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                # what torch chooses for parameters on a GPU
                if self.on_gpu and group.get("foreach", False) is None and not group.get("fused"):
                    group["foreach"] = True
            with self.ledger.elsewhere() if getattr(optimizer, "is_paged", False) else ExitStack():
                states = bitsandbytes_states(optimizer)
            if states is None:
                _take_step(optimizer)
                states = [
                    value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
                ]
            self.ledger.are(OPTIMIZER, states)
            kept += states
        return optimizers, kept

    def _is_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.ledger.are(GRADIENTS, [parameter.grad])

    def _forward(self, batch: Any) -> Tensor:
        plugin = self.trainer.precision_plugin
        parameters = inspect.signature(self.module.training_step).parameters.values()
        takes_index = len([each for each in parameters if each.default is each.empty]) > 1
        with self._offloading() if self.offload else ExitStack():
            output = self.trainer.strategy.training_step(plugin.convert_input(batch), *([0] if takes_index else []))
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise PEFTError(f"plan: training_step of {type(self.module).__name__} gives no loss")
        return loss

    def _watch(self, label: str, paths: Sequence[str]) -> None:
        """Tell the ledger which block is run, forward and backward."""
        for path in paths:
            place = f"{label} {'first' if path == paths[0] else 'last' if path == paths[-1] else 'middle'}"
            block = self.module.get_submodule(path)
            block.register_forward_pre_hook(partial(self._before, place))
            block.register_forward_hook(partial(self._after, label, place))

    def _before(self, place: str, block: nn.Module, args: Any) -> None:
        self.ledger.enter(f"forward {place}")
        if place.endswith("first"):
            for tensor in _gradients_of(args):
                tensor.register_hook(partial(self._enter, f"backward before {place}"))  # type: ignore[no-untyped-call]

    def _after(self, label: str, place: str, block: nn.Module, args: Any, output: Any) -> None:
        if len({tensor.shape for value in (args, output) for tensor in _tensors(value)[:1]}) > 1:
            raise ValueError(f"{place}: the block changes the shape of what it is given")
        if place.endswith("last"):
            self.ledger.enter(f"forward after {label}")
        for tensor in _gradients_of(output):
            tensor.register_hook(partial(self._enter, f"backward {place}"))  # type: ignore[no-untyped-call]

    def _enter(self, place: str, _: Tensor) -> None:
        self.ledger.enter(place)

    @contextmanager
    def _offloading(self) -> Iterator[None]:
        """As `offload_activations` does it, to a memory that is not counted."""

        def pack(tensor: Tensor) -> tuple[Tensor, bool]:
            size, storage = tensor.numel() * tensor.element_size(), tensor.untyped_storage()
            is_large = SMALLEST <= size <= storage.nbytes()
            if tensor.is_leaf or not tensor.requires_grad or not is_large or self.ledger.knows(tensor, WEIGHTS):
                return tensor.detach(), False
            with self.ledger.elsewhere():
                return torch.empty_like(tensor.detach()), True

        def unpack(kept: tuple[Tensor, bool]) -> Tensor:
            return torch.empty_like(kept[0]) if kept[1] else kept[0]

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


def _take_step(optimizer: Optimizer) -> None:
    if bitsandbytes_states(optimizer) is None:
        optimizer.step()


def _tensors(value: Any) -> list[Tensor]:
    """Those of a block's input or output: hidden states come first."""
    values = value if isinstance(value, (tuple, list)) else value.values() if isinstance(value, Mapping) else [value]
    return [each for each in values if isinstance(each, Tensor)]


def _gradients_of(value: Any) -> list[Tensor]:
    """The first tensor of a block's input or output that a gradient comes back to."""
    return [each for each in _tensors(value) if each.requires_grad][:1]


def _on_device(ledger: Ledger, tensor: Tensor) -> Tensor:
    if not tensor.is_meta:
        return tensor.clone()
    with ledger.mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype)


def _nothing(*_: Any, **__: Any) -> None: ...
