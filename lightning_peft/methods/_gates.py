"""Gates of a transformer block that are read off its input, and adapters in it whose effect is multiplied by one."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.methods._bottleneck import Bottleneck, change_first
from lightning_peft.methods._host import Adapter, Base, adapter_dtype, own_class
from lightning_peft.methods._lora_layers import LowRank
from lightning_peft.methods._low_rank import as_written
from lightning_peft.methods._prefix import Prefix, PrefixAdapter, attend
from lightning_peft.methods.errors import PEFTError

A = TypeVar("A", bound=Adapter)
KINDS = ("prefix", "adapter", "lora")
"""What there is a gate for in each block."""


class Passage:
    """Carries the gates from a block to the adapters in it, within one forward."""

    def __init__(self) -> None:
        self.gates: Tensor | None = None
        self.means: Tensor | None = None
        """Of the last forward, over its rows: one for each of `KINDS`."""

    def __reduce__(self) -> tuple[type[Passage], tuple[()]]:
        # a copy starts empty: gates have a graph, and can't be copied
        return type(self), ()

    def gate(self, kind: str, like: Tensor) -> Tensor:
        """The gate of each row, in a shape and the dtype to multiply `like` (rows, …) with.

        Raises:
            PEFTError: the block did not run, and so has no gate.
        """
        if self.gates is None:
            raise PEFTError("UniPELT: an adapted layer ran without the block that it is in, and so without its gate")
        return self.gates[KINDS.index(kind)].to(like.device, like.dtype).view(-1, *(1,) * (like.dim() - 1))


class Gated(Adapter):
    """An adapter whose effect depends on a gate."""

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        raise PEFTError(
            "merge: UniPELT's gates depend on the input, so that no weight computes the same; keep it attached"
        )


class BlockGates(Gated):
    """σ(W h + b) with h the block's input, averaged over the tokens of a row that are no padding: a gate for each of
    `KINDS`.

    Args:
        module: the block.
        width: features of its input.
        passage: where the adapters in the block look for the gates.
    """

    def __init__(self, module: nn.Module, width: int, passage: Passage) -> None:
        super().__init__()
        like = next(module.parameters())
        layer = nn.Linear(width, len(KINDS), device=like.device, dtype=adapter_dtype(like))
        self.gate_weight, self.gate_bias = layer.weight, layer.bias
        self.passage = passage
        self.names = tuple(inspect.signature(own_class(module).forward).parameters)[1:]

    def forward(self, base: Base, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        gates = self.gates(given[self.names[0]], given.get("attention_mask"))
        self.passage.gates, self.passage.means = gates, gates.detach().mean(1)
        try:
            return base(*args, **kwargs)
        finally:
            self.passage.gates = None

    def forward_rows(
        self, rows: Sequence[Adapter | None], base: Base, module: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        """Each adapter's gates for all rows, those of others' rows shut."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        own = _distinct(BlockGates, rows)
        try:
            for adapter in own:
                gates = adapter.gates(given[self.names[0]], given.get("attention_mask"))
                is_own = torch.tensor([row is adapter for row in rows], device=gates.device)
                adapter.passage.gates = gates * is_own
            return base(*args, **kwargs)
        finally:
            for adapter in own:
                adapter.passage.gates = None

    def gates(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The gates (kinds, rows) in the adapter's dtype.

        Args:
            x: the block's input (rows, tokens, width).
            attention_mask: as attention gets it, (rows, 1, queries, keys), boolean or added to the scores; None where
                no token is padding.

        Raises:
            PEFTError: x has other dimensions.
        """
        if x.dim() != 3:
            raise PEFTError(f"UniPELT: a block was given {tuple(x.shape)}, and not rows of tokens")
        dtype = self.gate_weight.dtype
        with as_written(x.device.type):
            if attention_mask is None or attention_mask.dim() != 4:
                mean = x.mean(1, dtype=dtype)
            else:
                real = _real_tokens(attention_mask, x.shape[1]).expand(x.shape[0], -1)
                total = x.masked_fill(~real[..., None], 0).sum(1, dtype=dtype)
                mean = total / real.sum(1, keepdim=True).clamp_min(1)
            return torch.sigmoid(F.linear(mean, self.gate_weight, self.gate_bias)).T


def _real_tokens(mask: Tensor, count: int) -> Tensor:
    """Which of a block's tokens (rows, count) some token sees, itself included; nothing sees padding."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    keys = seen.flatten(1, 2).any(1)
    if keys.shape[1] == count:
        return keys
    # a static cache has room behind the tokens, any other one holds earlier tokens before them
    return keys[:, -count:] if bool(keys[:, -1].any()) else keys[:, :count]


class GatedPrefix(Gated):
    """A prefix whose keys and values are multiplied by the gate."""

    def __init__(self, prefix: PrefixAdapter, passage: Passage) -> None:
        super().__init__()
        self.prefix, self.passage = prefix, passage

    def gated(self) -> Prefix:
        """What each row sees."""
        keys, values, _ = self.prefix.prefix()
        gate = self.passage.gate("prefix", keys)
        return Prefix(keys * gate, values * gate)

    def forward(self, base: Base, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return attend(base, module, self.gated(), *args, **kwargs)

    def forward_rows(
        self, rows: Sequence[Adapter | None], base: Base, module: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        """All rows at once, each seeing its own prefix: a cache can't be split by rows."""
        made = {id(adapter): adapter.gated() for adapter in _distinct(GatedPrefix, rows)}
        if not made:
            return base(*args, **kwargs)
        lengths = [made[id(row)].keys.shape[2] if id(row) in made else 0 for row in rows]
        n = max(lengths)
        # the gates of other rows are shut, so that a sum gives each row its own
        keys, values = (
            torch.stack([F.pad(table, (0, 0, 0, n - table.shape[2])) for table in tables]).sum(0)
            for tables in zip(*((prefix.keys, prefix.values) for prefix in made.values()), strict=True)
        )
        visible = torch.arange(n, device=keys.device) < torch.tensor(lengths, device=keys.device)[:, None]
        return attend(base, module, Prefix(keys, values, visible), *args, **kwargs)


class GatedUpdate(Gated):
    """An update of a module's output that is multiplied by the gate."""

    def updated(self, module: nn.Module, y: Tensor, x: Any) -> Tensor:
        """The module's output y, updated, with x the module's input."""
        raise NotImplementedError

    def forward(self, base: Base, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._updated_by([self], base, module, *args, **kwargs)

    def forward_rows(
        self, rows: Sequence[Adapter | None], base: Base, module: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        """All rows by each adapter, since the gates of other rows are shut."""
        return self._updated_by(_distinct(GatedUpdate, rows), base, module, *args, **kwargs)

    @staticmethod
    def _updated_by(own: Sequence[GatedUpdate], base: Base, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x, *_ = (*args, *kwargs.values())

        def changed(y: Tensor) -> Tensor:
            for adapter in own:
                y = adapter.updated(module, y, x)
            return y

        return change_first(base(*args, **kwargs), module, changed)


class GatedBottleneck(GatedUpdate):
    """A bottleneck adapter behind its gate."""

    def __init__(self, bottleneck: Bottleneck, passage: Passage) -> None:
        super().__init__()
        self.bottleneck, self.passage = bottleneck, passage

    def updated(self, module: nn.Module, y: Tensor, x: Any) -> Tensor:
        delta = self.bottleneck.delta(y, self.bottleneck.place.given.dim_in(y))
        return torch.addcmul(y, delta, self.passage.gate("adapter", y))


class GatedLoRA(GatedUpdate):
    """A low-rank update behind its gate."""

    def __init__(self, lora: LowRank, passage: Passage) -> None:
        super().__init__()
        self.lora, self.passage = lora, passage

    def updated(self, module: nn.Module, y: Tensor, x: Any) -> Tensor:
        delta = self.lora.update(module, torch.zeros_like(y), x)
        return torch.addcmul(y, delta, self.passage.gate("lora", y))


def _distinct(kind: type[A], rows: Sequence[Adapter | None]) -> list[A]:
    """The adapters of that kind, each once."""
    return list({id(row): row for row in rows if isinstance(row, kind)}.values())
