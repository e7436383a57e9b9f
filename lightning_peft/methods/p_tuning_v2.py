"""P-tuning v2: trained keys and values in front of every layer's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lightning_peft.methods._prefix import FreePrefix, PrefixAdapter
from lightning_peft.methods._prefix_method import PrefixMethod


@dataclass(kw_only=True)
class PTuningV2(PrefixMethod):
    r"""K ← [P_k; K], V ← [P_v; V] in every attention, with P_k, P_v (n, width) trained themselves.

    That is prefix tuning without its MLP. Tokens are counted from position n on, as after n real ones. Source:
    arXiv 2110.07602.

    Raises:
        PEFTError: with every field that breaks its rule.
    """

    num_virtual_tokens: int = 20
    """How many keys and values are put in front, 1 or more."""

    learning_rate: ClassVar[float] = 5e-2

    def prefixes(self, modules: Mapping[str, nn.Module]) -> dict[str, PrefixAdapter]:
        """One of its own for each."""
        return {path: FreePrefix(module, self.num_virtual_tokens) for path, module in modules.items()}

    @classmethod
    def reads_peft(cls, config: Mapping[str, Any]) -> bool:
        """A directory of HF peft's is read as prefix tuning's, which is the same."""
        return False
