"""What the data modules share: tables that are read, checked, encoded through `datasets` and batched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import ConcatDataset, DataLoader

from lightning_peft.data.files import HEAD, load_file, load_table
from lightning_peft.data.sampling import LengthGroupedSampler, Stream, StreamLoader, lengths
from lightning_peft.data.tokenizing import CUT, load_tokenizer, source_of
from lightning_peft.methods.errors import PEFTError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Collate = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


class TableData(L.LightningDataModule, ABC):
    """Rows from a file, a folder or the hub, in batches.

    Under several devices the evaluation data is filled up with rows that losses and metrics leave out, so that each
    real row counts once.

    Args:
        path: the training data: a CSV, JSON, JSONL, Parquet or Arrow file; a folder with train, validation and test
            files; a dataset on the hub, `org/name` or `org/name:configuration`; or `package:NAME/file` in an installed
            package.
        validation_path: a file to validate on, in place of the validation split of `path`.
        test_path: a file to test on, in place of the test split of `path`.
        batch_size: rows per batch and device.
        num_workers: processes per loader, and for encoding; 0 works in the training process.
        validation_fraction: the part of the training rows to validate on where there is no validation table; 0 trains
            without validation.
        seed: fixes which rows those are.

    Raises:
        PEFTError: by the constructor, a number is out of its range; by `setup`, data that can't be trained on.
    """

    streaming: bool = False
    group_by_length: bool = False

    def __init__(
        self,
        path: str,
        *,
        validation_path: str | None = None,
        test_path: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        validation_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.path, self.validation_path, self.test_path = path, validation_path, test_path
        self.batch_size, self.num_workers = batch_size, num_workers
        self.validation_fraction, self.seed = validation_fraction, seed
        self._encoded: dict[str, Any] = {}
        self._encoded_with = ""
        if faults := self.faults():
            raise PEFTError(faults)

    def faults(self) -> list[str]:
        """What is wrong with the arguments; a subclass that sets more calls `faults` again."""
        faults = [f"batch_size: {self.batch_size} is less than 1"] if self.batch_size < 1 else []
        faults += [f"num_workers: {self.num_workers} is less than 0"] if self.num_workers < 0 else []
        if not 0 <= self.validation_fraction < 1:
            faults.append(f"validation_fraction: {self.validation_fraction} is not between 0 and 1 (1 left out)")
        return faults

    # what a kind of data says of itself

    @abstractmethod
    def column_faults(self, table: Dataset, split: str) -> list[str]:
        """What is wrong with a table's columns: missing ones, with the nearest names, and types."""

    def row_faults(self, tables: Mapping[str, Dataset]) -> list[str]:
        """What is wrong with the rows of all splits; asked once the columns are right."""
        return []

    @abstractmethod
    def load_processor(self, source: str) -> None:
        """Load the tokenizer, or what else makes a model's inputs, from the place of the model."""

    @abstractmethod
    def encode(self, table: Any, split: str) -> Any:
        """The table of a model's inputs: `table.map(…)`, which works on streams too."""

    @abstractmethod
    def collate(self) -> Collate:
        """What makes a batch of encoded rows."""

    def filler(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row like `row` that losses and metrics leave out."""
        raise NotImplementedError

    # reading

    def read_splits(self) -> DatasetDict:
        """The tables as they are: `train`, and those of `validation` and `test` that there are."""
        splits = load_table(self.path, streaming=self.streaming)
        if self.validation_path is not None:
            splits["validation"] = load_file(self.validation_path, "validation_path")
        if self.test_path is not None:
            splits["test"] = load_file(self.test_path, "test_path")
        return splits

    def prepare_data(self) -> None:
        """Downloads or converts the files once per machine, before every process reads them."""
        self.read_splits()

    def setup(self, stage: str | None = None) -> None:
        """Reads, checks and encodes all splits, once per model; `stage` makes no difference."""
        source = self.processor_source()
        if source == self._encoded_with:
            return
        splits = self.read_splits()
        _raise([fault for split, table in splits.items() for fault in self.column_faults(head(table), split)])
        self.hold_out(splits)
        _raise(self.row_faults({split: head(table) for split, table in splits.items()}))
        self.load_processor(source)
        self._encoded = {split: self.encode(table, split) for split, table in splits.items()}
        self._encoded_with = source

    def processor_source(self) -> str:
        """What to load the tokenizer or processor from."""
        return source_of("tokenizer", None, self.trainer)

    def hold_out(self, splits: DatasetDict) -> None:
        """Take validation rows from the training table, where there is no table of them; not from a stream."""
        if "validation" in splits or self.validation_fraction == 0:
            return
        if self.streaming:
            rank_zero_info("data: a stream has no rows to hold out, so there is no validation; give validation_path")
            return
        rows = len(splits["train"])
        held = min(max(1, round(self.validation_fraction * rows)), rows - 1)
        if held:
            parts = splits["train"].train_test_split(test_size=held, seed=self.seed)
            splits["train"], splits["validation"] = parts["train"], parts["test"]

    # loaders

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the training rows, shuffled anew in each epoch."""
        return self.loader(self._encoded["train"], shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Batches of the validation rows in order, or no loader where there are none."""
        return self.loader(self._filled_up("validation")) if "validation" in self._encoded else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test rows in order.

        Raises:
            PEFTError: there is no test table.
        """
        if "test" not in self._encoded:
            raise PEFTError("test_path: there are no test rows; give a file that has them")
        return self.loader(self._filled_up("test"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the test rows in order, or of the validation rows where there is no test table."""
        return self.loader(self._encoded[self.predict_split()])

    def predict_split(self) -> str:
        """The split to predict on.

        Raises:
            PEFTError: there is neither a test nor a validation table.
        """
        split = next((split for split in ("test", "validation") if split in self._encoded), None)
        if split is None:
            raise PEFTError("test_path: there is no test table to predict on; give a file")
        return split

    def loader(self, rows: Any, shuffle: bool = False, collate: Collate | None = None) -> DataLoader[Any]:
        """A loader over encoded rows, which in training are shuffled, grouped by length, or streamed."""
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": collate or self.collate(),
        }
        if shuffle and self.streaming:
            return StreamLoader(rows, self.trainer, self.seed, **options)
        if shuffle and self.group_by_length:
            ranks = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
            options["sampler"] = LengthGroupedSampler(lengths(rows), self.batch_size, seed=self.seed, **ranks)
            return DataLoader(rows, **options)
        return DataLoader(rows, shuffle=shuffle, **options)

    def _filled_up(self, split: str) -> Any:
        """The split's rows, and so many ignored ones that they divide evenly: a sampler would repeat real rows."""
        table = self._encoded[split]
        devices = self.trainer.world_size if self.trainer is not None else 1
        missing = -len(table) % devices
        padding: Any = [self.filler(table[0])] * missing
        return ConcatDataset([table, padding]) if missing else table


class TextData(TableData):
    """Tables that a tokenizer encodes.

    Args:
        path: see `TableData`.
        tokenizer: a hub id, a folder or `package:NAME/folder`; by default that of the module's `model`.
        max_length: rows are cut to this many tokens, special ones included; how many were cut is logged.
        group_by_length: put training rows of similar length into one batch, so that less is padded; batches still come
            in random order.
        streaming: read the training data as it is needed, for what is too large to be converted on disk. Its first
            1,000 rows are checked before training. Each rank and worker reads its own rows. Give the Trainer
            `max_steps`: nobody knows how long a stream is, and without it the learning rate doesn't fall.
        **options: see `TableData`.

    Attributes:
        tokenizer: known after `setup`.
        cut_rows: the number of rows longer than `max_length`, by split; of a stream, among its first 1,000.
    """

    markers: ClassVar[tuple[str, ...]] = (CUT,)
    """The columns of encoded rows that are counted and then removed."""

    def __init__(
        self,
        path: str,
        *,
        tokenizer: str | None = None,
        max_length: int = 128,
        group_by_length: bool = False,
        streaming: bool = False,
        **options: Any,
    ) -> None:
        self.tokenizer_name, self.max_length = tokenizer, max_length
        self.group_by_length, self.streaming = group_by_length, streaming
        super().__init__(path, **options)
        self.cut_rows: dict[str, int] = {}
        self.tokenizer: Any = None

    def faults(self) -> list[str]:
        """What is wrong with the arguments."""
        faults = [f"max_length: {self.max_length} is less than 1"] if self.max_length < 1 else []
        if self.streaming and self.group_by_length:
            faults.append("group_by_length: the rows of a stream can't be sorted; leave it or streaming out")
        return faults + super().faults()

    def processor_source(self) -> str:
        """What to load the tokenizer from."""
        return source_of("tokenizer", self.tokenizer_name, self.trainer)

    def load_processor(self, source: str) -> None:
        """Load the tokenizer."""
        self.tokenizer = load_tokenizer(source, self.max_length)

    def encoded(self, table: Any, split: str, function: Callable[..., dict[str, list[Any]]], **arguments: Any) -> Any:
        """`table` with `function` mapped over its batches, and the rows counted that it marks as cut in column `CUT`.

        Args:
            table: a table or a stream.
            split: its name, for messages.
            function: a function at the top of a module, because `datasets` finds a cached result by the code and
                arguments of what it maps. It returns `CUT`, a bool per row, beside what the model is given.
            **arguments: given to `function` by name.
        """
        if is_stream(table):
            self.encoded(head(table), split, function, **arguments)
            return self.streamed(table, function, **arguments)
        workers = self.num_workers if len(table) > HEAD * self.num_workers else 0
        parts = {"batched": True, "remove_columns": list(table.column_names), "fn_kwargs": arguments}
        mapped = table.map(function, desc=f"Tokenizing {split}", num_proc=workers or None, **parts)
        if len(mapped) == 0:
            raise PEFTError(f"path: the {split} data has no row that anything can be learned from")
        self.count_cut(mapped, split)
        return mapped.remove_columns(list(self.markers))

    def streamed(self, table: Any, function: Callable[..., dict[str, list[Any]]], **arguments: Any) -> Stream:
        """A stream with `function` mapped over its batches as they are read; the arguments are those of `encoded`."""
        columns = list(head(table).column_names)
        mapped = Stream(table).map(function, batched=True, remove_columns=columns, fn_kwargs=arguments)
        return mapped.map(None, batched=True, remove_columns=list(self.markers))

    def count_cut(self, mapped: Dataset, split: str) -> None:
        """Count and report the rows that are marked as cut."""
        self.cut_rows[split] = self.report_cut(mapped, CUT, split, "rows", f"max_length={self.max_length}")

    def report_cut(self, mapped: Dataset, marker: str, split: str, things: str, limit: str) -> int:
        """How many rows the column `marker` marks; says how many `things` are longer than `limit` allows."""
        cut: int = sum(mapped[marker][:])
        part = self.part(split)
        if cut:
            rank_zero_info(
                f"{split}: {cut:,} of {len(mapped):,} {things}{part} ({cut / len(mapped):.1%}) are longer than "
                f"{limit} tokens and were cut"
            )
        return cut

    def part(self, split: str) -> str:
        """What a message about a split adds where only the first rows were looked at."""
        return " of its head" if self.streaming and split == "train" else ""


def is_stream(table: Any) -> bool:
    """Whether a table is read as it is needed."""
    from datasets import IterableDataset

    return isinstance(table, IterableDataset)


def head(table: Any) -> Dataset:
    """A table itself; of a stream its first rows, as a table."""
    from datasets import Dataset

    if not is_stream(table):
        return table
    try:
        return Dataset.from_list(list(table.take(HEAD)), features=table.features)
    except (ValueError, TypeError) as error:
        if isinstance(error, PEFTError):
            raise
        raise PEFTError(f"path: the first {HEAD:,} rows don't go into one table: {error}") from error


def _raise(faults: list[str]) -> None:
    if faults:
        raise PEFTError(faults)
