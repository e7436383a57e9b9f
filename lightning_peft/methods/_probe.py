"""A linear probe: the baseline that adapters are compared with, and no adapter itself."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_peft.methods._saved_copy import saved_copies
from lightning_peft.methods._targets import base_modules, output_heads
from lightning_peft.methods.base import Attachment, Method
from lightning_peft.methods.errors import PEFTError


@dataclass(kw_only=True)
class LinearProbe(Method):
    """y = h(f(x)) with the body f frozen and the head h trained whole.

    The head is what `modules_to_save` names; where it names nothing, the output head of a transformers model.

    Raises:
        PEFTError: when it is attached: no head is named, and none is found.
    """

    learning_rate: ClassVar[float] = 3e-2

    def attachments(self, model: nn.Module, skip: Container[str]) -> Sequence[Attachment]:
        """A trained copy of each module of the heads; none where `modules_to_save` has named what trains."""
        modules = {path: module for path, module in base_modules(model) if path}
        named = any(path in skip for path in modules)
        heads = [] if named else sorted(output_heads(model))
        if not named and not heads:
            last = next((path for path, module in reversed(modules.items()) if isinstance(module, nn.Linear)), "head")
            raise PEFTError(
                f"LinearProbe: {type(model).__name__} has no output head that can be told from the rest; name it in "
                f"modules_to_save, such as [{last}]"
            )
        whole = {path: module for head in heads for path, module in base_modules(modules[head], head)}
        return [Attachment(path, modules[path], copy) for path, copy in saved_copies(whole).items()]
