"""A module with adapters as a run would have it, but on the meta device."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_peft.callback.base import Base
from lightning_peft.callback.memory import apply_memory_options
from lightning_peft.callback.module import Plan, adapt, wake
from lightning_peft.callback.precision import keep_adapters, precision_faults
from lightning_peft.callback.training import kind_for
from lightning_peft.injection import inject
from lightning_peft.methods._quantized import packed
from lightning_peft.methods.base import Method
from lightning_peft.methods.errors import PEFTError
from lightning_peft.planning.trainer import PlanningTrainer
from lightning_peft.quantization.loading import LoadingPolicy, loading
from lightning_peft.tasks.classification import Classification
from lightning_peft.tasks.task import Task

SHAPES = LoadingPolicy(shapes_only=True)
LABELS = 2
"""Classes that a task is taken to have where only its data could tell: their head is small."""


@dataclass(frozen=True)
class Setting:
    """What is trained, and how its memory is saved; the fields are those of the callback."""

    method: Method | None
    """None is full fine-tuning."""
    base: Base = field(default_factory=Base)
    modules_to_save: tuple[str, ...] = ()
    gradient_checkpointing: bool | tuple[str, ...] = False
    offload_activations: bool = False


def configured(module: pl.LightningModule, trainer: PlanningTrainer) -> pl.LightningModule:
    """`module` with its model, whose weights are read from nowhere; without the Trainer again.

    Args:
        module: as the configuration makes it; one that has its model already keeps it.
        trainer: what it may ask, for its data say. These are set up first where the module is no task of this package,
            as its batch is read from them in any case.

    Raises:
        PEFTError: the module can't be configured.
    """
    trainer.take(module)
    if isinstance(module, Classification) and not module.hparams["num_labels"] and not module.hparams["label_names"]:
        module.hparams["num_labels"] = getattr(trainer.datamodule, "num_labels", 0) or LABELS
    try:
        if trainer.datamodule is not None and not isinstance(module, Task):
            trainer.prepare_data()
        with loading(SHAPES), torch.device("meta"):
            module.setup("fit")
            module.configure_model()
    except (PEFTError, ImportError):
        raise
    except Exception as error:
        raise PEFTError(
            f"plan: {type(module).__name__} can't be set up without a run ({type(error).__name__}: {error})"
        ) from error
    finally:
        module._trainer = None
    return module


def adapted(module: pl.LightningModule, setting: Setting, trainer: PlanningTrainer) -> pl.LightningModule:
    """A copy of a configured module with its base stored and its adapters attached as the setting says.

    Args:
        module: from `configured`; it is not changed.
        setting: what becomes of it.
        trainer: of that run; its precision plugin may be replaced, as the callback does it.

    Raises:
        PEFTError: with why it can't be, as a run would tell it.
    """
    made = on_meta(module)
    if setting.method is None:
        if setting.base.quantization is not None:
            raise PEFTError("full fine-tuning changes the weights, which packed ones can't be")
        trainer.precision_plugin.convert_module(made)
        return made
    base = replace(setting.base.under(trainer), device=None)
    if faults := precision_faults(trainer, base):
        raise PEFTError(faults)
    if base.dtype is not None:
        keep_adapters(trainer)
    saved = list(setting.modules_to_save)
    checkpointing = setting.gradient_checkpointing
    blocks = list(checkpointing) if isinstance(checkpointing, tuple) else checkpointing
    # where activations wait is the simulation's to say
    plan = Plan(setting.method, "default", saved, False, base, blocks)
    adapt(made, plan, kind_for(setting.method))
    with loading(SHAPES):
        base.prepare(made, setting.method, saved)
    _let_copy(made)
    inject(made, setting.method, modules_to_save=saved)
    apply_memory_options(made, plan)
    wake(made)
    trainer.precision_plugin.convert_module(made)
    return made


def _let_copy(module: torch.nn.Module) -> None:
    """Make packed weights plain parameters, as they are where they are sharded: their layers have the scales, and
    bitsandbytes' own can't be copied on the meta device."""
    for part in module.modules():
        if packed(part) is not None:
            codes = part._parameters["weight"]
            assert codes is not None
            part._parameters["weight"] = torch.nn.Parameter(codes.data.as_subclass(torch.Tensor), requires_grad=False)


def on_meta(module: pl.LightningModule) -> pl.LightningModule:
    """A copy of `module` on the meta device, whatever device it is on."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty: Any = torch.empty_like(tensor, device="meta", requires_grad=False)
        if isinstance(tensor, torch.nn.Parameter):
            empty = torch.nn.Parameter(empty, tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(module, memo)
