"""Compacter: Houlsby's adapters whose matrices are sums of Kronecker products, with one factor for all layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.methods import _bottleneck as shared
from lightning_peft.methods._host import adapter_dtype
from lightning_peft.methods.base import Attachment
from lightning_peft.methods.houlsby import Houlsby


class SharedFactor(nn.Module):
    """The Aᵢ (n, n, n) of all layers: a parameter of the first adapter, to which the others refer."""

    def __init__(self, n: int, like: Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(n, n, n, dtype=adapter_dtype(like), device=like.device))
        nn.init.normal_(self.A, std=1 / math.sqrt(n))


class KroneckerProjection(shared.Projection):
    """A map whose weight (out, in) is Σᵢ Aᵢ ⊗ (sᵢ tᵢᵀ), with s (n, out/n) and t (n, in/n); where it is to be zero, s
    is."""

    def __init__(self, features_in: int, features_out: int, like: Tensor, shared_factor: SharedFactor, *, zero: bool):
        # in a tuple, it is no child of this module, whose tensors would then be saved once for each layer
        self.shared_factor = (shared_factor,)
        super().__init__(features_in, features_out, like, zero=zero)

    def reset(self, features_in: int, features_out: int, zero: bool, options: dict[str, Any]) -> None:
        """s and t."""
        n = len(self.shared_factor[0].A)
        self.s = nn.Parameter(torch.zeros(n, features_out // n, **options))
        self.t = nn.Parameter(torch.zeros(n, features_in // n, **options))
        # with A and s of their start, the product's entries have the size of a Kaiming-uniform matrix's
        nn.init.uniform_(self.t, -1 / math.sqrt(features_in), 1 / math.sqrt(features_in))
        if not zero:
            nn.init.normal_(self.s)

    def matrix(self) -> Tensor:
        """The weight (out, in), in the adapter's dtype."""
        A = self.shared_factor[0].A.to(self.s)
        # (i, a, b) ⊗ (i, p, q): row a·out/n + p, column b·in/n + q
        return torch.einsum("iab,ip,iq->apbq", A, self.s, self.t).reshape(self.s.numel(), self.t.numel())


@dataclass(kw_only=True)
class Compacter(Houlsby):
    r"""h ← h + U f(D h + b) + b' at Houlsby's places, with D = Σᵢ Aᵢ ⊗ (sᵢ tᵢᵀ) and U likewise, i = 1 … n.

    The Aᵢ (n, n) are one parameter for all layers; sᵢ and tᵢ are vectors of each D and each U. The s of U start at
    zero, so that the model's outputs are the frozen model's. Source: arXiv 2106.04647.

    Raises:
        PEFTError: with every field that breaks its rule.
    """

    reduction: int = 32
    """Width of a place over the width of its bottleneck; it must divide every place's width. Unused where `r` is
    given."""
    n: int = 4
    """How many Kronecker products are summed; it must divide every place's width and its bottleneck's."""

    learning_rate: ClassVar[float] = 1e-2

    def faults(self) -> list[str]:
        """What is wrong with the fields."""
        count = [f"n: {self.n} is no number of products; it must be 1 or more"] if not shared.is_count(self.n) else []
        return super().faults() + count

    def place_faults(self, place: shared.Place, modules: Mapping[str, nn.Module]) -> list[str]:
        """Also, what n does not divide."""
        if faults := super().place_faults(place, modules):
            return faults
        width = place.given.width
        wrong = [size for size in (width, self.bottleneck(width)) if size % self.n]
        return [
            f"n: {self.n} does not divide {' and '.join(map(str, wrong))}; it must divide the width, {width}, and the "
            f"bottleneck, {self.bottleneck(width)}"
        ] if wrong else []  # fmt: skip

    def stand(self, places: Sequence[shared.Place], modules: Mapping[str, nn.Module]) -> list[Attachment]:
        """One adapter for each place; the first holds what they share."""
        made = []
        shared_factor = SharedFactor(self.n, next(modules[places[0].path].parameters()))
        for place in places:
            module, width = modules[place.path], place.given.width
            like, r = next(module.parameters()), self.bottleneck(width)
            down = KroneckerProjection(width, r, like, shared_factor, zero=False)
            up = KroneckerProjection(r, width, like, shared_factor, zero=True)
            made.append(Attachment(place.path, module, shared.Bottleneck(down, up, self.activation, place)))
        made[0].adapter.add_module("shared_factor", shared_factor)
        return made
