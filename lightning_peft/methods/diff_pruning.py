"""Diff pruning: a few entries of the weights are trained, and training finds out which."""

from __future__ import annotations

import math
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from lightning_peft.methods import _diff_layers as layers
from lightning_peft.methods._host import Adapter, own_tensors
from lightning_peft.methods._quantized import is_quantized
from lightning_peft.methods._target_modules import once, targeted
from lightning_peft.methods._targets import base_modules, expression_faults, inside, matches
from lightning_peft.methods.base import Attachment, Method
from lightning_peft.methods.errors import PEFTError, some

GATE_RATE = 100.0
"""The gates' learning rate in multiples of w's: α has to travel several units, w a small fraction of one."""


@dataclass(kw_only=True)
class DiffPruning(Method):
    r"""θ = θ₀ + z ⊙ w with θ₀ frozen, w (of θ's shape) trained and each gate z in [0, 1] hard-concrete.

    z = min(1, max(0, s·(r − l) + l)) with s = σ(log u − log(1 − u) + α), l = −1.5, r = 1.5, u uniform in training and
    1/2 in evaluation, α trained. The loss gets the term λ·Σ σ(α − log(−l/r)), λ times the expected number of open
    gates. After the step prune_at of training the largest |z ⊙ w| are kept, `target` of all; they become w and train
    on, and what is saved are their places and values. At the start w is 0, and the model's outputs are the frozen
    model's. Source: arXiv 2012.07463, sections 3.1 to 3.4.

    A file of weights holds the place (4 bytes, or 8 in a module of more than 2³¹ entries) and the value (of w's dtype)
    of each kept entry. The rest of it is at most 4,000 bytes, of Lightning's and the description of method and base,
    and 640 for each module with a path of up to 50 characters, for names and headers of its two tensors. With int32 and
    float32 it is so within 20 % of the entries themselves where 2,500 + 400·modules or more are kept. A training that
    ends before it prunes, as by early stopping, saves w and α of every entry.

    Raises:
        PEFTError: with every field that breaks its rule.
    """

    target: float = 0.005
    """The share of all targeted entries that is kept in the end, above 0 and below 1."""
    l0_weight: float = 1.25e-7
    """λ, the weight in the loss of each gate that is expected to be open, 0 or more."""
    structured: bool = True
    """Gate each parameter as a whole too: z = z_entry · z_parameter."""
    alpha_init: float = 5.0
    """α of every gate at the start; at 5 a gate is open with probability 0.993."""
    prune_at: float = 0.5
    """The share of all optimizer steps that is taken before pruning, above 0 and below 1. What is kept needs the rest,
    at learning rates that have not decayed yet, to make up for what was cut; the original experiments take as many
    steps after it as before."""
    target_modules: str | list[str] | None = None
    """Modules whose own parameters are trained: names or path endings in a list, a regular expression for the whole
    path in a string, or "all-linear". Not given: every module that has parameters of its own."""
    exclude_modules: str | list[str] = field(default_factory=list)
    """Modules to leave out, written as `target_modules` are."""
    total_steps: int | None = None
    """Optimizer steps of the whole training. None: the Trainer's; name them where training is to go on beyond its
    max_epochs later."""

    learning_rate: ClassVar[float] = 1e-3
    """Of w, for AdamW, where every module is trained: until it is pruned that is full fine-tuning. For a few modules
    (query and value) 1e-2 is better. The gates' rate is `GATE_RATE` times as high."""
    prunes: ClassVar[bool] = True
    training_only: ClassVar[frozenset[str]] = frozenset(
        {"target", "l0_weight", "alpha_init", "prune_at", "target_modules", "exclude_modules", "total_steps"}
    )

    def faults(self) -> list[str]:
        """What is wrong with the fields."""
        rules = {
            f"target: {self.target} is no share to keep; it must be above 0, which would keep nothing, and below 1, "
            "which would keep all": not 0 < self.target < 1,
            f"l0_weight: {self.l0_weight} is no weight of a penalty; it must be 0 or more": not self.l0_weight >= 0,
            f"alpha_init: {self.alpha_init} is no number to start from; it must be finite": (
                not math.isfinite(self.alpha_init)
            ),
            f"prune_at: {self.prune_at} is no share of the steps to prune after; it must be above 0 and below 1, so "
            "that what is kept trains on": not 0 < self.prune_at < 1,
            "target_modules: is empty; name at least one, or leave it out for every module with parameters": (
                self.target_modules is not None and not self.target_modules
            ),
            f"total_steps: {self.total_steps} is no number of steps; it must be 1 or more": (
                self.total_steps is not None and self.total_steps < 1
            ),
        }
        expressions = {"target_modules": self.target_modules, "exclude_modules": self.exclude_modules}
        return [fault for fault, is_broken in rules.items() if is_broken] + expression_faults(expressions)

    def attachments(self, model: nn.Module, skip: Container[str]) -> Sequence[Attachment]:
        """One adapter for each targeted module; tied parameters share one diff."""
        found, faults = self.targets(model, skip)
        if quantized := [path for path, module in found.items() if is_quantized(module)]:
            raise PEFTError(
                f"DiffPruning.target_modules: {some(quantized, 1)} {'are' if quantized[1:] else 'is'} quantized, and a "
                "trained difference to every weight would be as large as the model in full precision: nothing would be "
                "saved; leave quantization out, exclude them (exclude_modules), or choose LoRA"
            )
        diffs: dict[int, layers.Diff] = {}
        made = []
        for path, module in found.items():
            try:
                made.append(Attachment(path, module, self._adapter(module, diffs)))
            except PEFTError as error:
                faults += [f"target_modules: {path}: {fault}" for fault in error.faults]
        entries = sum(diff.shape.numel() for diff in diffs.values())
        kept = round(self.target * entries)
        if made and not faults and not 0 < kept < entries:
            faults.append(
                f"target: {self.target} of the {entries} targeted entries is {kept}; it must keep one at least, and "
                "leave one out at least"
            )
        if faults:
            raise PEFTError([f"DiffPruning.{fault}" for fault in dict.fromkeys(faults)])
        return once(made)

    def targets(self, model: nn.Module, skip: Container[str]) -> tuple[dict[str, nn.Module], list[str]]:
        """The modules by path, and what is wrong with the fields."""
        every = r".*" if self.target_modules is None else self.target_modules
        found, faults = targeted(model, every, _has_parameters, self.exclude_modules, skip, _describe)
        modules = dict(base_modules(model))
        for path, module in list(found.items()):
            output = f"{path}.out_proj"
            # attention's output layer is part of its attention
            if isinstance(module, nn.MultiheadAttention) and not (
                inside(output, skip) or matches(output, self.exclude_modules)
            ):
                found[output] = modules[output]
        # of tied parameters the model's first stores the diff, however they are named
        return {path: module for path, module in modules.items() if path in found}, faults

    def learning_rate_factors(self, attached: Mapping[str, Adapter]) -> dict[nn.Parameter, float]:
        """The gates learn faster."""
        diffs = layers.all_diffs(attached)
        return {gate: GATE_RATE for diff in diffs for gate in (diff.alpha, diff.group_alpha) if gate is not None}

    def penalty(self, attached: Mapping[str, Adapter]) -> Tensor | None:
        """λ times the expected number of open gates, until it is pruned."""
        diffs = layers.all_diffs(attached)
        if not self.l0_weight or not diffs or diffs[0].is_pruned:
            return None
        return self.l0_weight * _expected_kept(diffs)

    def start(self, attached: Mapping[str, Adapter], total_steps: float) -> None:
        """Tell when it will be pruned.

        Raises:
            PEFTError: nothing says how long training takes.
        """
        total = self.total_steps or total_steps
        if not 0 < total < math.inf:
            raise PEFTError(
                "DiffPruning.total_steps: nothing says how many steps prune_at is a share of; give total_steps, or the "
                "Trainer max_epochs or max_steps"
            )
        if total_steps < self._prune_step(total):
            warnings.warn(
                f"DiffPruning: this training ends after step {total_steps:.0f}, and it is pruned after step "
                f"{self._prune_step(total)} of total_steps {total:.0f}",
                stacklevel=2,
            )

    def after_step(self, attached: Mapping[str, Adapter], step: int, total_steps: float) -> None:
        """Prune, once the step for it is reached. Where fewer gates are open than are kept, the largest w of the others
        are opened."""
        diffs = layers.all_diffs(attached)
        if step >= self._prune_step(self.total_steps or total_steps) and diffs and not diffs[0].is_pruned:
            layers.prune(diffs, round(self.target * _entries(diffs)))

    def report(self, attached: Mapping[str, Adapter]) -> dict[str, float]:
        """The share of entries that are changed: the expected one, and the true one once it is pruned."""
        diffs = layers.all_diffs(attached)
        return {"kept_share": float(_expected_kept(diffs).detach()) / _entries(diffs)}

    def report_layers(self, attached: Mapping[str, Adapter]) -> dict[str, dict[str, float]]:
        """The same of each module."""
        by_module = {path: layers.all_diffs({path: adapter}) for path, adapter in attached.items()}
        shares = {
            path: float(_expected_kept(diffs).detach()) / _entries(diffs) for path, diffs in by_module.items() if diffs
        }
        return {"kept_share": shares}

    def _prune_step(self, total: float) -> int:
        return math.ceil(self.prune_at * total)

    def _adapter(self, module: nn.Module, diffs: dict[int, layers.Diff]) -> Adapter:
        if getattr(module, "sparse", False) and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            raise PEFTError(f"{type(module).__name__} has sparse gradients, which no gate can take; build it without")
        own: dict[str, layers.Diff] = {}
        owned = []
        for name, tensor in _parameters(module).items():
            if isinstance(tensor, nn.UninitializedParameter):
                raise PEFTError(f"{type(module).__name__} has no shape yet; run one batch through the model first")
            if id(tensor) not in diffs:
                diffs[id(tensor)] = layers.Diff(tensor, self.alpha_init, self.structured)
                owned.append(name)
            own[name] = diffs[id(tensor)]
        return layers.Diffs(own, owned)


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in own_tensors(module).items()
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    }


def _has_parameters(module: nn.Module) -> bool:
    return bool(_parameters(module)) or is_quantized(module)


def _describe(module: nn.Module) -> str:
    return f"a {type(module).__name__} without parameters of its own"


def _entries(diffs: Sequence[layers.Diff]) -> int:
    return sum(diff.shape.numel() for diff in diffs)


def _expected_kept(diffs: Sequence[layers.Diff]) -> Tensor:
    total = diffs[0].expected_kept()
    for diff in diffs[1:]:
        total = total + diff.expected_kept().to(total.device)
    return total
