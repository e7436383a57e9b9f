"""Houlsby's adapters: a bottleneck after every sublayer of a block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from lightning_peft.methods._blocks import Block
from lightning_peft.methods._bottleneck import BottleneckMethod, Features, Place


@dataclass(kw_only=True)
class Houlsby(BottleneckMethod):
    r"""h ← h + U f(D h + b) + b' after each attention and after the feed-forward block, before the residual sum.

    D (r, width) starts Kaiming-uniform and U (width, r) at zero, so that the model's outputs are the frozen model's.
    The paper trains the layer normalizations too: name them in `modules_to_save`. Source: arXiv 1902.00751.

    Raises:
        PEFTError: with every field that breaks its rule.
    """

    activation: str = "gelu"
    """What is between D and U: "relu", "gelu", "silu" or "tanh"."""

    learning_rate: ClassVar[float] = 1e-3

    def block_places(self, block: Block) -> Iterator[Place]:
        """The outputs of every attention, to itself or to an encoder, and of the feed-forward."""
        outputs = [attention.output for attention in block.attention]
        if block.feed_forward is not None:
            outputs.append(block.feed_forward.output)
        yield from (Place(output, Features(block.width)) for output in outputs)
