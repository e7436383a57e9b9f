"""The memory of a run for each setting and layout of devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_peft.callback.precision import SIXTEEN_BITS
from lightning_peft.methods._quantized import packed
from lightning_peft.methods.errors import PEFTError
from lightning_peft.planning.batches import batch_of
from lightning_peft.planning.building import Setting, adapted, configured
from lightning_peft.planning.ledger import ACTIVATIONS, GRADIENTS, OPTIMIZER, WEIGHTS
from lightning_peft.planning.sharing import Layout, on_each
from lightning_peft.planning.step import Step, step
from lightning_peft.planning.trainer import PlanningTrainer
from lightning_peft.state import adapter_tensors

ADAPTER = "default"


@dataclass(frozen=True)
class Estimate:
    """What a step takes on each device, in bytes; the four parts are those at its peak."""

    setting: Setting
    layout: Layout
    total: int = 0
    """Parameters of the model, packed ones as the numbers that they stand for."""
    trainable: int = 0
    adapter_bytes: int = 0
    """Of a checkpoint's tensors."""
    checkpoint_bytes: int = 0
    """With the optimizer's states, as `ModelCheckpoint` writes it."""
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    """What is kept for the backward pass, and what operators work with; with gathered weights under `peft_fsdp`."""
    fault: str = ""
    """Why the setting can't be; the numbers are 0 then."""

    @property
    def peak(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Counted:
    """A setting's module on the meta device, with what a step of it takes on one device."""

    module: pl.LightningModule
    step: Step


class Planner:
    """Makes estimates for one module, its data and precision.

    Args:
        module: as a configuration makes it; its model is configured without weights.
        data: its datamodule; None where there is none.
        precision: as in the Trainer.
        accumulate_grad_batches: as in the Trainer.
        rows: of a batch on each device, in place of the datamodule's `batch_size`.
        length: of a batch's rows, in place of the datamodule's `max_length`.
        on_gpu: count as a CUDA GPU does; else as a CPU does.

    Raises:
        PEFTError: the module can't be configured, or nothing says what a batch is.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        data: Any = None,
        *,
        precision: Any = "32-true",
        accumulate_grad_batches: int = 1,
        rows: int | None = None,
        length: int | None = None,
        on_gpu: bool = True,
    ) -> None:
        self._precision, self._accumulate, self._data = precision, accumulate_grad_batches, data
        self.on_gpu = on_gpu
        trainer = self._trainer()
        self.module = configured(module, trainer)
        self.batch = batch_of(self.module, trainer, rows, length)
        self._known: list[tuple[Setting, Counted | PEFTError]] = []

    def estimate(self, setting: Setting, layout: Layout = Layout()) -> Estimate:  # noqa: B008, it is frozen
        """The memory of one setting; its `fault` says why it can't be."""
        try:
            counted = self.counted(setting)
            shares = on_each(counted.step.peaks, counted.module, layout, self._gathered_size())
        except PEFTError as error:
            return Estimate(setting, layout, fault="; ".join(error.faults))
        most = max(shares.values(), key=lambda total: total.total())
        module = counted.module
        own = module.state_dict() if setting.method is None else adapter_tensors(module, ADAPTER)
        adapter_bytes = sum(tensor.nbytes for tensor in own.values())
        return Estimate(
            setting,
            layout,
            total=sum(_numbers(part) for part in module.modules()),
            trainable=sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad),
            adapter_bytes=adapter_bytes,
            checkpoint_bytes=adapter_bytes + counted.step.states,
            weights=most[WEIGHTS],
            gradients=most[GRADIENTS],
            optimizer=most[OPTIMIZER],
            activations=most[ACTIVATIONS],
        )

    def counted(self, setting: Setting) -> Counted:
        """One setting's module and the memory of its step.

        Raises:
            PEFTError: the setting can't be.
        """
        found = next((found for known, found in self._known if known == setting), None)
        if found is None:
            try:
                found = self._count(setting)
            except PEFTError as error:
                found = error
            self._known.append((setting, found))
        if isinstance(found, PEFTError):
            raise found
        return found

    def _count(self, setting: Setting) -> Counted:
        trainer = self._trainer()
        module = adapted(self.module, setting, trainer)
        offload = setting.offload_activations
        return Counted(module, step(module, trainer, self.batch, on_gpu=self.on_gpu, offload=offload))

    def _trainer(self) -> PlanningTrainer:
        return PlanningTrainer(self._precision, self._accumulate, self._data)

    def _gathered_size(self) -> int | None:
        precision = str(self._precision)
        return 2 if precision.endswith("-mixed") and precision in SIXTEEN_BITS else None


def _numbers(module: nn.Module) -> int:
    """Numbers of the parameters that a module has itself."""
    weight = packed(module)
    return sum(
        weight.shape.numel() if weight is not None and name == "weight" else parameter.numel()
        for name, parameter in module._parameters.items()
        if parameter is not None
    )
