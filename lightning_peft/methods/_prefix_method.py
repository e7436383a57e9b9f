"""What prefix tuning and P-tuning v2 have in common: where the prefix goes, the rules of its fields, its files."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from lightning_peft.methods import _prefix_peft
from lightning_peft.methods._host import Adapter
from lightning_peft.methods._prefix import PrefixAdapter
from lightning_peft.methods._prefix_targets import attention_modules, position_shifts
from lightning_peft.methods._target_modules import once
from lightning_peft.methods._targets import expression_faults
from lightning_peft.methods.base import Attachment, Method, PeftRoot, PeftTensor
from lightning_peft.methods.errors import PEFTError


@dataclass(kw_only=True)
class PrefixMethod(Method):
    """A prefix in front of the keys and values of transformers' attention; a subclass says what it is made from."""

    num_virtual_tokens: int
    """How many keys and values are put in front, 1 or more."""
    target_modules: str | list[str] | None = None
    """Attention modules: names or path endings in a list, a regular expression for the whole path in a string. None:
    every attention; an encoder-decoder's three kinds have a prefix each."""
    exclude_modules: str | list[str] = field(default_factory=list)
    """Attention modules to leave out, written as `target_modules` are."""

    identity_at_start: ClassVar[bool] = False
    training_only: ClassVar[frozenset[str]] = frozenset({"target_modules", "exclude_modules"})
    peft_defaults: ClassVar[Mapping[str, Any]] = _prefix_peft.DEFAULTS
    peft_prefix: ClassVar[str] = "base_model."

    def faults(self) -> list[str]:
        """What is wrong with the fields."""
        n = self.num_virtual_tokens
        faults = [] if isinstance(n, int) and n >= 1 else [f"num_virtual_tokens: {n} is no number of them; at least 1"]
        if self.target_modules is not None and not self.target_modules:
            faults.append("target_modules: is empty; name attention modules, or leave it out for all of them")
        expressions = {"target_modules": self.target_modules, "exclude_modules": self.exclude_modules}
        return faults + expression_faults(expressions)

    def prefixes(self, modules: Mapping[str, nn.Module]) -> dict[str, PrefixAdapter]:
        """An adapter for each attention module, by path."""
        raise NotImplementedError

    def attachments(self, model: nn.Module, skip: Container[str]) -> Sequence[Attachment]:
        """One adapter for each attention, and one for each module that gives tokens their positions."""
        modules, faults = attention_modules(model, self.target_modules, self.exclude_modules, skip)
        shifts: list[Attachment] = []
        try:
            shifts = position_shifts(model, modules, self.num_virtual_tokens)
        except PEFTError as error:
            faults += error.faults
        if faults:
            raise PEFTError([f"{type(self).__name__}.{fault}" for fault in dict.fromkeys(faults)])
        unique = {id(module): path for path, module in reversed(modules.items())}
        named = {path: module for path, module in modules.items() if unique[id(module)] == path}
        made = [Attachment(path, named[path], adapter) for path, adapter in self.prefixes(named).items()]
        return once([*made, *shifts])

    def to_peft(self, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, Any]:
        """The sizes; what the MLP makes is written, and not the MLP."""
        return _prefix_peft.to_peft(root, attached)

    def peft_tensors(self, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, PeftTensor]:
        """One tensor for all layers."""
        return _prefix_peft.peft_tensors(attached)
