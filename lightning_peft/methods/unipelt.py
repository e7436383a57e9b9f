"""UniPELT: a prefix, an adapter and LoRA in every block, each behind a gate."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_peft.methods import _gates as gates
from lightning_peft.methods._blocks import Attention, Block, find_blocks
from lightning_peft.methods._bottleneck import Bottleneck
from lightning_peft.methods._host import Adapter
from lightning_peft.methods._lora_layers import LowRank
from lightning_peft.methods._prefix import FUSED_LAYERS, PrefixAdapter
from lightning_peft.methods._target_modules import once
from lightning_peft.methods._targets import base_modules, inside
from lightning_peft.methods.base import Attachment, Method
from lightning_peft.methods.errors import PEFTError
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.pfeiffer import Pfeiffer
from lightning_peft.methods.prefix_tuning import PrefixTuning

QUERIES_AND_VALUES = ("q_proj", "v_proj", "query", "value", "q", "v", "q_lin", "v_lin", "linear_q", "linear_v")
"""Names that the projections have in transformers 5.23; where both are one layer, LoRA stands on all of it."""


@dataclass(kw_only=True)
class UniPELT(Method):
    r"""K ← [g_P·P_k; K], V ← [g_P·P_v; V], h ← h + g_A·(U relu(D h + b) + b'), y ← y + g_L·s·BAx.

    The parts are PrefixTuning, Pfeiffer and LoRA, which has queries and values for its y. Each block has gates
    g = σ(W h + b) of its own, for each row of a batch one, with h the block's input, averaged over the tokens that are
    no padding; in decoding with a cache, over the tokens of the step. Source: arXiv 2110.07577.

    Raises:
        PEFTError: with every field that breaks its rule.
    """

    num_virtual_tokens: int = 10
    """How many keys and values are put in front, 1 or more."""
    reduction: int = 16
    """Width of a block over the width of its bottleneck, which it must divide."""
    r: int = 8
    """Rank of LoRA's update, 1 or more."""
    alpha: float = 16
    """LoRA's update has the scale alpha / r."""
    dropout: float = 0.0
    """Probability of dropping an element of a layer's input on its way to LoRA's A, below 1."""

    learning_rate: ClassVar[float] = 2e-3
    identity_at_start: ClassVar[bool] = False
    training_only: ClassVar[frozenset[str]] = frozenset({"dropout"})

    def faults(self) -> list[str]:
        """What is wrong with the fields, in the words of the method that each is for."""
        parts: list[Callable[[], Any]] = [self._prefix, self._bottleneck, lambda: self._lora(["any"])]
        faults: list[str] = []
        for part in parts:
            try:
                part()
            except PEFTError as error:
                faults += [fault.partition(".")[2] for fault in error.faults]
        return faults

    def attachments(self, model: nn.Module, skip: Container[str]) -> Sequence[Attachment]:
        """The parts' adapters in each block, each behind the block's gate, and the gates on the blocks themselves."""
        blocks = [block for block in find_blocks(model) if not inside(block.path, skip)]
        modules = dict(base_modules(model))
        targets, faults = _queries_and_values(blocks, modules)
        made: list[Attachment] = []
        for part in (self._prefix(), self._bottleneck(), self._lora(targets) if targets else None):
            try:
                made += part.attachments(model, skip) if part is not None else ()
            except PEFTError as error:
                faults += error.faults
        if faults:
            raise PEFTError([f"UniPELT: {fault}" for fault in dict.fromkeys(faults)])
        passages = {block.path: gates.Passage() for block in blocks}
        gated = [
            Attachment(block.path, modules[block.path], gates.BlockGates(modules[block.path], block.width, passage))
            for block, passage in zip(blocks, passages.values(), strict=True)
        ]
        for path, module, adapter in made:
            block = next((block for block in passages if inside(path, {block})), None)
            if block is not None:
                gated.append(Attachment(path, module, _behind_gate(adapter, passages[block])))
            elif not isinstance(adapter, PrefixAdapter):
                gated.append(Attachment(path, module, adapter))  # what gives tokens their positions
        return once(gated)

    def report(self, attached: Mapping[str, Adapter]) -> dict[str, float]:
        """The gates' means over blocks and rows of the last forward."""
        passages = [adapter.passage for adapter in attached.values() if isinstance(adapter, gates.BlockGates)]
        means = [passage.means.cpu() for passage in passages if passage.means is not None]
        if not means:
            return {}
        return {
            f"gate_{kind}": float(value) for kind, value in zip(gates.KINDS, torch.stack(means).mean(0), strict=True)
        }

    def report_layers(self, attached: Mapping[str, Adapter]) -> dict[str, dict[str, float]]:
        """The gates' means in each block, over the rows of the last forward."""
        blocks = {path: adapter for path, adapter in attached.items() if isinstance(adapter, gates.BlockGates)}
        means = {path: own.tolist() for path, block in blocks.items() if (own := block.passage.means) is not None}
        if not means:
            return {}
        return {
            f"gate_{kind}": {path: own[place] for path, own in means.items()} for place, kind in enumerate(gates.KINDS)
        }

    def _prefix(self) -> PrefixTuning:
        return PrefixTuning(num_virtual_tokens=self.num_virtual_tokens)

    def _bottleneck(self) -> Pfeiffer:
        return Pfeiffer(reduction=self.reduction)

    def _lora(self, targets: list[str]) -> LoRA:
        return LoRA(r=self.r, alpha=self.alpha, dropout=self.dropout, target_modules=targets)


def _behind_gate(adapter: Adapter, passage: gates.Passage) -> Adapter:
    if isinstance(adapter, PrefixAdapter):
        return gates.GatedPrefix(adapter, passage)
    if isinstance(adapter, Bottleneck):
        return gates.GatedBottleneck(adapter, passage)
    return gates.GatedLoRA(adapter, passage) if isinstance(adapter, LowRank) else adapter


def _queries_and_values(blocks: Sequence[Block], modules: Mapping[str, nn.Module]) -> tuple[list[str], list[str]]:
    """The paths of every attention's projections to queries and values, and what is wrong with attention that has
    none."""
    found: list[str] = []
    faults = []
    for block in blocks:
        for attention in block.attention:
            own = _projections(attention, modules, QUERIES_AND_VALUES)
            own = own if len(own) == 2 else _projections(attention, modules, FUSED_LAYERS)
            found += own
            if not own:
                faults.append(
                    f"{attention.path}: has no projections to queries and values that are known by their names"
                )
    return found, faults


def _projections(attention: Attention, modules: Mapping[str, nn.Module], names: Sequence[str]) -> list[str]:
    return [path for path in modules if inside(path, {attention.path}) and path.rpartition(".")[2] in names]
