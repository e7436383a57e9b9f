"""Texts for decoders: several packed into one row, none seeing the others, or one to a row and padded."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_peft.data.labels import IGNORED
from lightning_peft.data.module import Collate, TextData, head, is_stream
from lightning_peft.data.sampling import Stream, lengths
from lightning_peft.data.tokenizing import padded
from lightning_peft.methods.errors import PEFTError

if TYPE_CHECKING:
    from datasets import Dataset

TOGETHER = 1000
"""Documents that are packed together."""
Encoder = Callable[..., dict[str, list[Any]]]


class DecoderData(TextData):
    """Tables of texts for a decoder.

    A batch holds `input_ids` and `labels`, int64 of shape (batch, length), where labels are those of the tokens at the
    same places (a model shifts them itself) and -100 where nothing is learned. Padded on the right it holds
    `attention_mask` too. Packed it holds `position_ids`, which start anew with each text, and no mask: models of
    transformers see from them which tokens belong together. The padding behind packed texts is a text of its own.

    Args:
        path: see `TableData`.
        packing: put several texts into one row of up to `max_length` tokens, in evaluation too. A text is never split
            by it.
        max_length: rows have at most this many tokens.
        **options: see `TextData`.
    """

    def __init__(self, path: str, *, packing: bool = False, max_length: int = 512, **options: Any) -> None:
        self.packing = packing
        super().__init__(path, max_length=max_length, **options)

    def load_processor(self, source: str) -> None:
        """Load the tokenizer, which has to know how a text ends."""
        super().load_processor(source)
        if self.tokenizer.eos_token_id is None:
            raise PEFTError(f"tokenizer: {source!r} has no end-of-sequence token to end a text with")

    @abstractmethod
    def encoder(self, table: Any, split: str, streamed: bool) -> tuple[Encoder, dict[str, Any]]:
        """The function that gives a batch of rows `input_ids`, `labels` and markers, and its arguments.

        Args:
            table: the rows.
            split: their name.
            streamed: whether what it returns is trained on as it comes, or is looked at by `kept` first.
        """

    def kept(self, encoded: Dataset, table: Dataset, split: str) -> Dataset:
        """The encoded rows of `table` that are trained on."""
        return encoded

    def encode(self, table: Any, split: str) -> Any:
        """Texts as rows of tokens, packed where that was asked for; of a stream, its head is encoded to check it."""
        first = head(table)
        function, arguments = self.encoder(first, split, streamed=False)
        encoded = self.kept(self.encoded(first, split, function, **arguments), first, split)
        if len(encoded) == 0:
            raise PEFTError(f"path: the {split} data has no row that anything can be learned from")
        encoded = self.packed(encoded, split)
        if not is_stream(table):
            return encoded
        function, arguments = self.encoder(first, split, streamed=True)
        return self.packed(self.streamed(table, function, **arguments), split)

    def packed(self, encoded: Any, split: str) -> Any:
        """Encoded rows, packed where that was asked for; how full the packed rows are is logged."""
        if not self.packing:
            return encoded
        options: dict[str, Any] = {
            "batched": True,
            "batch_size": TOGETHER,
            "remove_columns": ["input_ids", "labels"],
            "fn_kwargs": {"max_length": self.max_length},
        }
        if isinstance(encoded, Stream):
            return encoded.map(pack, **options)
        rows = encoded.map(pack, desc=f"Packing {split}", **options)
        filled = sum(lengths(rows)) / (len(rows) * self.max_length)
        rank_zero_info(
            f"{split}: {len(encoded):,} texts{self.part(split)} are packed into {len(rows):,} rows of "
            f"max_length={self.max_length} tokens, which are {filled:.1%} full"
        )
        return rows

    def collate(self) -> Collate:
        """Pads a batch to its longest row."""
        return partial(collate_packed if self.packing else collate_padded, pad=self.tokenizer.pad_token_id)

    def filler(self, row: dict[str, Any]) -> dict[str, Any]:
        """The same text without labels."""
        return {**row, "labels": [IGNORED] * len(row["labels"])}


def collate_padded(rows: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """A batch padded on the right; `labels` where the rows have them.

    Args:
        rows: `input_ids` and `labels`.
        pad: the token to pad with.
    """
    batch = {
        "input_ids": padded([row["input_ids"] for row in rows], pad),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
    }
    return {**batch, "labels": padded([row["labels"] for row in rows], IGNORED)} if "labels" in rows[0] else batch


def collate_packed(rows: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """A batch of packed rows, padded on the right with a text of its own; arguments as in `collate_padded`."""
    longest = max(len(row["input_ids"]) for row in rows)
    positions = [row["position_ids"] + list(range(longest - len(row["position_ids"]))) for row in rows]
    batch = {"input_ids": padded([row["input_ids"] for row in rows], pad), "position_ids": torch.tensor(positions)}
    return {**batch, "labels": padded([row["labels"] for row in rows], IGNORED)} if "labels" in rows[0] else batch


def pack(batch: dict[str, list[Any]], max_length: int) -> dict[str, list[Any]]:
    """Rows of one text each as rows of several; made for `table.map`.

    Args:
        batch: `input_ids` and `labels` of texts of at most `max_length` tokens.
        max_length: the most tokens of a row.
    """
    rows: dict[str, list[Any]] = {"input_ids": [], "labels": [], "position_ids": []}
    for texts in first_fit([len(ids) for ids in batch["input_ids"]], max_length):
        rows["input_ids"].append([token for text in texts for token in batch["input_ids"][text]])
        # a text's first token would be predicted from the text before
        rows["labels"].append([label for text in texts for label in [IGNORED, *batch["labels"][text][1:]]])
        rows["position_ids"].append([place for text in texts for place in range(len(batch["input_ids"][text]))])
    return rows


def first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Items in bins by first-fit decreasing: the largest first, each in the first bin with room for it.

    Args:
        sizes: the size of each item, at most `capacity`.
        capacity: the size of a bin.

    Returns:
        the items of each bin, ascending; bins in the order of their first items.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        place = next((place for place, left in enumerate(room) if left >= sizes[item]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(item)
        room[place] -= sizes[item]
    return sorted(sorted(items) for items in bins)
