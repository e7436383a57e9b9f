"""Labelled text from a file, a folder or the hub, as batches for a classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from lightning_peft.data.labelled import LabelledData
from lightning_peft.data.module import Collate, TextData
from lightning_peft.data.tokenizing import missing_columns, text_faults, tokenize

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class TextClassificationData(LabelledData, TextData):
    """Text with one label per row, tokenized, in batches padded to their longest row.

    A batch holds the tokenizer's fields, `input_ids` and `attention_mask` and for some models `token_type_ids`, each
    int64 of shape (batch, length), and `labels`, int64 of shape (batch,).

    Args:
        path: see `TableData`.
        text_column: the column that holds the text, or two columns for pairs.
        **options: see `LabelledData` and `TextData`. A stream is refused, since it has to be read to its end before the
            classes are known.

    Raises:
        PEFTError: by the constructor, a number is out of its range; by `setup`, data that can't be trained on: a
            missing file or column, an empty or malformed file, a single class, labels that training doesn't have.
    """

    def __init__(
        self,
        path: str,
        *,
        text_column: str | list[str] = "text",
        **options: Any,
    ) -> None:
        self.text_columns = [text_column] if isinstance(text_column, str) else list(text_column)
        super().__init__(path, **options)

    def faults(self) -> list[str]:
        """What is wrong with the arguments."""
        faults = []
        if len(self.text_columns) not in (1, 2):
            faults.append(f"text_column: give one column or two, not {self.text_columns!r}")
        if self.streaming:
            faults.append(
                "streaming: the classes are known once all is read; leave it out, the table is mapped from disk"
            )
        return faults + super().faults()

    def column_faults(self, table: Dataset, split: str) -> list[str]:
        """Columns that are missing, and text that is none."""
        needed = {"text_column": self.text_columns, "label_column": [] if split == "test" else [self.label_column]}
        return missing_columns(table, split, needed) + [
            fault
            for column in self.text_columns
            if column in table.column_names
            for fault in text_faults(table, column, split, "text_column")
        ]

    def encode(self, table: Dataset, split: str) -> Dataset:
        """The tokenizer's fields and, where a split has them, labels."""
        return cast(
            "Dataset",
            self.encoded(
                table,
                split,
                _encode,
                tokenizer=self.tokenizer,
                text_columns=self.text_columns,
                label_column=self.label_column,
                index=self.index(split),
                max_length=self.max_length,
            ),
        )

    def collate(self) -> Collate:
        """Pads a batch to its longest row."""
        from transformers import DataCollatorWithPadding

        return cast(Collate, DataCollatorWithPadding(self.tokenizer))


def _encode(
    batch: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    text_columns: list[str],
    label_column: str,
    index: dict[Any, int] | None,
    max_length: int,
) -> dict[str, list[Any]]:
    fields = tokenize(tokenizer, [batch[column] for column in text_columns], max_length)
    return fields if index is None else {**fields, "labels": [index[value] for value in batch[label_column]]}
