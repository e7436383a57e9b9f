"""Prefix tuning: keys and values in front of every layer's own, made by an MLP while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.methods import _prefix_peft
from lightning_peft.methods._host import Adapter
from lightning_peft.methods._prefix import FreePrefix, PrefixAdapter, key_shape, new
from lightning_peft.methods._prefix_method import PrefixMethod
from lightning_peft.methods.base import PeftRoot

MLP_RATE = 0.03
"""The learning rate of E and the MLP in multiples of the optimizer's: a step of Adam moves an entry of P by the sum of
what all weights of its row are moved by, and a head beside it, or a prefix without an MLP, takes the whole rate."""


class MLPPrefix(PrefixAdapter):
    """[P_k; P_v] = W₂ tanh(W₁ E + b₁) + b₂, with E, W₁ and b₁ shared by all layers: one MLP, whose last layer each
    attention has its own rows of.

    Args:
        module: attention.
        num_virtual_tokens: n.
        shared: E (n, width), W₁ (hidden, width) and b₁ (hidden), see `shared_layer`.
    """

    def __init__(self, module: nn.Module, num_virtual_tokens: int, shared: tuple[nn.Parameter, ...]) -> None:
        super().__init__(module, num_virtual_tokens)
        self.prefix_embedding, self.hidden_weight, self.hidden_bias = shared
        widths = self.shape.heads * (self.shape.key_width + self.shape.value_width)
        self.output_weight, self.output_bias = _linear(module, len(self.hidden_bias), widths)

    def tables(self) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(F.linear(self.prefix_embedding, self.hidden_weight, self.hidden_bias))
        both = F.linear(hidden.to(self.output_weight.device), self.output_weight, self.output_bias)
        key_width = self.shape.heads * self.shape.key_width
        return both[:, :key_width], both[:, key_width:]


def shared_layer(module: nn.Module, num_virtual_tokens: int, width: int, hidden: int) -> tuple[nn.Parameter, ...]:
    """E, W₁ and b₁ as HF peft starts them, where and in which dtype an adapter of `module` has its tensors."""
    embedding = nn.Parameter(new(module, num_virtual_tokens, width))
    nn.init.normal_(embedding)
    return embedding, *_linear(module, width, hidden)


def _linear(module: nn.Module, width: int, out: int) -> tuple[nn.Parameter, nn.Parameter]:
    like = new(module, 0)
    layer = nn.Linear(width, out, device=like.device, dtype=like.dtype)
    return cast(nn.Parameter, layer.weight), layer.bias


@dataclass(kw_only=True)
class PrefixTuning(PrefixMethod):
    r"""K ← [P_k; K], V ← [P_v; V] in every attention, with [P_k; P_v] = MLP(E) for all layers.

    E (n, width of the keys) and the MLP, of one hidden layer with tanh, are trained; an export holds P alone. Tokens
    are counted from position n on, as after n real ones. E and the MLP learn at `MLP_RATE` times the optimizer's rate:
    the paper's 5e-5 is theirs. Source: arXiv 2101.00190.

    Raises:
        PEFTError: with every field that breaks its rule.
    """

    num_virtual_tokens: int = 30
    """How many keys and values are put in front, 1 or more."""
    reparameterize: bool = True
    """Whether P comes from the MLP, which the paper found to train more steadily; else P is trained itself."""
    hidden_size: int = 512
    """Width of the MLP's hidden layer, 1 or more."""

    learning_rate: ClassVar[float] = 3e-2
    """Of the head beside it, and of P where it has no MLP."""

    def faults(self) -> list[str]:
        """What is wrong with the fields."""
        size = self.hidden_size
        is_width = isinstance(size, int) and size >= 1
        return super().faults() + ([] if is_width else [f"hidden_size: {size} is not a width; it must be 1 or more"])

    def prefixes(self, modules: Mapping[str, nn.Module]) -> dict[str, PrefixAdapter]:
        """Made by one MLP, where they are not free."""
        n = self.num_virtual_tokens
        if not self.reparameterize:
            return {path: FreePrefix(module, n) for path, module in modules.items()}
        first = next(iter(modules.values()))
        heads, width, _ = key_shape(first)
        shared = shared_layer(first, n, heads * width, self.hidden_size)
        return {path: MLPPrefix(module, n, shared) for path, module in modules.items()}

    def learning_rate_factors(self, attached: Mapping[str, Adapter]) -> dict[nn.Parameter, float]:
        """E and the MLP learn more slowly."""
        made = [adapter for adapter in attached.values() if isinstance(adapter, MLPPrefix)]
        return {parameter: MLP_RATE for adapter in made for parameter in adapter.parameters()}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], keys: Sequence[str], root: PeftRoot) -> PrefixTuning:
        """Without the MLP, which no directory holds."""
        targets = _prefix_peft.target_modules(config, root)
        return cls(num_virtual_tokens=config["num_virtual_tokens"], reparameterize=False, target_modules=targets)
