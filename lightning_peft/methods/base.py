"""What every method is: fields that are checked when it is made, and the adapters that it would stand on a model's
modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import nn

from lightning_peft.methods._host import Adapter
from lightning_peft.methods.errors import PEFTError


class Attachment(NamedTuple):
    """One adapter and the module that it is made for."""

    path: str
    module: nn.Module
    adapter: Adapter


class Method:
    """One parameter-efficient method, described by its fields; a leaf class is a keyword-only dataclass.

    To add a method, put a file with such a class into this folder: it is found by being there.
    """

    training_only: ClassVar[frozenset[str]] = frozenset()
    """Fields that steer training or say where adapters go, but don't change what a set of trained tensors computes: a
    checkpoint written under other values of these still loads."""

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

    def learning_rate_factors(self, attached: Mapping[str, Adapter]) -> dict[nn.Parameter, float]:
        """Parameters whose learning rate is a multiple of the optimizer's, with the factor.

        Args:
            attached: this method's adapters on the model, by the path of the module that they stand on.
        """
        return {}

    def fields(self) -> dict[str, Any]:
        """The fields by name, in plain types, as a checkpoint stores them."""
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]
