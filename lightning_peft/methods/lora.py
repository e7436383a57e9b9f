"""LoRA: a trained low-rank matrix beside a frozen weight."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_peft.methods import _lora_layers as layers
from lightning_peft.methods import _lora_peft, _lora_peft_tensors
from lightning_peft.methods._host import Adapter
from lightning_peft.methods._lora_init import FROM_ERROR
from lightning_peft.methods._quantized import is_quantized
from lightning_peft.methods._target_modules import CONVS, in_attention, linear_layers, once, with_attention_outputs
from lightning_peft.methods._targets import (
    ALL_LINEAR,
    base_modules,
    find,
    pattern_faults,
    pattern_value,
)
from lightning_peft.methods.base import Attachment, Method, PeftRoot, PeftTensor
from lightning_peft.methods.errors import PEFTError, suggestion

INITS = ("default", "gaussian", "pissa", "pissa_niter_16", "olora", FROM_ERROR)


@dataclass(kw_only=True)
class LoRA(Method):
    r"""y = Wx + s·BAx with W (out, in) frozen, A (r, in) and B (out, r) trained, s = α/r.

    At the start B is zero, so that the model's outputs are the frozen model's (for an embedding, A is). Source:
    arXiv 2106.09685.

    Raises:
        PEFTError: with every field that breaks its rule.
    """

    r: int = 8
    """Rank of the update, 1 or more."""
    alpha: float = 16
    """The update's scale is alpha / r."""
    dropout: float = 0.0
    """Probability of dropping an element of the layer's input on its way to A, below 1; embeddings have none."""
    target_modules: str | list[str] = ALL_LINEAR
    """Modules to adapt: names or path endings in a list, a regular expression for the whole path in a string, or
    "all-linear" for every Linear, Conv1D and MultiheadAttention outside of the output head."""
    target_parameters: list[str] = field(default_factory=list)
    """Names or path endings of weights of 2 or 3 dimensions that belong to no layer, such as `experts.gate_up_proj`."""
    exclude_modules: str | list[str] = field(default_factory=list)
    """Modules to leave out, written as `target_modules` are."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Rank by module name, path ending or regular expression of a path's end, where it differs from `r`."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alpha by module, as in `rank_pattern`."""
    rslora: bool = False
    """Scale by alpha / √r instead (rank-stabilized LoRA, arXiv 2312.03732)."""
    init: str = "default"
    """Start of A and B: "default" (Kaiming-uniform and zero), "gaussian" (normal with deviation 1/r, and zero), "pissa"
    (the largest singular values of W, arXiv 2404.02948), "pissa_niter_N" (the same by N power iterations, faster),
    "olora" (the QR factors of W, arXiv 2406.01775) or "loftq" (the largest singular values of what quantization takes
    from W, arXiv 2310.08659, with one step: outputs then start nearer to those of the base before it was quantized)."""
    lora_plus: float | None = None
    """Learning rate of B over that of A (LoRA+, arXiv 2402.12354; the paper's choice is 16). None: the same. A floor of
    the schedule (`eta_min`) is one for both."""

    learning_rate: ClassVar[float] = 1e-3
    training_only: ClassVar[frozenset[str]] = frozenset(
        {"dropout", "target_modules", "target_parameters", "exclude_modules", "lora_plus"}
    )
    peft_defaults: ClassVar[Mapping[str, Any]] = _lora_peft.DEFAULTS
    linear: ClassVar[type[layers.LowRank]] = layers.LinearLoRA
    conv: ClassVar[type[layers.LowRank]] = layers.ConvLoRA
    embedding: ClassVar[type[layers.LowRank]] = layers.EmbeddingLoRA
    weight: ClassVar[type[layers.WeightLoRA]] = layers.WeightLoRA

    def faults(self) -> list[str]:
        """What is wrong with the fields."""
        rules = {
            f"r: {self.r} is not a rank; it must be 1 or more": not _is_rank(self.r),
            f"alpha: {self.alpha} would switch the adapter off; it must not be 0": not self.alpha,
            f"dropout: {self.dropout} is not a probability below 1; it must be in [0, 1)": not 0 <= self.dropout < 1,
            "target_modules: is empty, and target_parameters too; name at least one": not (
                self.target_modules or self.target_parameters
            ),
            f"lora_plus: {self.lora_plus} is not a ratio of learning rates; it must be above 0": (
                self.lora_plus is not None and self.lora_plus <= 0
            ),
            f"init: {self.init!r} is none of {', '.join(INITS)}{suggestion(self.init, INITS)}": (
                self.init not in INITS and not re.fullmatch(r"pissa_niter_[1-9]\d*", self.init)
            ),
            **{
                f"rank_pattern: {key!r} has rank {r}; it must be 1 or more": not _is_rank(r)
                for key, r in self.rank_pattern.items()
            },
        }
        rules |= {
            f"alpha_pattern: {key!r} has alpha 0, which would switch its adapter off; it must not be 0": not alpha
            for key, alpha in self.alpha_pattern.items()
        }
        expressions = {
            "target_modules": self.target_modules if isinstance(self.target_modules, str) else [],
            "exclude_modules": self.exclude_modules if isinstance(self.exclude_modules, str) else [],
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
        }
        broken = [fault for name, patterns in expressions.items() for fault in pattern_faults(name, patterns)]
        return [fault for fault, is_broken in rules.items() if is_broken] + broken

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init == FROM_ERROR:
            vars(self).update(starts_from_error=True, identity_at_start=False)

    def error_ranks(self, model: nn.Module) -> dict[str, int]:
        """Of every targeted module, with the init "loftq"."""
        modules = self._modules(model, ())[0] if self.starts_from_error else {}
        return {path: pattern_value(self.rank_pattern, path, self.r) for path in modules}

    def attachments(self, model: nn.Module, skip: Container[str]) -> Sequence[Attachment]:
        """One adapter for each targeted module or parameter."""
        modules, faults = self._modules(model, skip)
        parameters, more = self._parameters(model, skip)
        faults += more + self._pattern_faults([*modules, *parameters])
        if self.starts_from_error and modules and not any(is_quantized(module) for module in modules.values()):
            faults.append(
                f"init: {self.init!r} starts from what quantization loses, and no targeted module is quantized; let "
                "PEFT(…, quantization='nf4-dq') quantize the base, or choose another init"
            )
        owners = dict(base_modules(model))
        made = []
        for path, module in modules.items():
            try:
                made.append(Attachment(path, module, self._adapter(path, module, in_attention(path, owners))))
            except PEFTError as error:
                faults += [f"target_modules: {path}: {fault}" for fault in error.faults]
        by_owner: dict[str, dict[str, str]] = {}
        for path in parameters:
            owner, _, name = path.rpartition(".")
            by_owner.setdefault(owner, {})[name] = path
        for owner, names in by_owner.items():
            if self.dropout:
                faults.append(f"dropout: {self.dropout} can't act on target_parameters ({owner}); set it to 0")
                continue
            if owner in modules:
                faults.append(f"target_parameters: {owner} is in target_modules too")
            ranks = {name: self._options(path) for name, path in names.items()}
            try:
                made.append(Attachment(owner, owners[owner], layers.WeightsLoRA(owners[owner], ranks, self.weight)))
            except PEFTError as error:
                faults += [f"target_parameters: {owner}: {fault}" for fault in error.faults]
        if faults:
            raise PEFTError([f"{type(self).__name__}.{fault}" for fault in dict.fromkeys(faults)])
        return once(made)

    def learning_rate_factors(self, attached: Mapping[str, Adapter]) -> dict[nn.Parameter, float]:
        """`lora_plus` for every B."""
        if self.lora_plus is None:
            return {}
        parts = [
            part for adapter in attached.values() for part in adapter.modules() if isinstance(part, layers.LowRank)
        ]
        return {part.lora_B: self.lora_plus for part in parts}

    @classmethod
    def reads_peft(cls, config: Mapping[str, Any]) -> bool:
        """HF peft counts DoRA to LoRA, and marks it by a field."""
        return super().reads_peft(config) and bool(config.get("use_dora")) == cls.peft_defaults["use_dora"]

    def to_peft(self, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, Any]:
        """Names are kept where they mean the same in HF peft."""
        return _lora_peft.to_peft(self, root, attached)

    def peft_tensors(self, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, PeftTensor]:
        """A, B and DoRA's magnitude."""
        return _lora_peft_tensors.peft_tensors(self.peft_prefix, root, attached)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], keys: Sequence[str], root: PeftRoot) -> LoRA:
        """Where the adapters go is taken from the keys."""
        return _lora_peft.from_peft(cls, config, keys, root)

    def _options(self, path: str) -> dict[str, Any]:
        r = pattern_value(self.rank_pattern, path, self.r)
        alpha = pattern_value(self.alpha_pattern, path, self.alpha)
        scale = alpha / math.sqrt(r) if self.rslora else alpha / r
        return {"r": r, "scale": scale, "dropout": self.dropout, "init": self.init}

    def _adapter(self, path: str, module: nn.Module, is_read: bool) -> Adapter:
        options = self._options(path)
        if isinstance(module, nn.MultiheadAttention):
            names = [name for name, value in module.named_parameters(recurse=False) if name.endswith("proj_weight")]
            return layers.WeightsLoRA(module, dict.fromkeys(names, options), self.weight)
        if is_read:
            # attention reads its output layer's weight, and never calls the layer
            return layers.WeightsLoRA(module, {"weight": options}, self.weight)
        kind = self.conv if isinstance(module, CONVS) else self.linear
        return (self.embedding if isinstance(module, nn.Embedding) else kind)(module, **options)

    def _modules(self, model: nn.Module, skip: Container[str]) -> tuple[dict[str, nn.Module], list[str]]:
        modules = dict(base_modules(model))
        if self.target_modules == ALL_LINEAR:
            linear = linear_layers(model)
            if not linear:
                return {}, [
                    f"target_modules: {ALL_LINEAR!r} matches nothing; {type(model).__name__} has no linear layer"
                ]
            found, faults = find(
                "target_modules", r".*", linear, layers.is_adaptable, self.exclude_modules, skip, _describe
            )
        else:
            found, faults = find(
                "target_modules",
                self.target_modules,
                modules,
                layers.is_adaptable,
                self.exclude_modules,
                skip,
                _describe,
            )
        return with_attention_outputs(found, self.exclude_modules), faults

    def _parameters(self, model: nn.Module, skip: Container[str]) -> tuple[dict[str, Tensor], list[str]]:
        if not self.target_parameters:
            return {}, []
        parameters: dict[str, Tensor] = {
            f"{path}.{name}" if path else name: parameter
            for path, module in base_modules(model)
            for name, parameter in module.named_parameters(recurse=False)
        }
        return find(
            "target_parameters",
            self.target_parameters,
            parameters,
            lambda parameter: parameter.dim() in (2, 3),
            [],
            skip,
            lambda parameter: f"of shape {tuple(parameter.shape)}",
        )

    def _pattern_faults(self, paths: Sequence[str]) -> list[str]:
        names = {path.rsplit(".", 1)[-1] for path in paths}
        return [
            f"{name}: {key!r} matches no targeted module{suggestion(key, sorted(names))}"
            for name, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern))
            for key in patterns
            if paths and not any(pattern_value({key: True}, path, False) for path in paths)
        ]


def _is_rank(r: object) -> bool:
    return isinstance(r, int) and r >= 1


def _describe(module: nn.Module) -> str:
    return f"a {type(module).__name__}"
