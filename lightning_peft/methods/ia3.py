"""(IA)³: trained vectors that scale keys, values and feed-forward activations."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from lightning_peft.methods import _ia3_layers as layers
from lightning_peft.methods import _ia3_peft
from lightning_peft.methods._host import Adapter
from lightning_peft.methods._ia3_targets import found_projections
from lightning_peft.methods._target_modules import in_attention, once, targeted
from lightning_peft.methods._targets import base_modules, expression_faults, find, matches
from lightning_peft.methods.base import Attachment, Method, PeftRoot, PeftTensor
from lightning_peft.methods.errors import PEFTError, some, suggestion


@dataclass(kw_only=True)
class IA3(Method):
    r"""k ⊙ l_k, v ⊙ l_v, and l_ff ⊙ f(W₁x) before W₂, with a trained vector l for each.

    At the start l is 1, so that the model's outputs are the frozen model's. Source: arXiv 2205.05638, section 3.3.

    Raises:
        PEFTError: with every field that breaks its rule.
    """

    target_modules: str | list[str] | None = None
    """Modules to scale: names or path endings in a list, a regular expression for the whole path in a string, or
    "all-linear". Not given: the projections of keys and values and the last layers of feed-forward blocks, by the names
    that they have in transformers. Outputs are scaled (of a MultiheadAttention its keys and values), except in
    `feedforward_modules`."""
    feedforward_modules: str | list[str] = field(default_factory=list)
    """Those of `target_modules` whose inputs are scaled, written in the same way; found where `target_modules` are."""
    exclude_modules: str | list[str] = field(default_factory=list)
    """Modules to leave out, written as `target_modules` are."""

    learning_rate: ClassVar[float] = 3e-2
    training_only: ClassVar[frozenset[str]] = frozenset({"target_modules", "exclude_modules"})
    peft_defaults: ClassVar[Mapping[str, Any]] = _ia3_peft.DEFAULTS

    def faults(self) -> list[str]:
        """What is wrong with the fields."""
        faults = []
        if self.target_modules is not None and not self.target_modules:
            faults.append(
                "target_modules: is empty; name at least one, or leave it out for keys, values and feed-forward blocks"
            )
        if self.target_modules is None and self.feedforward_modules:
            faults.append("feedforward_modules: is some of target_modules, which are not given; name both or neither")
        expressions = {
            "target_modules": self.target_modules,
            "feedforward_modules": self.feedforward_modules,
            "exclude_modules": self.exclude_modules,
        }
        return faults + expression_faults(expressions)

    def attachments(self, model: nn.Module, skip: Container[str]) -> Sequence[Attachment]:
        """One adapter for each targeted module."""
        found, feedforward, faults = self.targets(model, skip)
        modules = dict(base_modules(model))
        made = []
        for path, module in found.items():
            try:
                adapter = _adapter(module, path in feedforward, in_attention(path, modules))
                made.append(Attachment(path, module, adapter))
            except PEFTError as error:
                faults += [f"target_modules: {path}: {fault}" for fault in error.faults]
        if faults:
            raise PEFTError([f"{type(self).__name__}.{fault}" for fault in dict.fromkeys(faults)])
        return once(made)

    def targets(self, model: nn.Module, skip: Container[str]) -> tuple[dict[str, nn.Module], set[str], list[str]]:
        """The modules to scale by path, which of them at their inputs, and what is wrong with the fields."""
        if self.target_modules is None:
            return self._found_targets(model, skip)
        found, faults = targeted(model, self.target_modules, layers.is_scalable, self.exclude_modules, skip, _describe)
        faults += self._feedforward_faults(found)
        return found, {path for path in found if matches(path, self.feedforward_modules)}, faults

    def _found_targets(
        self, model: nn.Module, skip: Container[str]
    ) -> tuple[dict[str, nn.Module], set[str], list[str]]:
        known, feedforward = found_projections(model)
        if known:
            found, faults = find(
                "target_modules", r".*", known, layers.is_scalable, self.exclude_modules, skip, _describe
            )
            return found, feedforward, faults
        names = {path.rpartition(".")[2] for path, module in base_modules(model) if layers.is_scalable(module)}
        fault = (
            f"target_modules: {type(model).__name__} has no layer that is known for a key, value or feed-forward "
            f"projection{_named(sorted(names - {''}))}"
        )
        return {}, set(), [fault]

    def _feedforward_faults(self, found: Mapping[str, nn.Module]) -> list[str]:
        names = sorted({path.rpartition(".")[2] for path in found})
        given = self.feedforward_modules
        faults = [
            f"feedforward_modules: {pattern!r} matches no targeted module{suggestion(pattern, names)}"
            for pattern in ([given] if isinstance(given, str) else given)
            if pattern and found and not any(matches(p, given if isinstance(given, str) else [pattern]) for p in found)
        ]
        return faults + [
            f"feedforward_modules: {path} is a MultiheadAttention, whose keys and values are scaled, not its inputs"
            for path, module in found.items()
            if isinstance(module, nn.MultiheadAttention) and matches(path, given)
        ]

    def to_peft(self, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, Any]:
        """Names are kept where they mean the same in HF peft."""
        return _ia3_peft.to_peft(self, root, attached)

    def peft_tensors(self, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, PeftTensor]:
        """The vectors."""
        return _ia3_peft.peft_tensors(self.peft_prefix, root, attached)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], keys: Sequence[str], root: PeftRoot) -> IA3:
        """Where the vectors go is taken from the keys."""
        return _ia3_peft.from_peft(cls, config, keys, root)


def _adapter(module: nn.Module, on_input: bool, is_read: bool) -> Adapter:
    if isinstance(module, nn.MultiheadAttention):
        return layers.AttentionScaling(module)
    return layers.LayerScaling(module, on_input=on_input, is_read=is_read)


def _describe(module: nn.Module) -> str:
    return f"a {type(module).__name__}"


def _named(names: Sequence[str]) -> str:
    return f"; name them; names that can be: {some(names, 8)}" if names else ", and none that can be scaled"
