"""The callback that turns any LightningModule into a parameter-efficient fine-tuning run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_peft.callback.compatibility import check_trainer
from lightning_peft.callback.module import AdaptedModule, Plan, adapt, go_on_with_random_numbers, mark_buffers
from lightning_peft.callback.training import kind_for
from lightning_peft.injection import method_adapters
from lightning_peft.methods.base import Method
from lightning_peft.methods.errors import PEFTError
from lightning_peft.state import AtomicCheckpointIO, method_of, read_checkpoint, spec_of
from lightning_peft.tracking import print_summary

L = TypeVar("L", bound=pl.LightningModule)


class PEFT(pl.Callback):
    """Fine-tune a LightningModule, whose code stays as it is, by a parameter-efficient method.

    Once the model is configured, the adapters are attached and all else is frozen; optimizers get what trains;
    checkpoints hold the adapters' tensors and no frozen one, and are checked against the model before they are loaded.

    Args:
        method: the method, for example `LoRA(r=8, target_modules=["query", "value"])`.
        modules_to_save: names or path endings of modules to train whole, such as a new classification head.
        adapter_name: the name under which the adapters stand on the model and in its checkpoints.
        allow_other_base: load a checkpoint whose adapter was trained on another base; the fault is not told then.
    """

    def __init__(
        self,
        method: Method,
        *,
        modules_to_save: Sequence[str] = (),
        adapter_name: str = "default",
        allow_other_base: bool = False,
    ) -> None:
        if not isinstance(method, Method):
            raise PEFTError(
                f"PEFT.method: {method!r} is no method; give one of lightning_peft's, for example LoRA(r=8)"
            )
        self.method = method
        self.modules_to_save = modules_to_save if isinstance(modules_to_save, str) else list(modules_to_save)
        self.adapter_name = adapter_name
        self.allow_other_base = allow_other_base

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepare `pl_module` to be injected when its model is configured.

        Raises:
            PEFTError: with all that could not work in this Trainer.
        """
        check_trainer(trainer, self)
        plan = Plan(self.method, self.adapter_name, self.modules_to_save, self.allow_other_base)  # type: ignore[arg-type]
        adapt(pl_module, plan, kind_for(self.method))
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print what will be trained; after a resume, go on with the random numbers of the run that wrote the
        checkpoint."""
        if isinstance(pl_module, AdaptedModule):
            mark_buffers(pl_module)
            # the next thing that Lightning draws is the data loader's seed, as it does when an epoch begins
            go_on_with_random_numbers(pl_module)
        rank_zero_only(print_summary)(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Log what the method reports of its adapters."""
        if trainer.loggers and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log_dict(self.method.report(method_adapters(pl_module, self.adapter_name)))


def load_from_checkpoint(
    cls: type[L], path: _PATH, *, map_location: Any = "cpu", allow_other_base: bool = False, **kwargs: Any
) -> L:
    """`cls` with the adapters of an adapter-only checkpoint, on the base that `cls` builds.

    Args:
        cls: the LightningModule's class, or a parent of it for a checkpoint that LightningCLI wrote.
        path: the checkpoint.
        map_location: as in `torch.load`.
        allow_other_base: load also onto another base than the adapter was trained on.
        **kwargs: arguments of `cls`, where the checkpoint's hyper-parameters lack or shall not decide them.

    Raises:
        PEFTError: the file is unreadable or holds no adapter, or the adapter does not fit the module; nothing is half
            loaded.
    """
    checkpoint = read_checkpoint(path, map_location)
    method_of(spec_of(checkpoint, str(path)))
    with warnings.catch_warnings():
        # the module is built by Lightning's own rules; that it finds no frozen tensor in the file is as it should be
        warnings.filterwarnings("ignore", message="Found keys that are")
        module = cls.load_from_checkpoint(path, map_location=map_location, strict=False, weights_only=True, **kwargs)
    load_adapter(module, checkpoint, str(path), allow_other_base=allow_other_base)
    return module


def load_adapter(
    module: pl.LightningModule, checkpoint: dict[str, Any], source: str, *, allow_other_base: bool = False
) -> None:
    """Stand the adapter of an adapter-only checkpoint on `module`, whose model is configured then.

    Args:
        module: a module on which no adapter stands.
        checkpoint: what was read, of which what concerns nobody else is taken out.
        source: where it was read from, for the messages.
        allow_other_base: load also onto another base than the adapter was trained on.

    Raises:
        PEFTError: the checkpoint holds no adapter, or it does not fit the module; nothing is half loaded.
    """
    spec = spec_of(checkpoint, source)
    method = method_of(spec)
    plan = Plan(method, spec["adapter_name"], list(spec["modules_to_save"]), allow_other_base)
    adapt(module, plan, kind_for(method))
    assert isinstance(module, AdaptedModule)
    module.configure_model()
    module.check_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])


__all__ = ["PEFT", "AdaptedModule", "load_adapter", "load_from_checkpoint"]
