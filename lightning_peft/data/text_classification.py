"""Labelled text from a file, a folder or the hub, as batches for a classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import ConcatDataset, DataLoader

from lightning_peft.data.files import load_file, load_table
from lightning_peft.data.labels import IGNORED, Classes, find_classes, has_labels, stratified_split, unseen_labels
from lightning_peft.data.tokenizing import CUT, load_tokenizer, tokenize, tokenizer_source
from lightning_peft.methods.errors import PEFTError, suggestion

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase


class TextClassificationData(L.LightningDataModule):
    """Text with one label per row, tokenized, in batches padded to their longest row.

    A batch holds the tokenizer's fields, `input_ids` and `attention_mask` and for some models `token_type_ids`, each
    int64 of shape (batch, length), and `labels`, int64 of shape (batch,). Under several devices the evaluation data is
    filled up with rows labelled -100, so that each real row counts once. A test table whose labels are withheld (no
    label column, or null or -1 throughout) serves for prediction only.

    Args:
        path: the training data: a CSV, JSON, JSONL or Parquet file; a folder with train, validation and test files; a
            dataset on the hub, `org/name` or `org/name:configuration`; or `package:NAME/file` in an installed package.
        validation_path: a file to validate on, in place of the validation split of `path`.
        test_path: a file to test on, in place of the test split of `path`.
        text_column: the column that holds the text, or two columns for pairs.
        label_column: the column that holds the class, a string or an integer.
        tokenizer: a hub id, a folder or `package:NAME/folder`; by default that of the module's `model`.
        max_length: rows are cut to this many tokens, special ones included; how many were cut is logged.
        batch_size: rows per batch and device.
        num_workers: processes per loader; 0 loads in the training process.
        validation_fraction: the part of the training rows, of each class, to validate on where there is no validation
            table; 0 trains without validation.
        seed: fixes which rows those are.

    Attributes:
        class_names: the classes' names, by id; known after `setup`, as are the next three.
        num_labels: how many classes there are.
        class_counts: the number of training rows of each class, by id.
        cut_rows: the number of rows longer than `max_length`, by split.

    Raises:
        PEFTError: by the constructor, a number is out of its range; by `setup`, data that can't be trained on: a
            missing file or column, an empty or malformed file, a single class, labels that training doesn't have.
    """

    def __init__(
        self,
        path: str,
        validation_path: str | None = None,
        test_path: str | None = None,
        text_column: str | list[str] = "text",
        label_column: str = "label",
        tokenizer: str | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
        validation_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.path, self.validation_path, self.test_path = path, validation_path, test_path
        self.text_columns = [text_column] if isinstance(text_column, str) else list(text_column)
        self.label_column = label_column
        self.tokenizer_name = tokenizer
        self.max_length, self.batch_size, self.num_workers = max_length, batch_size, num_workers
        self.validation_fraction, self.seed = validation_fraction, seed
        faults = []
        if len(self.text_columns) not in (1, 2):
            faults.append(f"text_column: give one column or two, not {text_column!r}")
        faults += [f"max_length: {max_length} is less than 1"] if max_length < 1 else []
        faults += [f"batch_size: {batch_size} is less than 1"] if batch_size < 1 else []
        faults += [f"num_workers: {num_workers} is less than 0"] if num_workers < 0 else []
        if not 0 <= validation_fraction < 1:
            faults.append(f"validation_fraction: {validation_fraction} is not between 0 and 1 (1 left out)")
        if faults:
            raise PEFTError(faults)
        self.class_names: list[str] = []
        self.class_counts: list[int] = []
        self.num_labels = 0
        self.cut_rows: dict[str, int] = {}
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._tokenized: dict[str, Dataset] = {}
        self._tokenized_with = ""

    def read_splits(self) -> DatasetDict:
        """The tables as they are, with the columns named by `text_column` and `label_column`: `train`, and those of
        `validation` and `test` that there are."""
        splits = load_table(self.path)
        if self.validation_path is not None:
            splits["validation"] = load_file(self.validation_path, "validation_path")
        if self.test_path is not None:
            splits["test"] = load_file(self.test_path, "test_path")
        return splits

    def prepare_data(self) -> None:
        """Downloads or converts the files once per machine, before every process reads them."""
        self.read_splits()

    def setup(self, stage: str | None = None) -> None:
        """Reads, checks and tokenizes all splits, once per tokenizer; `stage` makes no difference."""
        source = tokenizer_source(self.tokenizer_name, self.trainer)
        if source == self._tokenized_with:
            return
        splits = self.read_splits()
        self._check_columns(splits)
        train = splits["train"]
        classes = find_classes(train, self.label_column)
        if "validation" not in splits and self.validation_fraction > 0:
            train, splits["validation"] = stratified_split(
                train, self.label_column, self.validation_fraction, self.seed
            )
            splits["train"] = train
            classes = find_classes(train, self.label_column)
        labelled = set(splits)
        if "test" in splits and not has_labels(splits["test"], self.label_column, classes):
            labelled.remove("test")
        faults: list[str] = []
        for split in sorted(labelled - {"train"}):
            faults += unseen_labels(splits[split], self.label_column, classes, split)
        if faults:
            raise PEFTError(faults)
        self.class_names, self.class_counts = classes.names, classes.counts
        self.num_labels = len(classes.names)
        self.tokenizer = load_tokenizer(source, self.max_length)
        self._tokenized = {
            split: self._tokenize(splits[split], split, classes if split in labelled else None) for split in splits
        }
        self._tokenized_with = source

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the training rows."""
        return self._loader(self._tokenized["train"], shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Batches of the validation rows in order, or no loader where `validation_fraction` is 0."""
        return self._loader(self._filled_up("validation")) if "validation" in self._tokenized else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test rows in order.

        Raises:
            PEFTError: there is no test table, or its labels are withheld.
        """
        if "labels" not in (self._tokenized["test"].column_names if "test" in self._tokenized else []):
            raise PEFTError("test_path: there are no test rows with labels; give a file that has them")
        return self._loader(self._filled_up("test"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the test rows in order, or of the validation rows where there is no test table."""
        table = next((self._tokenized[split] for split in ("test", "validation") if split in self._tokenized), None)
        if table is None:
            raise PEFTError("test_path: there is no test table to predict on; give a file")
        return self._loader(table)

    def _check_columns(self, splits: DatasetDict) -> None:
        faults = []
        for split, table in splits.items():
            needed = [*self.text_columns, *([] if split == "test" else [self.label_column])]
            for column in needed:
                if column not in table.column_names:
                    field = "label_column" if column == self.label_column else "text_column"
                    hint = suggestion(column, table.column_names) or f"; it has {', '.join(table.column_names)}"
                    faults.append(f"{field}: the {split} data has no column {column!r}{hint}")
                elif column in self.text_columns:
                    faults += _text_faults(table, column, split)
        if faults:
            raise PEFTError(faults)

    def _tokenize(self, table: Dataset, split: str, classes: Classes | None) -> Dataset:
        tokenized = table.map(
            _encode,
            batched=True,
            remove_columns=table.column_names,
            fn_kwargs={
                "tokenizer": self.tokenizer,
                "text_columns": self.text_columns,
                "label_column": self.label_column,
                "index": classes.index if classes is not None else None,
                "max_length": self.max_length,
            },
            desc=f"Tokenizing {split}",
        )
        cut = sum(tokenized[CUT][:])
        self.cut_rows[split] = cut
        if cut:
            rank_zero_info(
                f"{split}: {cut:,} of {len(table):,} rows ({cut / len(table):.1%}) are longer than "
                f"max_length={self.max_length} tokens and were cut"
            )
        return tokenized.remove_columns(CUT)

    def _filled_up(self, split: str) -> Dataset | ConcatDataset[Any]:
        """The split's rows, and so many ignored ones that they divide evenly: a sampler would repeat real rows."""
        table = self._tokenized[split]
        devices = self.trainer.world_size if self.trainer is not None else 1
        missing = -len(table) % devices
        padding: Any = [{**table[0], "labels": IGNORED}] * missing
        return ConcatDataset([table, padding]) if missing else table

    def _loader(self, rows: Any, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            rows,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=self._collate(),
        )

    def _collate(self) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
        from transformers import DataCollatorWithPadding

        assert self.tokenizer is not None
        collate: Any = DataCollatorWithPadding(self.tokenizer)
        return cast("Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]", collate)


def _text_faults(table: Dataset, column: str, split: str) -> list[str]:
    kind = getattr(table.features[column], "dtype", "a list")
    if kind not in ("string", "large_string"):
        return [f"text_column: {column!r} of the {split} data holds {kind}, not text"]
    arrow = table.select_columns([column]).with_format("arrow")
    missing = sum(batch[column].null_count for batch in arrow.iter(batch_size=10_000))
    told = f"text_column: {missing:,} of {len(table):,} rows of the {split} data have no {column!r}"
    return [told] if missing else []


def _encode(
    batch: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    text_columns: list[str],
    label_column: str,
    index: dict[Any, int] | None,
    max_length: int,
) -> dict[str, list[Any]]:
    """A function of its own, because `datasets` finds a cached result by the code and arguments of what it maps."""
    fields = tokenize(tokenizer, [batch[column] for column in text_columns], max_length)
    return fields if index is None else {**fields, "labels": [index[value] for value in batch[label_column]]}
