"""AdaLoRA: low-rank updates whose ranks are shared out in training, to the matrices where they matter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.methods import _adalora_layers as layers
from lightning_peft.methods import _adalora_peft
from lightning_peft.methods._host import Adapter
from lightning_peft.methods._lora_layers import WeightsLoRA
from lightning_peft.methods._target_modules import in_attention, once, targeted, with_attention_outputs
from lightning_peft.methods._targets import ALL_LINEAR, base_modules, expression_faults, is_conv1d
from lightning_peft.methods.base import Attachment, Method, PeftRoot, PeftTensor
from lightning_peft.methods.errors import PEFTError

EPSILON = 1e-5
"""HF peft adds it to the rank that it divides by, and its files are to mean the same here."""


@dataclass(kw_only=True)
class AdaLoRA(Method):
    r"""y = Wx + s·B Λ A x with W (out, in) frozen, A (r, in), B (out, r) and the diagonal Λ trained, s = α/r.

    At the start Λ is zero, so that the model's outputs are the frozen model's. The loss gets the term
    γ·Σ(‖AAᵀ − I‖²_F + ‖BᵀB − I‖²_F) over all matrices, by which Λ comes to hold singular values. After each optimizer
    step t the b(t) most important ones of all matrices stay, and the others are set to zero:
    b(t) = b_T + (b_0 − b_T)·(1 − (t − tinit)/(T − tfinal − tinit))³. A weight's importance is the running average of
    |w·∂L/∂w| times that of its deviation; to λᵢ's are added the means of those of Aᵢ and of Bᵢ. Source: arXiv
    2303.10512, sections 3.1 to 3.3; the scale, A, B and Λ are HF peft's.

    Raises:
        PEFTError: with every field that breaks its rule.
    """

    init_r: int = 12
    """Rank of every matrix at the start, 1 or more; the scale is alpha / init_r throughout."""
    target_r: int = 8
    """Mean rank in the end: target_r times the number of matrices singular values stay, wherever they are."""
    alpha: float = 16
    """The update's scale is alpha / init_r."""
    dropout: float = 0.0
    """Probability of dropping an element of the layer's input on its way to A, below 1."""
    target_modules: str | list[str] = ALL_LINEAR
    """Modules to adapt: names or path endings in a list, a regular expression for the whole path in a string, or
    "all-linear" for every Linear, Conv1D and MultiheadAttention outside of the output head."""
    exclude_modules: str | list[str] = field(default_factory=list)
    """Modules to leave out, written as `target_modules` are."""
    tinit: int | None = None
    """Optimizer steps before the first singular value is pruned. None: a tenth of all, in which the averages settle."""
    tfinal: int | None = None
    """Optimizer steps after the last one is pruned. None: three tenths of all, in which the others make up for it."""
    delta_t: int = 1
    """Optimizer steps from one pruning to the next (HF peft's deltaT)."""
    beta1: float = 0.85
    """Weight of the past in the average of sensitivities, above 0 and below 1."""
    beta2: float = 0.85
    """Weight of the past in the average of their deviations, above 0 and below 1."""
    orth_reg_weight: float = 0.1
    """γ, the weight of the orthogonality of A and B in the loss. It is the paper's, of a sum of squared norms; HF
    peft's weighs the mean of the norms themselves."""
    total_steps: int | None = None
    """Optimizer steps T of the whole training. None: the Trainer's. Name them where training is to go on beyond its
    max_epochs later, and where manual optimization takes fewer or more steps than it has batches."""

    learning_rate: ClassVar[float] = 1e-2
    """A good start for AdamW: A and B start small, and Λ at zero between them."""
    prunes: ClassVar[bool] = True
    training_only: ClassVar[frozenset[str]] = frozenset(
        {"target_r", "dropout", "target_modules", "exclude_modules", "tinit", "tfinal", "delta_t", "beta1", "beta2"}
        | {"orth_reg_weight", "total_steps"}
    )
    peft_defaults: ClassVar[Mapping[str, Any]] = _adalora_peft.DEFAULTS

    def __post_init__(self) -> None:
        super().__post_init__()
        # no field: a new adapter keeps all, and a checkpoint has them among its tensors
        self.kept_at_start: dict[str, list[bool]] = {}

    def faults(self) -> list[str]:
        """What is wrong with the fields."""
        whole = {
            f"init_r: {self.init_r} is not a rank; it must be 1 or more": self.init_r < 1,
            f"target_r: {self.target_r} is not a rank; it must be 1 or more": self.target_r < 1,
            f"target_r: {self.target_r} is a budget larger than the start, init_r {self.init_r}; it must be at most "
            "that": 1 <= self.init_r < self.target_r,
            f"alpha: {self.alpha} is not a scale; it must be above 0": self.alpha <= 0,
            f"dropout: {self.dropout} is not a probability below 1; it must be in [0, 1)": not 0 <= self.dropout < 1,
            "target_modules: is empty; name at least one": not self.target_modules,
            f"tinit: {self.tinit} is no number of steps; it must be 0 or more": (self.tinit or 0) < 0,
            f"tfinal: {self.tfinal} is no number of steps; it must be 0 or more": (self.tfinal or 0) < 0,
            f"delta_t: {self.delta_t} is no number of steps; it must be 1 or more": self.delta_t < 1,
            f"beta1: {self.beta1} is not a weight of the past; it must be in (0, 1)": not 0 < self.beta1 < 1,
            f"beta2: {self.beta2} is not a weight of the past; it must be in (0, 1)": not 0 < self.beta2 < 1,
            f"orth_reg_weight: {self.orth_reg_weight} would drive A and B apart from orthogonality; it must be 0 or "
            "more": self.orth_reg_weight < 0,
            f"total_steps: {self.total_steps} is no number of steps; it must be 1 or more": (
                self.total_steps is not None and self.total_steps < 1
            ),
        }
        expressions = {"target_modules": self.target_modules, "exclude_modules": self.exclude_modules}
        found = [fault for fault, is_broken in whole.items() if is_broken]
        found += expression_faults(expressions)
        return found if found or self.total_steps is None else self._schedule_faults(self.total_steps)

    def attachments(self, model: nn.Module, skip: Container[str]) -> Sequence[Attachment]:
        """One adapter for each targeted module."""
        found, faults = self.targets(model, skip)
        modules = dict(base_modules(model))
        made = []
        for path, module in found.items():
            try:
                made.append(Attachment(path, module, self._adapter(path, module, in_attention(path, modules))))
            except PEFTError as error:
                faults += [f"target_modules: {path}: {fault}" for fault in error.faults]
        if faults:
            raise PEFTError([f"AdaLoRA.{fault}" for fault in dict.fromkeys(faults)])
        return once(made)

    def targets(self, model: nn.Module, skip: Container[str]) -> tuple[dict[str, nn.Module], list[str]]:
        """The modules to adapt by path, and what is wrong with the fields."""
        found, faults = targeted(model, self.target_modules, _is_adaptable, self.exclude_modules, skip, _describe)
        return with_attention_outputs(found, self.exclude_modules), faults

    def penalty(self, attached: Mapping[str, Adapter]) -> Tensor | None:
        """γ times the sum over matrices of how far A and B are from orthonormal."""
        parts = list(layers.parts_of(attached).values())
        if not self.orth_reg_weight or not parts:
            return None
        device = parts[0].lora_A.device
        return self.orth_reg_weight * torch.stack([part.orthogonality().to(device) for part in parts]).sum()

    def start(self, attached: Mapping[str, Adapter], total_steps: float) -> None:
        """Tell whether the schedule fits into the training.

        Raises:
            PEFTError: nothing says how long training takes, or it leaves no step to prune in.
        """
        total = self.total_steps or total_steps
        if not 0 < total < math.inf:
            raise PEFTError(
                "AdaLoRA.total_steps: nothing says how many steps the budget has to fall in; give total_steps, or the "
                "Trainer max_epochs or max_steps"
            )
        if faults := self._schedule_faults(total):
            raise PEFTError([f"AdaLoRA.{fault}" for fault in faults])
        last = layers.schedule(self.tinit, self.tfinal, total).last
        if 0 < total_steps < last:
            warnings.warn(
                f"AdaLoRA: this training ends after step {total_steps:.0f}, and the budget is reached at step {last} "
                f"of total_steps {total:.0f}",
                stacklevel=2,
            )

    def after_step(self, attached: Mapping[str, Adapter], step: int, total_steps: float) -> None:
        """Observe the gradients, and prune to the step's budget; from the last pruning on the same ones are kept."""
        schedule = layers.schedule(self.tinit, self.tfinal, self.total_steps or total_steps)
        parts = list(layers.parts_of(attached).values())
        if step < schedule.last:
            for part in parts:
                part.observe(self.beta1, self.beta2)
        if step >= schedule.last or (step > schedule.tinit and step % self.delta_t == 0):
            # the averages stand still in the end, and so does what they say
            budget = schedule.budget(step, self.init_r * len(parts), self.target_r * len(parts))
            layers.allocate(parts, budget)

    def report(self, attached: Mapping[str, Adapter]) -> dict[str, float]:
        """The mean rank of all matrices."""
        ranks = self.ranks(attached)
        return {"mean_rank": sum(ranks.values()) / len(ranks)}

    def report_layers(self, attached: Mapping[str, Adapter]) -> dict[str, dict[str, float]]:
        """The rank of each matrix."""
        return {"rank": {path: float(rank) for path, rank in self.ranks(attached).items()}}

    def ranks(self, attached: Mapping[str, Adapter]) -> dict[str, int]:
        """How many singular values the last allocation left to each matrix, by the path of its module."""
        return {path: int(part.mask.sum()) for path, part in layers.parts_of(attached).items()}

    def to_peft(self, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, Any]:
        """Names are kept where they mean the same in HF peft."""
        return _adalora_peft.to_peft(self, root, attached)

    def peft_tensors(self, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, PeftTensor]:
        """What was not pruned of A, Λ and B."""
        return _adalora_peft.peft_tensors(self.peft_prefix, root, attached)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], keys: Sequence[str], root: PeftRoot) -> AdaLoRA:
        """Where the adapters go is taken from the keys, and what was pruned from rank_pattern."""
        return _adalora_peft.from_peft(cls, config, keys, root)

    def _schedule_faults(self, total: float) -> list[str]:
        tinit, last = layers.schedule(self.tinit, self.tfinal, total)
        if tinit < last:
            return []
        return [
            f"tinit: {tinit} steps before pruning and {total - last:.0f} after it (tfinal) leave none for it in "
            f"{total:.0f} steps; tinit + tfinal must be below {total:.0f}"
        ]

    def _adapter(self, path: str, module: nn.Module, is_read: bool) -> Adapter:
        options = {"r": self.init_r, "scale": self.alpha / (self.init_r + EPSILON), "dropout": self.dropout}
        if isinstance(module, nn.MultiheadAttention):
            names = [name for name, _ in module.named_parameters(recurse=False) if name.endswith("proj_weight")]
            return WeightsLoRA(module, dict.fromkeys(names, options), layers.WeightSVD)
        if is_read:
            # attention reads its output layer's weight, and never calls the layer
            return WeightsLoRA(module, {"weight": options}, layers.WeightSVD)
        adapter = layers.LinearSVD(module, **options)
        if path in self.kept_at_start:
            adapter.mask.copy_(torch.tensor(self.kept_at_start[path]))
        return adapter


def _is_adaptable(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.MultiheadAttention)) or is_conv1d(module)


def _describe(module: nn.Module) -> str:
    return f"a {type(module).__name__} (AdaLoRA prunes singular values of linear layers only)"
