"""What every method is: fields that are checked when it is made, and the adapters that it would stand on a model's
modules."""

# without postponed annotations: the command line's parser would look for their names in the file of each method
import dataclasses
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.methods._host import Adapter
from lightning_peft.methods.errors import PEFTError


class Attachment(NamedTuple):
    """One adapter and the module that it is made for."""

    path: str
    module: nn.Module
    adapter: Adapter


@dataclasses.dataclass(frozen=True)
class PeftRoot:
    """The module of a model that HF peft would adapt: its names and keys are relative to it."""

    model: nn.Module
    path: str
    """Of the root in `model`; empty for `model` itself."""
    modules_to_save: tuple[str, ...] = ()
    """Names of modules that are trained whole, as HF peft's configuration has them."""

    @property
    def module(self) -> nn.Module:
        return self.model.get_submodule(self.path)

    def outer(self, path: str) -> str:
        """The path in `model` of what has `path` in the root."""
        return ".".join(part for part in (self.path, path) if part)

    def inner(self, path: str) -> str:
        """The path in the root of what has `path` in `model`."""
        return path.removeprefix(self.path).removeprefix(".") if self.path else path


def _same(tensor: Tensor) -> Tensor:
    return tensor


class PeftTensor(NamedTuple):
    """One tensor of a file of HF peft, and the tensor here that it is."""

    tensor: Tensor
    """The adapter's own, which an import fills."""
    value: Tensor
    """What an export writes, in our layout; `tensor` itself for most."""
    to_peft: Callable[[Tensor], Tensor] = _same
    """From our layout into HF peft's."""
    from_peft: Callable[[Tensor], Tensor] = _same
    """Back again. Raises PEFTError where a value has no place in our layout."""
    parts: tuple[Tensor, ...] = ()
    """Tensors of several adapters that `tensor` is a copy of, side by side in its last dimension: an import fills
    these."""

    @torch.no_grad()
    def fill(self, given: Tensor) -> None:
        """Take over a tensor of HF peft's file.

        Raises:
            PEFTError: a value has no place in our layout.
        """
        value = self.from_peft(given)
        if not self.parts:
            self.tensor.copy_(value)
            return
        start = 0
        for part in self.parts:
            part.copy_(value.narrow(-1, start, part.shape[-1]))
            start += part.shape[-1]


class Method:
    """One parameter-efficient method, described by its fields; a leaf class is a keyword-only dataclass.

    To add a method, put a file with such a class into this folder: it is found by being there.
    """

    learning_rate: ClassVar[float] = 1e-3
    """AdamW's rate to start from, which a configuration that names none gets."""
    identity_at_start: ClassVar[bool] = True
    """Whether the model's outputs are the base's until the first step."""
    prunes: ClassVar[bool] = False
    """Whether it sets entries to zero for good while it trains, which an average over its steps would bring back."""
    starts_from_error: ClassVar[bool] = False
    """Whether its adapters start from what quantization loses, so that the base is needed in full precision first."""
    training_only: ClassVar[frozenset[str]] = frozenset()
    """Fields that steer training or say where adapters go, but don't change what a set of trained tensors computes: a
    checkpoint written under other values of these still loads."""

    peft_defaults: ClassVar[Mapping[str, Any]] = {}
    """The method's fields in an `adapter_config.json` with HF peft's defaults, `peft_type` among them; empty where HF
    peft has no such method."""
    peft_prefix: ClassVar[str] = "base_model.model."
    """What HF peft writes before a name of the root in the keys of tensors."""

    def faults(self) -> list[str]:
        """What is wrong with the fields, each fault with the field's name and the rule; empty where all is well."""
        return []

    def __post_init__(self) -> None:
        if faults := self.faults():
            raise PEFTError([f"{type(self).__name__}.{fault}" for fault in faults])

    def attachments(self, model: nn.Module, skip: Container[str]) -> Sequence[Attachment]:
        """The adapters for `model`, made but not yet attached; the model is not changed.

        Args:
            model: any module.
            skip: paths of modules that are trained whole, and that a search by pattern must leave out.

        Raises:
            PEFTError: with every target that matches nothing or can't be adapted.
        """
        raise NotImplementedError

    def error_ranks(self, model: nn.Module) -> dict[str, int]:
        """Of which layers, by path, the error is to be kept as they are quantized, and up to which rank.

        Args:
            model: any module, not yet quantized, on any device, meta included.
        """
        return {}

    def learning_rate_factors(self, attached: Mapping[str, Adapter]) -> dict[nn.Parameter, float]:
        """Parameters whose learning rate is a multiple of the optimizer's, with the factor.

        Args:
            attached: this method's adapters on the model, by the path of the module that they stand on.
        """
        return {}

    def penalty(self, attached: Mapping[str, Adapter]) -> Tensor | None:
        """A term to add to the loss of each training step, a scalar; None where there is none."""
        return None

    def start(self, attached: Mapping[str, Adapter], total_steps: float) -> None:
        """Called before training, with the number of optimizer steps that it will take: infinite where nothing says.

        Raises:
            PEFTError: the method can't be trained for that long.
        """

    def after_step(self, attached: Mapping[str, Adapter], step: int, total_steps: float) -> None:
        """Called after each optimizer step, the first of which is 1, while the gradients are still there.

        What it has to know in the next step is kept in the adapters' buffers, which checkpoints hold.
        """

    def report(self, attached: Mapping[str, Adapter]) -> dict[str, float]:
        """What is worth to be logged of the adapters in training, by name."""
        return {}

    def report_layers(self, attached: Mapping[str, Adapter]) -> dict[str, dict[str, float]]:
        """The same layer by layer: by name, and in it by a layer's path, always the same ones; shown over time."""
        return {}

    def fields(self) -> dict[str, Any]:
        """The fields by name, in plain types, as a checkpoint stores them."""
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]

    @classmethod
    def reads_peft(cls, config: Mapping[str, Any]) -> bool:
        """Whether an `adapter_config.json` with these fields describes this method."""
        return bool(cls.peft_defaults) and config.get("peft_type") == cls.peft_defaults["peft_type"]

    def to_peft(self, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, Any]:
        """The fields of `peft_defaults` that have other values for this adapter.

        Args:
            root: where HF peft would stand.
            attached: this method's adapters, by the path in the root of the module that they stand on.

        Raises:
            PEFTError: with every reason why HF peft can't express it.
        """
        raise PEFTError(
            f"{type(self).__name__} has no form in HF peft; load its checkpoint by load_from_checkpoint, or save the "
            "whole model by save_merged if it can be folded into the weights"
        )

    def peft_tensors(self, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, PeftTensor]:
        """The adapter's tensors by their keys in HF peft's file, `peft_prefix` included.

        Args:
            root: where HF peft would stand.
            attached: this method's adapters by path in the root; they need not stand on it yet.

        Raises:
            PEFTError: with every adapter whose tensors HF peft would compute something else from.
        """
        raise NotImplementedError

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], keys: Sequence[str], root: PeftRoot) -> "Method":
        """The method that, on `root.model`, is the adapter of an HF peft directory.

        Args:
            config: every field of `peft_defaults`, as the directory has it or else by default.
            keys: the keys of the directory's tensors, those of `modules_to_save` left out.
            root: where HF peft would stand.

        Raises:
            PEFTError: with every value that can't be honoured, and every key of a module that the model lacks.
        """
        raise NotImplementedError
