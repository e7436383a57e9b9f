"""What a LightningModule does differently while adapters stand on it.

Its class is swapped for a subclass, as that of an adapted layer is: so its hooks can inject once the model exists,
write adapter-only checkpoints whoever asks for one, and check what is loaded before anything is, while the module can
still be copied and pickled. No callback's hook runs at those moments: none between `configure_model` and the restore,
none before the weights are loaded, and none at all in a checkpoint of weights only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft.callback.base import Base
from lightning_peft.callback.compatibility import check_averages
from lightning_peft.callback.hyperparameters import drop_objects
from lightning_peft.callback.memory import apply_memory_options
from lightning_peft.callback.optimizers import keep_trainable, optimizers_in
from lightning_peft.injection import inject, method_adapters, records, trainable_parameters
from lightning_peft.methods._host import Adapter, Host, Swapped, swap
from lightning_peft.methods._sharded import refuse_sharded
from lightning_peft.methods._targets import base_modules
from lightning_peft.methods.base import Method
from lightning_peft.methods.errors import PEFTError
from lightning_peft.quantization.loading import loading
from lightning_peft.state import (
    KEY,
    RNGState,
    Spec,
    adapter_tensors,
    base_buffers,
    base_fingerprint,
    base_keys,
    base_quantization,
    make_spec,
    rng_state,
    sample_bytes,
    set_rng_state,
    spec_faults,
    spec_of,
    tensor_faults,
)
from lightning_peft.strategies import PEFTFSDPStrategy
from lightning_peft.strategies.agreement import agree_on_configuration, agree_on_optimizers, everyones, faults_told
from lightning_peft.strategies.tensor_parallel import check_split

NOTICE = (
    "lightning_peft: this checkpoint holds adapters alone; load it with lightning_peft.load_from_checkpoint(MyModule, "
    "path), or give the Trainer the PEFT callback"
)
"""A key among the tensors: stock loading lists keys that it does not expect, and so says what to call."""
HOOKS = (
    "configure_model",
    "configure_optimizers",
    "training_step",
    "manual_backward",
    "on_save_checkpoint",
    "on_load_checkpoint",
    "load_state_dict",
)
STATES = ("state_dict", "current_model_state")
"""Where a checkpoint holds the module's tensors; WeightAveraging keeps the current ones beside the averaged."""
BUFFER_SAMPLES = 4096
SETTINGS = ("precision", "accumulate_grad_batches", "gradient_clip_val", "max_epochs", "max_steps")
"""Of the Trainer, with which ranks that differ would train otherwise."""


@dataclass
class Plan:
    """What is to be injected into a LightningModule, and what is known since."""

    method: Method
    adapter_name: str
    modules_to_save: list[str]
    allow_other_base: bool = False
    base: Base = field(default_factory=Base)
    gradient_checkpointing: bool | list[str] = False
    offload_activations: bool = False
    spec: Spec | None = None
    """None until it is injected."""
    own_hooks: dict[str, Callable[..., Any]] = field(default_factory=dict)
    """Hooks that were set on the instance, as LightningCLI sets configure_optimizers."""
    buffers_at_start: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    moved_buffers: set[str] = field(default_factory=set)
    """Buffers of the base that training moves: a checkpoint holds them, for nothing else could restore them."""
    steps: int = 0
    """Optimizer steps that the adapters have taken, for methods with a schedule of their own."""
    rng_to_restore: list[RNGState] | None = None
    """Each rank's random number generators' states in the checkpoint that was loaded, until training starts."""


class AdaptedModule(Swapped, LightningModule):
    """Mixed in front of a LightningModule's class."""

    _peft_plan: Plan

    def configure_model(self) -> None:
        """The module's own, and then, once, what becomes of its base, and the injection; on all ranks the same.

        Raises:
            PEFTError: of the configuration; or on another rank it failed, or came to something else.
        """
        if self._trainer is None or self._trainer.world_size == 1:
            self._peft_configure()
            return
        with faults_told():
            self._peft_configure()
        assert self._peft_plan.spec is not None
        settings = {name: getattr(self._trainer, name) for name in SETTINGS}
        agree_on_configuration(self._peft_plan.spec, trainable_parameters(self), settings)

    def _peft_configure(self) -> None:
        plan = self._peft_plan
        with loading(plan.base.policy(plan.method, plan.modules_to_save)):
            self._peft_own("configure_model")()
        strategy = None if self._trainer is None else self._trainer.strategy
        if plan.spec is not None and not isinstance(strategy, PEFTFSDPStrategy):
            refuse_sharded(
                self, "strategy", "an earlier run sharded it: go on with 'peft_fsdp', or build the module anew"
            )
        if plan.spec is None:
            if isinstance(strategy, PEFTFSDPStrategy) and strategy.split_over > 1:
                loads = plan.base.quantization is not None or plan.base.weights is not None
                check_split(self, strategy.device_mesh, loads=loads)
            else:
                refuse_sharded(
                    self,
                    "PEFT",
                    "adapters have to be attached before: leave fully_shard out of the module's code, and give the "
                    "Trainer strategy='peft_fsdp'; for parallelize_module, PEFTFSDPStrategy(tensor_parallel_size=…)",
                )
            plan.base.prepare(self, plan.method, plan.modules_to_save)
            stored = base_quantization(self)
            if stored and self._trainer is not None:
                check_averages(self._trainer)
            if plan.adapter_name not in records(self):
                inject(self, plan.method, adapter_name=plan.adapter_name, modules_to_save=plan.modules_to_save)
                apply_memory_options(self, plan)
            # taken now, as the base was given: a precision plugin may cast it later on
            plan.spec = make_spec(
                plan.method,
                plan.adapter_name,
                plan.modules_to_save,
                base_fingerprint(self, plan.adapter_name),
                quantization=None if plan.base.quantization is None else plan.base.quantization.fields(),
                base_dtype=plan.base.dtype,
                stored=stored,
            )
            _forgive_frozen_keys(self)
            if self._trainer is not None:
                wake(self)

    def configure_optimizers(self) -> Any:
        """The module's own, with only what trains left in its optimizers; on all ranks the same.

        Raises:
            PEFTError: of the optimizers; or on another rank it failed, or came to something else.
        """
        if self._trainer is None or self._trainer.world_size == 1:
            return self._peft_optimizers()
        with faults_told():
            configured = self._peft_optimizers()
        agree_on_optimizers(optimizers_in(configured))
        return configured

    def _peft_optimizers(self) -> Any:
        plan = self._peft_plan
        for adapter in method_adapters(self, plan.adapter_name).values():
            adapter.before_training()
        # who asks for estimated_stepping_batches, as a schedule or a method does, lets the data loaders draw their seed
        go_on_with_random_numbers(self)
        configured = self._peft_own("configure_optimizers")()
        factors = plan.method.learning_rate_factors(method_adapters(self, plan.adapter_name))
        keep_trainable(configured, trainable_parameters(self), factors)
        return configured

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The module's own, and then everything frozen is left out."""
        self._peft_own("on_save_checkpoint")(checkpoint)
        plan = self._peft_plan
        if plan.spec is None:
            return
        plan.moved_buffers |= _moved(base_buffers(self), plan.buffers_at_start)
        kept = {*adapter_tensors(self, plan.adapter_name), *plan.moved_buffers}
        prefixes = tuple(_own(self, plan.adapter_name))
        for name in STATES:
            if name in checkpoint:
                state = checkpoint[name].items()
                # an averaged copy may have the adapter's tensors in another form, under other keys
                checkpoint[name] = {key: tensor for key, tensor in state if key in kept or key.startswith(prefixes)}
        checkpoint["state_dict"][NOTICE] = torch.empty(0)
        checkpoint[KEY] = {**plan.spec, "moved_buffers": sorted(plan.moved_buffers), "metrics": _metrics(self)}
        checkpoint[KEY]["steps"] = plan.steps
        if "optimizer_states" in checkpoint:
            # Lightning does not keep them, and a resumed run would shuffle and drop otherwise than the unbroken one
            # a rank that was interrupted is alone in here
            alone = self._trainer is None or self._trainer.interrupted
            checkpoint[KEY]["rng_states"] = [rng_state()] if alone else everyones(rng_state())
        drop_objects(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what does not fit, before anything is loaded; then the module's own."""
        self.check_checkpoint(checkpoint)
        self._peft_own("on_load_checkpoint")(checkpoint)

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another method, another base, or with other tensors.

        Raises:
            PEFTError: with every difference.
        """
        spec = spec_of(checkpoint, "the checkpoint")
        checkpoint["state_dict"].pop(NOTICE, None)
        self._peft_check(checkpoint["state_dict"], spec)
        self._peft_plan.moved_buffers |= set(spec.get("moved_buffers", ()))
        self._peft_plan.steps = spec.get("steps", 0)
        self._peft_plan.rng_to_restore = spec.get("rng_states")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the adapter's tensors, or all of the module's; nothing is loaded where any would not fit.

        Raises:
            PEFTError: a tensor of the adapter is missing, unexpected or of another shape.
        """
        state = {key: tensor for key, tensor in state_dict.items() if key != NOTICE}
        if strict and self._peft_plan.spec is not None:
            self._peft_check(state, None)
        return self._peft_own("load_state_dict")(state, strict=strict, assign=assign)

    def cpu(self) -> Any:
        """The module's own, but that what has no values yet stays where it is."""
        # a Trainer tears a failed run down so, and that it can't move would hide why the run failed
        return self if any(parameter.is_meta for parameter in self.parameters()) else super().cpu()

    def take_off(self) -> None:
        """Give back the module's own class and the hooks that were set on it."""
        own_hooks = vars(self).pop("_peft_plan").own_hooks
        vars(self).update(own_hooks)
        hooks = self._load_state_dict_post_hooks
        for key in [key for key, hook in hooks.items() if hook is _forgive]:
            del hooks[key]
        super().take_off()

    def _peft_own(self, name: str) -> Callable[..., Any]:
        own = self._peft_plan.own_hooks.get(name)
        return own if own is not None else cast("Callable[..., Any]", getattr(super(), name))

    def _peft_check(self, state: Mapping[str, Any], spec: Spec | None) -> None:
        plan = self._peft_plan
        assert plan.spec is not None
        faults = spec_faults(plan.spec, spec, plan.allow_other_base) if spec else []
        awaited, wrong = _awaited(self, plan.adapter_name, state)
        faults += wrong + tensor_faults(awaited, state, base_keys(self))
        if faults:
            raise PEFTError([f"checkpoint: {fault}" for fault in faults])


def adapt(module: LightningModule, plan: Plan, kind: type[AdaptedModule] = AdaptedModule) -> None:
    """Let `module` carry out `plan` when its model is configured; again with the same plan, nothing changes.

    Args:
        module: the module, whose class is swapped.
        plan: what to inject.
        kind: what is mixed in front of its class.

    Raises:
        PEFTError: the module already carries another method under that adapter's name.
    """
    if isinstance(module, AdaptedModule) and module._peft_plan.spec is None:
        module.take_off()  # an earlier plan came to nothing
    if isinstance(module, AdaptedModule):
        there = module._peft_plan
        same = type(there.method) is type(plan.method) and there.method.fields() == plan.method.fields()
        if not same or (there.adapter_name, there.modules_to_save) != (plan.adapter_name, plan.modules_to_save):
            raise PEFTError(
                f"the module already carries {there.method} as adapter {there.adapter_name!r}, and not {plan.method} "
                f"as {plan.adapter_name!r}; call lightning_peft.remove(module) first to start anew"
            )
        there.base.check_asked(plan.base)
        there.allow_other_base = plan.allow_other_base
        there.rng_to_restore = None
        return
    # the others are left where they are
    changed = [name for name in HOOKS if getattr(kind, name) is not getattr(LightningModule, name)]
    plan.own_hooks = {name: vars(module).pop(name) for name in changed if name in vars(module)}
    vars(module)["_peft_plan"] = plan
    swap(module, kind)


def mark_buffers(module: AdaptedModule) -> None:
    """Note what the base's buffers hold as training starts, to tell later which of them it moved."""
    samples = {
        name: (sample_bytes(buffer, BUFFER_SAMPLES), buffer._version) for name, buffer in base_buffers(module).items()
    }
    module._peft_plan.buffers_at_start = samples


def go_on_with_random_numbers(module: AdaptedModule) -> None:
    """After a resume on as many devices, put the random number generators where the run that wrote the checkpoint had
    them on this rank; once."""
    trainer, states = module._trainer, module._peft_plan.rng_to_restore
    if states is not None and trainer is not None and trainer.world_size == len(states):
        set_rng_state(states[trainer.global_rank])
        module._peft_plan.rng_to_restore = None


def wake(module: nn.Module) -> None:
    """Put into train mode what has parameters to train but was left in eval mode, as `from_pretrained` leaves a
    model."""
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return
    if not module.training:
        module.train()
        return
    for child in module.children():
        wake(child)


def _awaited(model: nn.Module, adapter_name: str, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The adapter's tensors by key, with the shapes that they would take for `state`, and what it holds that none can
    have."""
    awaited: dict[str, Tensor] = {}
    faults = []
    for prefix, adapter in _own(model, adapter_name).items():
        given = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        try:
            own = adapter.awaits(given)
            awaited |= {f"{prefix}{key}": tensor for key, tensor in own.items()}
        except PEFTError as error:
            faults += [f"{prefix}{fault}" for fault in error.faults]
            awaited |= {key: value for key, value in state.items() if key.startswith(prefix)}
    return awaited, faults


def _own(model: nn.Module, adapter_name: str) -> dict[str, Adapter]:
    """The adapters of that name, by what the keys of their tensors begin with."""
    return {
        ".".join(filter(None, (path, "adapters", adapter_name))) + ".": cast(Adapter, module.adapters[adapter_name])
        for path, module in base_modules(model)
        if isinstance(module, Host) and adapter_name in module.adapters
    }


def _moved(buffers: Mapping[str, Tensor], at_start: Mapping[str, tuple[bytes, int]]) -> set[str]:
    def differs(name: str, buffer: Tensor) -> bool:
        sample, version = at_start[name]
        # a large buffer may have changed where it was not sampled
        unseen = buffer.numel() > BUFFER_SAMPLES and buffer._version != version
        return unseen or sample_bytes(buffer, BUFFER_SAMPLES) != sample

    return {name for name, buffer in buffers.items() if name in at_start and differs(name, buffer)}


def _metrics(module: LightningModule) -> dict[str, float]:
    """What was logged last, for whoever reads the checkpoint later on; nothing where a rank of several was interrupted,
    since a mean over ranks would wait for them."""
    trainer = module._trainer
    if trainer is None or (trainer.interrupted and trainer.world_size > 1):
        return {}
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _forgive_frozen_keys(module: nn.Module) -> None:
    # on the module itself and not in load_state_dict: WeightAveraging loads a copy of it as a child of its own module
    module.register_load_state_dict_post_hook(_forgive)  # type: ignore[no-untyped-call]


def _forgive(module: nn.Module, incompatible: Any) -> None:
    frozen = base_keys(module)

    def is_frozen(key: str) -> bool:
        parts = key.split(".")
        return any(".".join(parts[start:]) in frozen for start in range(len(parts)))

    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not is_frozen(key)]
