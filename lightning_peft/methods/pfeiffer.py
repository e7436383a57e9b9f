"""Pfeiffer's adapters: a bottleneck after the feed-forward of each block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from lightning_peft.methods._blocks import Block
from lightning_peft.methods._bottleneck import BottleneckMethod, Features, Place


@dataclass(kw_only=True)
class Pfeiffer(BottleneckMethod):
    r"""h ← h + U relu(D h + b) + b' after the feed-forward block, before the residual sum.

    D (r, width) starts Kaiming-uniform and U (width, r) at zero, so that the model's outputs are the frozen model's.
    Source: arXiv 2005.00052.

    Raises:
        PEFTError: with every field that breaks its rule.
    """

    learning_rate: ClassVar[float] = 3e-3

    def block_places(self, block: Block) -> Iterator[Place]:
        """The output of the feed-forward."""
        if block.feed_forward is not None:
            yield Place(block.feed_forward.output, Features(block.width))
