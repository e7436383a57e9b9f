"""Where virtual tokens go in a batch: what they add to its ids, masks and positions, and where its tokens then are."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

FIRST, BEFORE, TOKEN, BEHIND, LAST = range(5)
"""In which order a row has what is in it; first and last is what is masked."""


class Kind(Enum):
    """What reads the tokens of a batch."""

    DECODER = "decoder"
    ENCODER = "encoder"
    HALF = "the encoder half of an encoder-decoder"


class Places(NamedTuple):
    """How many virtual tokens stand before a row's tokens, and how many behind them."""

    before: int
    behind: int


class Layout:
    """A batch of rows, each with its virtual tokens; all rows have room for as many as the longest prompt has.

    They come right before and after a row's tokens: padding lies around them, so that it changes nothing. Room that a
    row does not use is masked: at the end, or, in a decoder, whose cache goes on from there, in front.

    Args:
        places: one for all rows, or one for each.
        batch: the ids (rows, length), or anything of that shape.
        mask: (rows, length), 1 for a token and 0 for padding; None: there is no padding.
        kind: of the text model that the batch is for.
    """

    def __init__(self, places: Sequence[Places], batch: Tensor, mask: Tensor | None, kind: Kind) -> None:
        self.rows, self.length = batch.shape[:2]
        self.before = max(place.before for place in places)
        self.behind = max(place.behind for place in places)
        self.device = batch.device
        self.all_used = all(place == (self.before, self.behind) for place in places)
        # which virtual token of its row stands where, -1 for none
        self.numbers = self._numbers(places, kind)
        self.count = (self.numbers[:, : self.before] >= 0).sum(1, keepdim=True)
        self.order = None
        if not self.all_used or (mask is not None and (self.behind or kind is not Kind.ENCODER)):
            self.order = self._order(mask, kind)

    def ids(self, ids: Tensor, vocabulary: int) -> Tensor:
        """The ids (rows, all), where virtual token i is `vocabulary` + i."""
        return self._extended(ids, torch.where(self.numbers < 0, 0, self.numbers + vocabulary))

    def embeddings(self, embeddings: Tensor, prompts: Tensor) -> Tensor:
        """The embeddings (rows, all, width), given those of the virtual tokens (1 or rows, virtual, width)."""
        return self._extended(embeddings, prompts)

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """The mask (rows, all); None where all are seen."""
        if mask is None:
            if self.all_used:
                return None
            mask = self.numbers.new_ones(self.rows, self.length)
        return self._extended(mask, self.numbers >= 0)

    def token_types(self, token_types: Tensor) -> Tensor:
        """The token types (rows, all), of which virtual tokens have 0."""
        return self._extended(token_types, torch.zeros_like(self.numbers))

    def positions(self, positions: Tensor, mask: Tensor | None, first: int) -> Tensor:
        """The positions (…, all): virtual tokens before the others have the first ones, others come after them."""
        shifted = positions + self.count
        last = (shifted if mask is None else shifted.where(mask != 0, 0)).amax(-1, keepdim=True)
        before = self.numbers[:, : self.before].clamp(min=0) + first
        behind = last + 1 + (self.numbers[:, self.before :] - self.count).clamp(min=0)
        parts = (before, shifted, behind)
        rows = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))  # type: ignore[no-untyped-call]
        joined = torch.cat([part.expand(*rows, -1) for part in parts], dim=-1)
        return joined if self.order is None else joined.take_along_dim(self.order, -1)

    def tokens(self, output: Tensor, lead: bool) -> Tensor:
        """What an output (rows, all, width) holds for the tokens: (rows, length, width).

        Args:
            output: the output.
            lead: whether the first token's place has what comes first, be it a virtual token's.
        """
        if self.order is None:
            own = output.narrow(1, self.before, self.length)
            return torch.cat([output[:, :1], own[:, 1:]], dim=1) if lead else own
        where = self.order.argsort(dim=1)[:, self.before : self.before + self.length]
        if lead:
            where = torch.cat([torch.zeros_like(where[:, :1]), where[:, 1:]], dim=1)
        return output.take_along_dim(where[..., None], 1)

    def _numbers(self, places: Sequence[Places], kind: Kind) -> Tensor:
        if self.all_used:
            return torch.arange(self.before + self.behind, device=self.device)[None]
        rows = []
        for before, behind in places:
            room, numbers = [-1] * (self.before - before), [*range(before)]
            rest = [*range(before, before + behind), *[-1] * (self.behind - behind)]
            rows.append([*room, *numbers, *rest] if kind is Kind.DECODER else [*numbers, *room, *rest])
        return torch.tensor(rows, device=self.device)

    def _order(self, mask: Tensor | None, kind: Kind) -> Tensor:
        tokens = torch.full((self.rows, self.length), TOKEN, device=self.device)
        if mask is not None and self.behind:
            tokens = tokens.masked_fill(mask.flip(1).cumsum(1).flip(1) == 0, LAST)
        if mask is not None and kind is not Kind.ENCODER:  # whose pooler reads what comes first
            tokens = tokens.masked_fill(mask.cumsum(1) == 0, FIRST)
        is_before = torch.arange(self.before + self.behind, device=self.device) < self.before
        virtual = torch.where(is_before, BEFORE, BEHIND)
        virtual = virtual.where(self.numbers >= 0, FIRST if kind is Kind.DECODER else LAST)
        return self._joined(tokens, virtual).argsort(dim=1, stable=True)

    def _extended(self, tokens: Tensor, virtual: Tensor) -> Tensor:
        joined = self._joined(tokens, virtual)
        if self.order is None:
            return joined
        return joined.take_along_dim(self.order if joined.dim() == 2 else self.order[..., None], 1)

    def _joined(self, tokens: Tensor, virtual: Tensor) -> Tensor:
        virtual = virtual.to(tokens.dtype).expand(len(tokens), *virtual.shape[1:])
        return torch.cat([virtual[:, : self.before], tokens, virtual[:, self.before :]], dim=1)
