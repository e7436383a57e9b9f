"""Pairs of texts for encoder-decoders: translation, summaries, or any other text from a text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.utils.data import DataLoader

from lightning_peft.data.conversations import slots_of
from lightning_peft.data.files import HEAD
from lightning_peft.data.labels import IGNORED, row_numbers
from lightning_peft.data.module import Collate, TextData, head
from lightning_peft.data.tokenizing import CUT, load_tokenizer, missing_columns, padded, tokenize
from lightning_peft.methods.errors import PEFTError, suggestion

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TARGET_CUT = "target_was_cut"
"""The column that says whether a target was longer than max_target_length."""
PAIRS = "translation"
"""The column that holds a text in several languages, as hub datasets have it."""


class TranslationData(TextData):
    """Texts, and what is to be made of them: translations, summaries, answers.

    A batch holds `input_ids`, `attention_mask` and `labels`, int64 of shape (batch, length), each padded on the right
    to its longest row, labels with -100. A model makes its decoder's inputs from the labels. Prediction gives the same
    batches without labels. A test table without targets serves for prediction only.

    Args:
        path: see `TableData`.
        source_column: the column that holds the text.
        target_column: the column that holds what is to be made of it.
        source_language: with `target_language`, the key of the text in a column `translation`, which holds the same in
            several languages, such as `{en: …, de: …}`; in place of the two columns.
        target_language: the key of its translation.
        template: what the model reads, with the slot `{source}`, such as `translate English to German: {source}`.
        max_target_length: targets are cut to this many tokens; by default `max_length`.
        tokenizer_options: passed on to the tokenizer's `from_pretrained`, such as `{src_lang: en_XX, tgt_lang: de_DE}`.
        **options: see `TextData`; `max_length` is that of the sources.

    Attributes:
        cut_targets: the number of targets longer than `max_target_length`, by split; of a stream, among its first
            1,000 rows.

    Raises:
        PEFTError: by the constructor, an argument that can't be; by `setup`, data that can't be trained on: a missing
            column or language, rows without a source or target.
    """

    markers: ClassVar[tuple[str, ...]] = (CUT, TARGET_CUT)

    def __init__(
        self,
        path: str,
        *,
        source_column: str = "source",
        target_column: str = "target",
        source_language: str | None = None,
        target_language: str | None = None,
        template: str = "{source}",
        max_target_length: int | None = None,
        tokenizer_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        paired = source_language is not None or target_language is not None
        self.source = (
            _Place("source_language", PAIRS, source_language) if paired else _Place("source_column", source_column)
        )
        self.target = (
            _Place("target_language", PAIRS, target_language) if paired else _Place("target_column", target_column)
        )
        self.template, self.tokenizer_options = template, tokenizer_options or {}
        self.max_target_length = max_target_length
        super().__init__(path, **options)
        self.cut_targets: dict[str, int] = {}

    def faults(self) -> list[str]:
        """What is wrong with the arguments."""
        faults = []
        try:
            slots = slots_of(self.template)
        except ValueError as error:
            faults.append(f"template: {self.template!r} is no format string: {error}")
        else:
            if slots != ["source"]:
                faults.append(f"template: {self.template!r} needs the slot {{source}}, and no other")
        faults += [
            f"{place.field}: give the languages of both sides, or of none"
            for place in (self.source, self.target)
            if place.field.endswith("language") and place.language is None
        ]
        if self.max_target_length is not None and self.max_target_length < 1:
            faults.append(f"max_target_length: {self.max_target_length} is less than 1")
        return faults + super().faults()

    def column_faults(self, table: Dataset, split: str) -> list[str]:
        """Columns or languages that are missing, and rows without a text."""
        if self.source.language is None and not self.source.is_in(table) and PAIRS in table.column_names:
            known = ", ".join(_languages(table)) or "no languages"
            return [f"source_language: the {split} data has the column {PAIRS!r} with {known}; say which is the source"]
        places = [self.source] + [self.target] * (split != "test" or self.target.is_in(table))
        faults = missing_columns(table, split, {place.field: [place.column] for place in places})
        faults = faults or [fault for place in places for fault in place.language_faults(table, split)]
        return faults or [fault for place in places for fault in place.row_faults(table, split)]

    def load_processor(self, source: str) -> None:
        """Load the tokenizer."""
        longest = max(self.max_length, self.max_target_length or 0)
        self.tokenizer = load_tokenizer(source, longest, **self.tokenizer_options)

    def encode(self, table: Any, split: str) -> Any:
        """The tokenizer's fields and, where a split has targets, labels."""
        return self.encoded(
            table,
            split,
            encode_pairs,
            tokenizer=self.tokenizer,
            source=self.source,
            target=self.target if self.target.is_in(head(table)) else None,
            template=self.template,
            max_length=self.max_length,
            max_target_length=self.max_target_length or self.max_length,
        )

    def count_cut(self, mapped: Dataset, split: str) -> None:
        """Count and report the sources and the targets that are marked as cut."""
        self.cut_rows[split] = self.report_cut(mapped, CUT, split, "sources", f"max_length={self.max_length}")
        limit = f"max_target_length={self.max_target_length or self.max_length}"
        self.cut_targets[split] = self.report_cut(mapped, TARGET_CUT, split, "targets", limit)

    def collate(self) -> Collate:
        """Pads a batch to its longest source and its longest target."""
        return partial(_collate, pad=self.tokenizer.pad_token_id)

    def filler(self, row: dict[str, Any]) -> dict[str, Any]:
        """The same texts without labels."""
        return {**row, "labels": [IGNORED] * len(row["labels"])}

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test rows in order.

        Raises:
            PEFTError: there is no test table, or it has no targets.
        """
        if "labels" not in (self._encoded["test"].column_names if "test" in self._encoded else ["labels"]):
            raise PEFTError(f"{self.target.field}: the test data has no targets; only predict on it")
        return super().test_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the test rows in order, or of the validation rows where there is no test table, without labels."""
        rows = self._encoded[self.predict_split()]
        return self.loader(rows.select_columns(["input_ids", "attention_mask"]))


@dataclass(frozen=True)
class _Place:
    """Where the texts of one side are.

    Attributes:
        field: the name of the field that says so.
        column: a column of texts, or of dictionaries of texts.
        language: the text's key in these.
    """

    field: str
    column: str
    language: str | None = None

    def is_in(self, table: Dataset) -> bool:
        """Whether a table has it."""
        return self.column in table.column_names and (self.language is None or self.language in _languages(table))

    def texts(self, batch: dict[str, list[Any]]) -> list[Any]:
        """The texts of a batch of rows; null where a row has none."""
        if self.language is None:
            return batch[self.column]
        return [pair.get(self.language) if isinstance(pair, dict) else None for pair in batch[self.column]]

    def language_faults(self, table: Dataset, split: str) -> list[str]:
        """That its language is missing, with the nearest names."""
        if self.is_in(table):
            return []
        known = _languages(table)
        near = suggestion(str(self.language), known) or f"; it has {', '.join(known) or 'none'}"
        return [f"{self.field}: the {split} data has no language {self.language!r}{near}"]

    def row_faults(self, table: Dataset, split: str) -> list[str]:
        """The rows that have no text."""
        batches = table.select_columns([self.column]).iter(batch_size=1000)
        texts = (text for batch in batches for text in self.texts(batch))
        rows = [number for number, text in enumerate(texts, 1) if not _is_text(text)]
        count = f"{len(rows):,} of {len(table):,} rows"
        return [f"{self.field}: {count} of the {split} data have no text: {row_numbers(rows)}"] if rows else []


def _languages(table: Dataset) -> list[str]:
    """The keys of the dictionaries in the column of pairs, as far as the first rows show them."""
    return sorted({key for pair in table[:HEAD][PAIRS] if isinstance(pair, dict) for key in pair})


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def encode_pairs(
    batch: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    source: _Place,
    target: _Place | None,
    template: str,
    max_length: int,
    max_target_length: int,
) -> dict[str, list[Any]]:
    """Sources as tokens and targets as labels, with what was cut marked; made for `table.map`.

    Raises:
        PEFTError: a row has no text.
    """
    for place in (source, target) if target is not None else (source,):
        odd = [text for text in place.texts(batch) if not _is_text(text)]
        if odd:
            raise PEFTError(f"{place.field}: a row of the stream has {odd[0]!r} in place of a text")
    fields = tokenize(tokenizer, [[template.format(source=text) for text in source.texts(batch)]], max_length)
    encoded = {name: fields[name] for name in ("input_ids", "attention_mask", CUT)}
    if target is None:
        return {**encoded, TARGET_CUT: [False] * len(fields[CUT])}
    whole = tokenizer(text_target=target.texts(batch), verbose=False)["input_ids"]
    labels = tokenizer(text_target=target.texts(batch), truncation=True, max_length=max_target_length)["input_ids"]
    cut = [len(short) < len(long) for short, long in zip(labels, whole, strict=True)]
    return {**encoded, "labels": labels, TARGET_CUT: cut}


def _collate(rows: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    batch = {
        "input_ids": padded([row["input_ids"] for row in rows], pad),
        "attention_mask": padded([row["attention_mask"] for row in rows], 0),
    }
    return {**batch, "labels": padded([row["labels"] for row in rows], IGNORED)} if "labels" in rows[0] else batch
