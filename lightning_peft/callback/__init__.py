"""The callback that turns any LightningModule into a parameter-efficient fine-tuning run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_peft.callback.base import Base, base_faults
from lightning_peft.callback.compatibility import check_trainer
from lightning_peft.callback.hyperparameters import warn_of_unsaved
from lightning_peft.callback.module import AdaptedModule, Plan, adapt, go_on_with_random_numbers, mark_buffers
from lightning_peft.callback.precision import keep_adapters, warn_of_precision
from lightning_peft.callback.slurm import save_alone
from lightning_peft.callback.training import kind_for
from lightning_peft.injection import method_adapters
from lightning_peft.methods.base import Method
from lightning_peft.methods.errors import PEFTError
from lightning_peft.quantization import Quantization
from lightning_peft.quantization.loading import loading
from lightning_peft.state import KEY, AtomicCheckpointIO, Spec, method_of, read_checkpoint, spec_of
from lightning_peft.tracking import AdapterMonitor, print_summary

L = TypeVar("L", bound=pl.LightningModule)
AS_SAVED = "as saved"
"""In place of a quantization or dtype: the one that the checkpoint names."""


class PEFT(pl.Callback):
    """Fine-tune a LightningModule, whose code stays as it is, by a parameter-efficient method.

    Once the model is configured, the adapters are attached and all else is frozen; optimizers get what trains;
    checkpoints hold the adapters' tensors and no frozen one, and are checked against the model before they are loaded.
    Where the Trainer has a logger and no AdapterMonitor, it gets one.

    Args:
        method: the method, for example `LoRA(r=8, target_modules=["query", "value"])`.
        modules_to_save: names or path endings of modules to train whole, such as a new classification head.
        quantization: how the base's linear layers are stored: `nf4`, `nf4-dq`, `fp4`, `fp4-dq`, `int8`, or a
            `Quantization`; output heads and `modules_to_save` are left. None leaves the base as it is.
        base_dtype: `bfloat16`, `float16` or `float32`: the dtype of the frozen tensors that aren't quantized. None
            leaves each in its own; or, over a quantized base and under the Trainer's `bf16-true` or `16-true`, is that.
        base_weights: a safetensors file, a folder or an index of shards, from which a model that was built on the meta
            device gets its weights, one tensor after the other.
        adapter_name: the name under which the adapters stand on the model and in its checkpoints.
        gradient_checkpointing: compute each block's activations again in the backward pass instead of keeping them;
            a list names the modules to do so with.
        offload_activations: keep what the backward pass needs in the CPU's memory until then.
        allow_other_base: load a checkpoint whose adapter was trained on another base; the fault is not told then.

    Raises:
        PEFTError: with all that is wrong with the arguments.
    """

    def __init__(
        self,
        method: Method,
        *,
        modules_to_save: Sequence[str] = (),
        quantization: str | Quantization | None = None,
        base_dtype: str | None = None,
        base_weights: str | None = None,
        adapter_name: str = "default",
        gradient_checkpointing: bool | list[str] = False,
        offload_activations: bool = False,
        allow_other_base: bool = False,
    ) -> None:
        faults = base_faults(quantization, base_dtype, base_weights)
        given: object = method
        if not isinstance(given, Method):
            faults.append(f"method: {method!r} is no method; give one of lightning_peft's, for example LoRA(r=8)")
        if faults:
            raise PEFTError([f"PEFT.{fault}" for fault in faults])
        self.method = method
        self.modules_to_save = modules_to_save if isinstance(modules_to_save, str) else list(modules_to_save)
        self.base = Base.of(quantization, base_dtype, base_weights)
        self.adapter_name = adapter_name
        self.gradient_checkpointing, self.offload_activations = gradient_checkpointing, offload_activations
        self.allow_other_base = allow_other_base

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepare `pl_module` to be injected when its model is configured.

        Raises:
            PEFTError: with all that could not work in this Trainer.
        """
        check_trainer(trainer, self)
        base = self.base.under(trainer)
        plan = Plan(
            self.method,
            self.adapter_name,
            self.modules_to_save,  # type: ignore[arg-type]
            self.allow_other_base,
            base,
            self.gradient_checkpointing,
            self.offload_activations,
        )
        adapt(pl_module, plan, kind_for(self.method))
        if base.dtype is not None:
            keep_adapters(trainer)
        if stage == "fit":
            warn_of_precision(trainer, base.torch_dtype)
            self._monitor(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print what will be trained; after a resume, go on with the random numbers of the run that wrote the
        checkpoint."""
        if isinstance(pl_module, AdaptedModule):
            mark_buffers(pl_module)
            # the next thing that Lightning draws is the data loader's seed, as it does when an epoch begins
            go_on_with_random_numbers(pl_module)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, AdapterMonitor):
                    callback.spec = pl_module._peft_plan.spec
        rank_zero_only(print_summary)(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let a checkpoint that SLURM asks for wait for no other rank."""
        save_alone(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Log what the method reports of its adapters."""
        if trainer.loggers and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log_dict(self.method.report(method_adapters(pl_module, self.adapter_name)))

    def _monitor(self, trainer: pl.Trainer) -> None:
        """Let what happens to the adapters be logged, where there is a logger."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        is_logged = trainer.loggers and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if is_logged and not any(isinstance(callback, AdapterMonitor) for callback in callbacks):
            # Lightning is going through this list, and comes to the next place next
            callbacks.insert(callbacks.index(self) + 1, AdapterMonitor())


def load_from_checkpoint(
    cls: type[L],
    path: _PATH,
    *,
    map_location: Any = "cpu",
    quantization: str | Quantization | None = AS_SAVED,
    base_dtype: str | None = AS_SAVED,
    base_weights: str | None = None,
    allow_other_base: bool = False,
    **kwargs: Any,
) -> L:
    """`cls` with the adapters of an adapter-only checkpoint, on the base that `cls` builds.

    The base is quantized and cast as it was in training; a task's, as its weights are read. To load an adapter from a
    quantized base where bitsandbytes is not installed, or onto the full precision, give `quantization=None` and
    `allow_other_base=True`.

    Args:
        cls: the LightningModule's class, or a parent of it for a checkpoint that LightningCLI wrote.
        path: the checkpoint.
        map_location: as in `torch.load`; where it is a device, the base is quantized there.
        quantization: how to quantize the base instead, as in `PEFT`; None leaves it as `cls` builds it.
        base_dtype: what to cast the base to instead, as in `PEFT`; None leaves it as `cls` builds it.
        base_weights: where the weights of a model are that `cls` builds on the meta device, as in `PEFT`.
        allow_other_base: load also onto another base than the adapter was trained on.
        **kwargs: arguments of `cls`, where the checkpoint's hyper-parameters lack or shall not decide them; of those
            that were left out of it, because they are no plain values, a warning names what is not given.

    Raises:
        PEFTError: the file is unreadable or holds no adapter, or the adapter does not fit the module; nothing is half
            loaded.
    """
    checkpoint = read_checkpoint(path, map_location)
    spec = spec_of(checkpoint, str(path))
    warn_of_unsaved(spec, kwargs, cls, str(path))
    method = method_of(spec)
    base = _base_of(spec, str(path), quantization, base_dtype, base_weights)
    if isinstance(map_location, (str, torch.device)):
        base = replace(base, device=torch.device(map_location))
    # Lightning reads a file alone, and moves the module to where its tensors are, which one on the meta device can't be
    source: Any = path if base_weights is None and Path(path).is_file() else _as_file(checkpoint, base_weights is None)
    with warnings.catch_warnings(), loading(base.policy(method, spec["modules_to_save"])):
        # the module is built by Lightning's own rules; that it finds no frozen tensor in the file is as it should be
        warnings.filterwarnings("ignore", message="Found keys that are|The state dict in .* contains no parameters")
        module = cls.load_from_checkpoint(source, map_location=map_location, strict=False, weights_only=True, **kwargs)
    _stand(module, checkpoint, base, allow_other_base)
    return module


def load_adapter(
    module: pl.LightningModule,
    checkpoint: dict[str, Any],
    source: str,
    *,
    quantization: str | Quantization | None = AS_SAVED,
    base_dtype: str | None = AS_SAVED,
    base_weights: str | None = None,
    allow_other_base: bool = False,
) -> None:
    """Stand the adapter of an adapter-only checkpoint on `module`, whose model is configured then.

    Args:
        module: a module on which no adapter stands.
        checkpoint: what was read, of which what concerns nobody else is taken out.
        source: where it was read from, for the messages.
        quantization: as in `load_from_checkpoint`.
        base_dtype: as in `load_from_checkpoint`.
        base_weights: as in `load_from_checkpoint`.
        allow_other_base: load also onto another base than the adapter was trained on.

    Raises:
        PEFTError: the checkpoint holds no adapter, or it does not fit the module; nothing is half loaded.
    """
    base = _base_of(spec_of(checkpoint, source), source, quantization, base_dtype, base_weights)
    _stand(module, checkpoint, base, allow_other_base)


def _base_of(
    spec: Spec, source: str, quantization: str | Quantization | None, base_dtype: str | None, base_weights: str | None
) -> Base:
    """How the base of a checkpoint with that spec is to be prepared, where nothing else is asked for."""
    if quantization == AS_SAVED and (fields := spec.get("quantization")) is not None:
        try:
            quantization = Quantization(**fields)
        except (PEFTError, TypeError) as error:
            faults = error.faults if isinstance(error, PEFTError) else [str(error)]
            raise PEFTError(
                [f"{source}: {fault}" for fault in faults]
                + ["or load the adapter onto the base as it is: quantization=None, allow_other_base=True"]
            ) from error
    return Base.of(
        None if quantization == AS_SAVED else quantization,
        spec.get("base_dtype") if base_dtype == AS_SAVED else base_dtype,
        base_weights,
    )


def _as_file(checkpoint: dict[str, Any], has_tensors: bool) -> BytesIO:
    """A file of all that is in a checkpoint but the optimizers' tensors; without the module's, if it shall not have
    them."""
    file = BytesIO()
    state = checkpoint["state_dict"] if has_tensors else {}
    torch.save({**checkpoint, "state_dict": state, "optimizer_states": []}, file)
    file.seek(0)
    return file


def _stand(module: pl.LightningModule, checkpoint: dict[str, Any], base: Base, allow_other_base: bool) -> None:
    """Prepare the base, inject, and load the checkpoint's tensors."""
    spec = checkpoint[KEY]
    method = method_of(spec)
    plan = Plan(method, spec["adapter_name"], list(spec["modules_to_save"]), allow_other_base, base)
    adapt(module, plan, kind_for(method))
    assert isinstance(module, AdaptedModule)
    module.configure_model()
    module.check_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])


__all__ = ["PEFT", "AdaptedModule", "load_adapter", "load_from_checkpoint"]
