"""Texts of words with one tag per word, as batches for a tagger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

from torch.utils.data import DataLoader

from lightning_peft.data.labels import IGNORED, Classes, classes_of, row_numbers, unseen
from lightning_peft.data.module import Collate, TextData
from lightning_peft.data.tokenizing import CUT, load_tokenizer, missing_columns
from lightning_peft.methods.errors import PEFTError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase


class TokenClassificationData(TextData):
    """Words with one tag each, split into a tokenizer's pieces, in batches padded to their longest row.

    A batch holds the tokenizer's fields, `input_ids` and `attention_mask` and for some models `token_type_ids`, and
    `labels`, each int64 of shape (batch, length). The first piece of a word has the word's tag; its other pieces,
    special tokens and padding have -100. A test table without tags (no such column, or null throughout) serves for
    prediction only.

    Args:
        path: see `TableData`.
        tokens_column: the column that holds the words, a list of strings in each row.
        tags_column: the column that holds their tags, a list of as many strings or integers.
        **options: see `TextData`; a tokenizer has to be a fast one. A stream is refused, since it has to be read to its
            end before the classes are known.

    Attributes:
        class_names: the tags, by id; known after `setup`, as are the next two.
        num_labels: how many there are.
        class_counts: the number of training words of each, by id.

    Raises:
        PEFTError: by the constructor, a number is out of its range; by `setup`, data that can't be trained on: a
            missing file or column, rows without words, or with other numbers of words than of tags, tags that are
            null, negative or unknown to training, a single class.
    """

    def __init__(
        self,
        path: str,
        *,
        tokens_column: str = "tokens",
        tags_column: str = "tags",
        **options: Any,
    ) -> None:
        self.tokens_column, self.tags_column = tokens_column, tags_column
        super().__init__(path, **options)
        self.class_names: list[str] = []
        self.class_counts: list[int] = []
        self.num_labels = 0
        self._classes: Classes | None = None

    def faults(self) -> list[str]:
        """What is wrong with the arguments."""
        told = "streaming: the classes are known once all is read; leave it out, the table is mapped from disk"
        return ([told] if self.streaming else []) + super().faults()

    def column_faults(self, table: Dataset, split: str) -> list[str]:
        """Columns that are missing or of another kind, and rows whose words and tags don't fit."""
        columns = {"tokens_column": self.tokens_column, "tags_column": self.tags_column}
        if not self._tagged(table, split):
            del columns["tags_column"]
        faults = missing_columns(table, split, {field: [column] for field, column in columns.items()})
        for field, column in columns.items():
            if column in table.column_names and not _holds_lists(table.features[column], field == "tokens_column"):
                wanted = "strings" if field == "tokens_column" else "strings or integers"
                faults.append(f"{field}: {column!r} of the {split} data holds no lists of {wanted}")
        return faults or _row_faults(table, split, columns)

    def hold_out(self, splits: DatasetDict) -> None:
        """Validation rows, and the classes of all rows that there were: a rare tag may be in the rows held out."""
        train, column = splits["train"], self.tags_column
        classes = classes_of(_counted(train, column), train.features[column].feature, column, "tags_column")
        super().hold_out(splits)
        counts = _counted(splits["train"], column)
        self._classes = replace(classes, counts=[counts[value] for value in classes.index])
        self.class_names, self.class_counts, self.num_labels = classes.names, self._classes.counts, len(classes.names)

    def row_faults(self, tables: Mapping[str, Dataset]) -> list[str]:
        """Tags that training doesn't have."""
        assert self._classes is not None
        return [
            fault
            for split, table in sorted(tables.items())
            if split != "train" and self._tagged(table, split)
            for fault in unseen(_counted(table, self.tags_column), self._classes, split, "tag", "word")
        ]

    def load_processor(self, source: str) -> None:
        """Load the tokenizer.

        Raises:
            PEFTError: there is none, or it can't tell which word a piece is from.
        """
        super().load_processor(source)
        if not self.tokenizer.is_fast:
            raise PEFTError(f"tokenizer: {source!r} is no fast tokenizer, and only these know the word of each piece")
        if getattr(self.tokenizer, "add_prefix_space", None) is False:
            # those of GPT-2 and RoBERTa would read single words as the middles of words
            self.tokenizer = load_tokenizer(source, self.max_length, add_prefix_space=True)

    def encode(self, table: Dataset, split: str) -> Dataset:
        """The tokenizer's fields and, where a split has tags, labels."""
        assert self._classes is not None
        arguments = {
            "tokenizer": self.tokenizer,
            "tokens_column": self.tokens_column,
            "tags_column": self.tags_column,
            "index": self._classes.index if self._tagged(table, split) else None,
            "max_length": self.max_length,
        }
        return cast("Dataset", self.encoded(table, split, _encode, **arguments))

    def collate(self) -> Collate:
        """Pads a batch to its longest row."""
        from transformers import DataCollatorForTokenClassification

        return cast(Collate, DataCollatorForTokenClassification(self.tokenizer, label_pad_token_id=IGNORED))

    def filler(self, row: dict[str, Any]) -> dict[str, Any]:
        """The same words without tags."""
        return {**row, "labels": [IGNORED] * len(row["input_ids"])}

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test rows in order.

        Raises:
            PEFTError: there is no test table, or it has no tags.
        """
        if "labels" not in (self._encoded["test"].column_names if "test" in self._encoded else []):
            raise PEFTError("test_path: there are no test rows with tags; give a file that has them")
        return super().test_dataloader()

    def _tagged(self, table: Dataset, split: str) -> bool:
        """Whether the rows have tags, which only those of a test table may lack."""
        if split != "test":
            return True
        return self.tags_column in table.column_names and any(tags is not None for tags in table[self.tags_column])


def _holds_lists(feature: Any, of_text: bool) -> bool:
    from datasets import ClassLabel, Value

    inner = getattr(feature, "feature", None)
    if not isinstance(inner, (ClassLabel, Value)):
        return False
    text = inner.dtype in ("string", "large_string")
    # a column of nothing but empty lists has no type of its own; those rows are told
    return text or inner.dtype == "null" or (not of_text and "int" in inner.dtype)


def _row_faults(table: Dataset, split: str, columns: Mapping[str, str]) -> list[str]:
    """One fault for each way in which rows are unfit, with the numbers of the rows."""
    wrong: dict[str, list[int]] = {}
    rows = [_values(table, column) for column in columns.values()]
    for number, row in enumerate(zip(*rows, strict=True), 1):
        for field, values in zip(columns, row, strict=True):
            if fault := _list_fault(values, field == "tags_column"):
                wrong.setdefault(f"{field}: {{}} {fault}", []).append(number)
        if len(row) == 2 and row[0] and row[1] and len(row[0]) != len(row[1]):
            wrong.setdefault("tags_column: {} have other numbers of tags than of words", []).append(number)
    return [
        f"{fault.format(f'{len(numbers):,} of {len(table):,} rows of the {split} data')}: {row_numbers(numbers)}"
        for fault, numbers in wrong.items()
    ]


def _list_fault(values: list[Any] | None, tags: bool) -> str | None:
    if not values:
        return "have no tags" if tags else "have no words"
    if None in values:
        return "have a tag that is null" if tags else "have a word that is null"
    if tags and not isinstance(values[0], str) and min(values) < 0:
        return "have a negative tag"
    return None


def _values(table: Dataset, column: str) -> Iterator[Any]:
    for batch in table.select_columns([column]).iter(batch_size=1000):
        yield from batch[column]


def _counted(table: Dataset, column: str) -> Counter[Hashable]:
    return Counter(chain.from_iterable(_values(table, column)))


def _encode(
    batch: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    tokens_column: str,
    tags_column: str,
    index: dict[Any, int] | None,
    max_length: int,
) -> dict[str, list[Any]]:
    fields = tokenizer(batch[tokens_column], is_split_into_words=True, truncation=True, max_length=max_length)
    encodings = fields.encodings
    assert encodings is not None
    encoded = {**fields, CUT: [bool(encoding.overflowing) for encoding in encodings]}
    if index is None:
        return encoded
    labels = [
        _labels(encoding.word_ids, [index[tag] for tag in tags])
        for encoding, tags in zip(encodings, batch[tags_column], strict=True)
    ]
    return {**encoded, "labels": labels}


def _labels(words: list[int | None], tags: list[int]) -> list[int]:
    """The tag of each piece that is the first of its word, and -100 for all others."""
    before = [None, *words]
    return [
        IGNORED if word is None or word == previous else tags[word]
        for word, previous in zip(words, before, strict=False)
    ]
