"""Labelled text from a file, a folder or the hub, as batches for a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch.utils.data import DataLoader

from lightning_peft.data.labels import IGNORED, Classes, find_classes, has_labels, stratified_split, unseen_labels
from lightning_peft.data.module import Collate, TextData
from lightning_peft.data.tokenizing import missing_columns, text_faults, tokenize
from lightning_peft.methods.errors import PEFTError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase


class TextClassificationData(TextData):
    """Text with one label per row, tokenized, in batches padded to their longest row.

    A batch holds the tokenizer's fields, `input_ids` and `attention_mask` and for some models `token_type_ids`, each
    int64 of shape (batch, length), and `labels`, int64 of shape (batch,). A test table whose labels are withheld (no
    label column, or null or -1 throughout) serves for prediction only.

    Args:
        path: see `TableData`.
        text_column: the column that holds the text, or two columns for pairs.
        label_column: the column that holds the class, a string or an integer.
        **options: see `TextData`. Validation rows are held out of each class alike. A stream is refused, since it has
            to be read to its end before the classes are known.

    Attributes:
        class_names: the classes' names, by id; known after `setup`, as are the next two.
        num_labels: how many classes there are.
        class_counts: the number of training rows of each class, by id.

    Raises:
        PEFTError: by the constructor, a number is out of its range; by `setup`, data that can't be trained on: a
            missing file or column, an empty or malformed file, a single class, labels that training doesn't have.
    """

    def __init__(
        self,
        path: str,
        *,
        text_column: str | list[str] = "text",
        label_column: str = "label",
        **options: Any,
    ) -> None:
        self.text_columns = [text_column] if isinstance(text_column, str) else list(text_column)
        self.label_column = label_column
        super().__init__(path, **options)
        self.class_names: list[str] = []
        self.class_counts: list[int] = []
        self.num_labels = 0
        self._classes: Classes | None = None
        self._labelled: set[str] = set()

    def faults(self) -> list[str]:
        """What is wrong with the arguments."""
        faults = []
        if len(self.text_columns) not in (1, 2):
            faults.append(f"text_column: give one column or two, not {self.hparams['text_column']!r}")
        if self.hparams["streaming"]:
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

    def hold_out(self, splits: DatasetDict) -> None:
        """Validation rows of each class, and the classes of what is left."""
        classes = find_classes(splits["train"], self.label_column)
        if "validation" not in splits and self.validation_fraction > 0:
            splits["train"], splits["validation"] = stratified_split(
                splits["train"], self.label_column, self.validation_fraction, self.seed
            )
            classes = find_classes(splits["train"], self.label_column)
        self._classes = classes
        self.class_names, self.class_counts, self.num_labels = classes.names, classes.counts, len(classes.names)

    def row_faults(self, tables: Mapping[str, Dataset]) -> list[str]:
        """Labels that training doesn't have."""
        assert self._classes is not None
        classes, column = self._classes, self.label_column
        self._labelled = {s for s in tables if s != "test" or has_labels(tables[s], column, classes)}
        held = sorted(self._labelled - {"train"})
        return [fault for split in held for fault in unseen_labels(tables[split], column, classes, split)]

    def encode(self, table: Dataset, split: str) -> Dataset:
        """The tokenizer's fields and, where a split has them, labels."""
        assert self._classes is not None
        index = self._classes.index if split in self._labelled else None
        return cast(
            "Dataset",
            self.encoded(
                table,
                split,
                _encode,
                tokenizer=self.tokenizer,
                text_columns=self.text_columns,
                label_column=self.label_column,
                index=index,
                max_length=self.max_length,
            ),
        )

    def collate(self) -> Collate:
        """Pads a batch to its longest row."""
        from transformers import DataCollatorWithPadding

        return cast(Collate, DataCollatorWithPadding(self.tokenizer))

    def filler(self, row: dict[str, Any]) -> dict[str, Any]:
        """The same text without a label."""
        return {**row, "labels": IGNORED}

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test rows in order.

        Raises:
            PEFTError: there is no test table, or its labels are withheld.
        """
        if "labels" not in (self._encoded["test"].column_names if "test" in self._encoded else []):
            raise PEFTError("test_path: there are no test rows with labels; give a file that has them")
        return super().test_dataloader()


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
