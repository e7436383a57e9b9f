"""Virtual tokens in a model's input: their embeddings, and the three modules that have to know of them.

A text model's adapter puts ids for them between its own, behind the end of the vocabulary; the adapter of its input
embeddings answers those with what is trained; and what the text model returns is cut back to the tokens that it was
given. So whatever calls the text model, a head or `generate`, need not know. The decoder of an encoder-decoder sees
the virtual tokens in its encoder's output; its adapter makes their place in the mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.methods._host import Adapter, Base, adapter_dtype, own_class
from lightning_peft.methods._prompts_layout import Kind, Layout, Places
from lightning_peft.methods.errors import PEFTError

NOWHERE = Places(0, 0)
POSITION_EMBEDDINGS = ("wpe", "position_embeddings", "position_embedding", "embed_positions")


class PromptAdapter(Adapter):
    """What the adapters of virtual tokens have in common: none can be merged."""

    around_split = True

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        raise PEFTError(
            "merge: virtual tokens are added to the input, which no weight of the base can hold; keep them as an "
            "adapter"
        )


class PromptEmbedding(PromptAdapter):
    """Embeddings of virtual tokens beside a model's own; a subclass says how they come from what it trains.

    They are given for ids from the size of the vocabulary on, which `PromptedModel` alone asks for.
    """

    def table(self) -> Tensor:
        """The embeddings (n, width), in the adapter's dtype."""
        raise NotImplementedError

    def forward(self, base: Base, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        (ids,) = (*args, *kwargs.values())
        return _looked_up(base, ids, ids - cast(nn.Embedding, module).num_embeddings, self.table())

    def forward_rows(
        self, rows: Sequence[Adapter | None], base: Base, module: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        """Each row's virtual tokens are those of its own adapter."""
        (ids,) = (*args, *kwargs.values())
        tables = {id(row): row.table() for row in rows if isinstance(row, PromptEmbedding)}
        if not tables:
            return base(ids)
        starts, end = {}, 0
        for key, table in tables.items():
            starts[key], end = end, end + len(table)
        start = torch.tensor([starts.get(id(row), 0) for row in rows], device=ids.device)
        numbers = ids - cast(nn.Embedding, module).num_embeddings
        return _looked_up(
            base, ids, torch.where(numbers < 0, -1, numbers + start[:, None]), torch.cat([*tables.values()])
        )


def _looked_up(base: Base, ids: Tensor, numbers: Tensor, table: Tensor) -> Tensor:
    """The base's embeddings of `ids`, but rows of `table` where `numbers` is no negative one."""
    is_virtual = numbers >= 0
    own: Tensor = base(ids.masked_fill(is_virtual, 0))
    prompts = F.embedding(numbers.clamp(min=0), table).to(own.dtype)
    return torch.where(is_virtual[..., None], prompts, own)


class FreePrompt(PromptEmbedding):
    """Embeddings that are trained themselves.

    Args:
        embeddings: where they start, (n, width).
    """

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.prompt = nn.Parameter(embeddings)

    def table(self) -> Tensor:
        return self.prompt


class PromptedModel(PromptAdapter):
    """Puts virtual tokens into the input of a text model, and takes them out of its output.

    Args:
        module: the text model, see `_prompts_targets.text_models`.
        places: how many virtual tokens go where.
        kind: of text model; an encoder half's output keeps the virtual tokens, for the decoder to read.
        leads: whether the first token's output is that of the first virtual one, as a classification head's in HF peft.

    Raises:
        PEFTError: the model has no more positions than there are virtual tokens; while it runs, an input leaves no
            place for them: it is too long or packed, its mask is no (rows, length), its cache static or filled
            without them.
    """

    def __init__(self, module: nn.Module, places: Places, kind: Kind, *, leads: bool) -> None:
        super().__init__()
        self.places, self.kind, self.leads = places, kind, leads
        self.names = argument_names(module)
        self.first_position, self.limit = _positions(module)
        n = sum(places)
        if self.limit is not None and n >= self.limit:
            raise PEFTError(f"num_virtual_tokens: {n} leaves no position for a token; the model has {self.limit}")

    def forward(self, base: Base, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._run([self.places], base, module, {**dict(zip(self.names, args, strict=False)), **kwargs})

    def forward_rows(
        self, rows: Sequence[Adapter | None], base: Base, module: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        """All rows at once, each with its own virtual tokens: a cache can't be split by rows."""
        places = [row.places if isinstance(row, PromptedModel) else NOWHERE for row in rows]
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        return self._run(places, base, module, given)

    def _run(self, places: Sequence[Places], base: Base, module: nn.Module, given: dict[str, Any]) -> Any:
        ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
        if (ids is None) == (embeddings is None):
            return base(**given)  # which tells that it needs one of the two
        batch = cast(Tensor, embeddings if ids is None else ids)
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        seen = 0 if cache is None or self.kind is not Kind.DECODER else cache.get_seq_length()
        self._check(module, places, batch, given)
        layout = Layout(places, batch, None if seen else mask, self.kind)
        self._check_length(layout, seen)
        if seen:
            return base(**{**given, **self._continued(places, layout, given, seen)})
        added: dict[str, Any] = {"attention_mask": layout.mask(mask)}
        table = cast(Any, module).get_input_embeddings()
        if ids is None:
            virtual = torch.where(layout.numbers < 0, 0, layout.numbers + table.num_embeddings)
            added["inputs_embeds"] = layout.embeddings(batch, table(virtual.expand(len(places), -1)))
        else:
            added["input_ids"] = layout.ids(ids, table.num_embeddings)
        if given.get("token_type_ids") is not None:
            added["token_type_ids"] = layout.token_types(given["token_type_ids"])
        positions = self._given_positions(layout, given, 0)
        if positions is not None:
            added["position_ids"] = layout.positions(positions, mask, self.first_position)
        output = base(**{**given, **added})
        return output if self.kind is Kind.HALF else self._cut(output, layout)

    def _continued(
        self, places: Sequence[Places], layout: Layout, given: Mapping[str, Any], seen: int
    ) -> dict[str, Any]:
        """What is to be said otherwise when the virtual tokens are in the cache already."""
        added: dict[str, Any] = {}
        mask, tokens = given.get("attention_mask"), seen - layout.before + layout.length
        if self._is_other_cache(mask, given.get("position_ids"), tokens, layout.length):
            raise PEFTError(
                f"past_key_values: it holds {seen} tokens, and {layout.before} of them are not virtual ones, or are "
                "not counted as such; begin with an empty cache, and go on with it in the same call of generate"
            )
        if mask is None and not layout.all_used:
            mask = layout.numbers.new_ones(layout.rows, tokens)
        if mask is not None:
            added["attention_mask"] = Layout(places, mask, mask, self.kind).mask(mask)
        positions = self._given_positions(layout, given, seen - layout.before)
        if positions is not None:
            added["position_ids"] = positions + layout.count
        return added

    def _is_other_cache(self, mask: Tensor | None, positions: Tensor | None, tokens: int, new: int) -> bool:
        """Whether the mask or the positions are of another number of tokens than there are with the new ones."""
        if mask is not None:
            return mask.shape[1] != tokens
        if positions is None or not _can_read(positions) or self.first_position:
            return False
        return bool((positions[:, 0] != tokens - new).any())

    def _given_positions(self, layout: Layout, given: Mapping[str, Any], start: int) -> Tensor | None:
        """The tokens' positions; None where they are what the model gives to a row that begins with virtual tokens."""
        if given.get("position_ids") is not None:
            return cast(Tensor, given["position_ids"])
        if layout.all_used or self.kind is not Kind.DECODER or "position_ids" not in self.names:
            return None
        return torch.arange(layout.length, device=layout.device)[None].expand(layout.rows, -1) + (
            start + self.first_position
        )

    def _cut(self, output: Any, layout: Layout) -> Any:
        """The output without the virtual tokens' part; attention's weights and caches keep it."""
        if isinstance(output, Tensor):
            is_sequence = output.dim() == 3 and output.shape[1] == layout.length + layout.before + layout.behind
            return layout.tokens(output, self.leads) if is_sequence else output
        if isinstance(output, dict):
            return type(output)(**{key: self._cut(value, layout) for key, value in output.items()})
        return tuple(self._cut(value, layout) for value in output) if isinstance(output, tuple) else output

    def _check(self, module: nn.Module, places: Sequence[Places], batch: Tensor, given: Mapping[str, Any]) -> None:
        name = own_class(module).__name__
        mask, positions, cache = (given.get(key) for key in ("attention_mask", "position_ids", "past_key_values"))
        if len(places) not in (1, len(batch)):
            raise PEFTError(
                f"adapter_per_row: {len(places)} names, but {name} was given {tuple(batch.shape)}; its first dimension "
                "must be the rows"
            )
        if self.kind is Kind.DECODER and getattr(cache, "is_compileable", False):
            raise PEFTError(
                f"past_key_values: {name} was given a static cache, whose size and mask leave no room for virtual "
                "tokens; use a dynamic one, which is generate's default"
            )
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise PEFTError(
                f"attention_mask: {name} was given one for pairs of tokens, which virtual ones can't be added to; give "
                "one of shape (rows, length)"
            )
        if positions is None or mask is not None or cache is not None or not _can_read(positions):
            return
        if bool((positions.diff(dim=-1) != 1).any()):
            raise PEFTError(
                "position_ids: they begin anew inside of a row, as where several texts are packed into it, and virtual "
                "tokens stand before the first one alone; use packing=False"
            )

    def _check_length(self, layout: Layout, seen: int) -> None:
        n = layout.before + layout.behind
        tokens = layout.length + max(seen - n, 0)
        if self.limit is not None and tokens + n > self.limit:
            raise PEFTError(
                f"{tokens} tokens and {n} virtual ones are more than the model's {self.limit} positions; cut sequences "
                f"to {self.limit - n} tokens"
            )


class PromptedMask(PromptAdapter):
    """Makes room for an encoder's virtual tokens in the mask by which a decoder sees its output."""

    def __init__(self, module: nn.Module, places: Places) -> None:
        super().__init__()
        self.places, self.names = places, argument_names(module)

    def forward(self, base: Base, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return base(**self._seen([self.places], {**dict(zip(self.names, args, strict=False)), **kwargs}))

    def forward_rows(
        self, rows: Sequence[Adapter | None], base: Base, module: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        """By each row's own number of virtual tokens."""
        places = [row.places if isinstance(row, PromptedMask) else NOWHERE for row in rows]
        return base(**self._seen(places, {**dict(zip(self.names, args, strict=False)), **kwargs}))

    def _seen(self, places: Sequence[Places], given: dict[str, Any]) -> dict[str, Any]:
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if states is None:
            return given
        n = max(place.before for place in places) + max(place.behind for place in places)
        length = states.shape[1] - n
        if length < 1 or (mask is not None and mask.shape[1] != length):
            return given  # states that no virtual token is in, as when the encoder ran without its adapter
        layout = Layout(places, states[:, :length], mask, Kind.HALF)
        return {**given, "encoder_attention_mask": layout.mask(mask)}


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """The names of what its own forward takes, in order."""
    return tuple(inspect.signature(own_class(module).forward).parameters)[1:]


def _can_read(positions: Tensor) -> bool:
    """Whether to look at their values: not while a graph is made of them, nor where they are of several kinds."""
    return positions.dim() == 2 and not positions.is_meta and not torch.compiler.is_compiling()


def start_like(module: nn.Embedding, n: int) -> Tensor:
    """N(0, 1) for n embeddings, on the device of the model's own and in the dtype that goes with theirs."""
    weight = module.weight
    return torch.randn(n, module.embedding_dim, dtype=adapter_dtype(weight), device=weight.device)


@torch.no_grad()
def rows_of(module: nn.Embedding, ids: Tensor) -> Tensor:
    """The model's own embeddings of `ids`, as it looks them up, in the adapter's dtype."""
    found = cast(Tensor, own_class(module).forward(module, ids.to(module.weight.device)))
    return found.to(adapter_dtype(module.weight), copy=True)


def _positions(module: nn.Module) -> tuple[int, int | None]:
    """The first position that a token can have, and how many there are; None where there is no end to them."""
    for path, inner in module.named_modules():
        if isinstance(inner, nn.Embedding) and path.rpartition(".")[2] in POSITION_EMBEDDINGS:
            # RoBERTa counts from behind its padding index, and BART's offset is hidden inside of its embedding
            first = 0 if inner.padding_idx is None else inner.padding_idx + 1
            return first, inner.num_embeddings - (first or int(getattr(inner, "offset", 0)))
    return 0, None
