"""BitFit: the biases are all that is trained."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from lightning_peft.methods import _bitfit_layers as layers
from lightning_peft.methods import _bitfit_peft
from lightning_peft.methods._host import Adapter
from lightning_peft.methods._target_modules import in_attention, once, targeted
from lightning_peft.methods._targets import base_modules, expression_faults, find, inside, matches, output_heads
from lightning_peft.methods.base import Attachment, Method, PeftRoot, PeftTensor
from lightning_peft.methods.errors import PEFTError


@dataclass(kw_only=True)
class BitFit(Method):
    r"""y = Wx + b with W frozen and b trained, and so in normalization layers and all else that has a bias.

    The frozen b stays beside its trained copy. At the start the model's outputs are the frozen model's. Source:
    arXiv 2106.10199.

    Raises:
        PEFTError: with every field that breaks its rule.
    """

    target_modules: str | list[str] | None = None
    """Modules whose own biases are trained: names or path endings in a list, a regular expression for the whole path in
    a string, or "all-linear". Not given: every module that has a bias. A batch normalization's statistics stay."""
    exclude_modules: str | list[str] = field(default_factory=list)
    """Modules to leave out, written as `target_modules` are."""
    add_missing: bool = False
    """Give a bias of zeros to each Linear, Conv1D and convolution in `target_modules` that has none; where those are
    not given, to each one outside of the output head."""

    learning_rate: ClassVar[float] = 1e-2
    training_only: ClassVar[frozenset[str]] = frozenset({"target_modules", "exclude_modules", "add_missing"})
    peft_defaults: ClassVar[Mapping[str, Any]] = _bitfit_peft.DEFAULTS

    def faults(self) -> list[str]:
        """What is wrong with the fields."""
        faults = []
        if self.target_modules is not None and not self.target_modules:
            faults.append("target_modules: is empty; name at least one, or leave it out for every module with a bias")
        expressions = {"target_modules": self.target_modules, "exclude_modules": self.exclude_modules}
        return faults + expression_faults(expressions)

    def attachments(self, model: nn.Module, skip: Container[str]) -> Sequence[Attachment]:
        """One adapter for each module that has a bias, or is given one."""
        found, faults = self.targets(model, skip)
        shared: dict[int, nn.Parameter] = {}
        made = []
        for path, module in found.items():
            names = layers.bias_names(module)
            try:
                adapter = layers.Biases(module, names, shared) if names else layers.AddedBias(module)
                made.append(Attachment(path, module, adapter))
            except PEFTError as error:
                faults += [f"target_modules: {path}: {fault}" for fault in error.faults]
        if faults:
            raise PEFTError([f"{type(self).__name__}.{fault}" for fault in dict.fromkeys(faults)])
        return once(made)

    def targets(self, model: nn.Module, skip: Container[str]) -> tuple[dict[str, nn.Module], list[str]]:
        """The modules by path, and what is wrong with the fields."""
        modules = dict(base_modules(model))
        without = {
            id(module)
            for path, module in modules.items()
            if self.add_missing and layers.lacks_bias(module) and not in_attention(path, modules)
        }

        def is_usable(module: nn.Module) -> bool:
            return bool(layers.bias_names(module)) or id(module) in without

        if self.target_modules is not None:
            found, faults = targeted(model, self.target_modules, is_usable, self.exclude_modules, skip, _describe)
            return found | self._output_layers(found, modules, skip), faults
        heads = output_heads(model)
        known = {
            path: module
            for path, module in modules.items()
            if layers.bias_names(module) or (id(module) in without and not inside(path, heads))
        }
        if known:
            return find("target_modules", r".*", known, is_usable, self.exclude_modules, skip, _describe)
        remedy = ", and no layer that could be given one" if self.add_missing else "; add_missing: true gives it some"
        return {}, [f"target_modules: {type(model).__name__} has no bias{remedy}"]

    def _output_layers(
        self, found: Mapping[str, nn.Module], modules: Mapping[str, nn.Module], skip: Container[str]
    ) -> dict[str, nn.Module]:
        """The output layers of the attentions in `found`: their biases are the attentions' too."""
        attentions = [path for path, module in found.items() if isinstance(module, nn.MultiheadAttention)]
        outputs = {path: modules[path] for path in (f"{attention}.out_proj" for attention in attentions)}
        return {
            path: module
            for path, module in outputs.items()
            if layers.bias_names(module) and not inside(path, skip) and not matches(path, self.exclude_modules)
        }

    def to_peft(self, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, Any]:
        """As HF peft's BEFT, which trains the biases of linear layers."""
        return _bitfit_peft.to_peft(self, root, attached)

    def peft_tensors(self, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, PeftTensor]:
        """What training added to each bias."""
        return _bitfit_peft.peft_tensors(self.peft_prefix, root, attached)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], keys: Sequence[str], root: PeftRoot) -> BitFit:
        """Where the biases go is taken from the keys."""
        return _bitfit_peft.from_peft(cls, config, keys, root)


def _describe(module: nn.Module) -> str:
    if layers.lacks_bias(module):
        return f"a {type(module).__name__} without a bias (add_missing gives it one)"
    return f"a {type(module).__name__} without a bias"
