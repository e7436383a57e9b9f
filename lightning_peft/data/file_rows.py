"""Tables whose rows are files, such as images or sounds: found, looked at, and read when a row is needed."""

from __future__ import annotations

import importlib.util
import io
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from lightning_peft.data.files import FORMATS, SPLITS, load_table, require_datasets
from lightning_peft.data.module import TableData
from lightning_peft.data.tokenizing import missing_columns, source_of
from lightning_peft.interchange.locations import resolve
from lightning_peft.methods.errors import PEFTError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SHOWN = 5
"""Files that a message names."""


class FileData(TableData):
    """Rows of which each is a file, named or held by a table.

    Args:
        path: see the kind of data.
        file_column: the column of a table that holds the files or their paths, which are relative to where it lies.
        processor: what makes the model's inputs: a hub id, a folder or `package:NAME/folder`; by default that of the
            module's `model`.
        **options: see `TableData`; `validation_path` and `test_path` may be folders too.
    """

    kind: ClassVar[str]
    """What a file is: `image` or `sound`."""
    column_field: ClassVar[str]
    """The argument that names the files' column."""
    auto_class: ClassVar[str]
    """The class of transformers that loads the processor."""
    suffixes: ClassVar[tuple[str, ...]]
    """Those of the files that can be read, in lower case."""

    def __init__(
        self,
        path: str,
        *,
        file_column: str,
        processor: str | None = None,
        **options: Any,
    ) -> None:
        self.file_column, self.processor_name = file_column, processor
        super().__init__(path, **options)
        self.long_rows: dict[str, list[int]] = {}
        self.processor: Any = None

    @property
    def cut_rows(self) -> dict[str, int]:
        """The number of files longer than what is read of them, by split; known after `setup`."""
        return {split: len(rows) for split, rows in self.long_rows.items()}

    @abstractmethod
    def folder_tables(self, folder: Path, field: str, split: str) -> dict[str, Dataset]:
        """The splits of a folder without tables named `train…`, of which a single one is called `split`.

        Raises:
            PEFTError: it holds something else; `field` is the name of the field that says where it is.
        """

    @abstractmethod
    def examine(self, file: str | io.BytesIO) -> bool:
        """Whether a file is longer than what is read of it; raises any error where it can't be read."""

    @abstractmethod
    def reader(self) -> Callable[[str | io.BytesIO], Any]:
        """What reads a file for the processor; it is sent to the loaders' processes."""

    def load_processor(self, source: str) -> None:
        """Load the processor."""
        self.processor = load_processor(self.auto_class, source)

    def processor_source(self) -> str:
        """What to load the processor from."""
        return source_of("processor", self.processor_name, self.trainer)

    def read_splits(self) -> DatasetDict:
        """The tables, or those of the files in the folders."""
        require_datasets()
        splits = self._tables(self.path, "path")
        for split, source in (("validation", self.validation_path), ("test", self.test_path)):
            if source is None:
                continue
            found = self._tables(source, f"{split}_path", split)
            if set(found) != {split}:
                raise PEFTError(
                    f"{split}_path: {source!r} holds the splits {', '.join(sorted(found))}; give one of them"
                )
            splits |= found
        from datasets import DatasetDict

        return DatasetDict({split: _undecoded(table, self.file_column) for split, table in splits.items()})

    def needed(self, split: str) -> dict[str, list[str]]:
        """The columns that a table has to have, by the field that names them."""
        return {self.column_field: [self.file_column]}

    def column_faults(self, table: Dataset, split: str) -> list[str]:
        """Columns that are missing, and files that are none."""
        column = self.file_column
        faults = missing_columns(table, split, self.needed(split))
        if column in table.column_names and not _holds_files(table.features[column]):
            faults.append(f"{self.column_field}: {column!r} of the {split} data holds neither paths nor files")
        return faults

    def row_faults(self, tables: Mapping[str, Dataset]) -> list[str]:
        """Files that can't be read."""
        return [fault for split, table in tables.items() for fault in self._file_faults(table, split)]

    def _tables(self, source: str, field: str, split: str = "train") -> dict[str, Dataset]:
        """The splits of a source, of which a single one is called `split`."""
        place = Path(resolve(source, field))
        if place.is_dir() and not any(_is_training_table(entry) for entry in place.iterdir()):
            return self.folder_tables(place, field, split)
        tables = dict(load_table(source, field))
        if place.exists():
            folder = str((place if place.is_dir() else place.parent).absolute())
            tables = {name: absolute(table, self.file_column, folder) for name, table in tables.items()}
        return {split: tables["train"]} if set(tables) == {"train"} else tables

    def _file_faults(self, table: Dataset, split: str) -> list[str]:
        told: list[str] = []
        long: list[int] = []
        row = 0
        with ThreadPoolExecutor() as threads:
            # in parts, since a table may hold the files themselves
            for batch in table.select_columns([self.file_column]).iter(batch_size=256):
                files = batch[self.file_column]
                for file, found in zip(files, threads.map(partial(_examined, self.examine), files), strict=True):
                    row += 1
                    if isinstance(found, str):
                        told.append(f"{_named(file) or f'row {row}'} ({found})")
                    elif found:
                        long.append(row - 1)
        self.long_rows[split] = long
        return [f"{split}: {len(told):,} of {row:,} {self.kind}s can't be read: {listed(told)}"] if told else []


def listed(words: Sequence[object]) -> str:
    """The first `SHOWN` of them with commas between, and a sign that there are more."""
    return ", ".join(map(str, words[:SHOWN])) + (", …" if len(words) > SHOWN else "")


def load_processor(auto_class: str, source: str) -> Any:
    """What makes a model's inputs, loaded from `source` by the class `auto_class` of transformers.

    Raises:
        PEFTError: there is none.
    """
    import transformers

    try:
        return getattr(transformers, auto_class).from_pretrained(resolve(source, "processor"))
    except (OSError, ValueError) as error:
        if isinstance(error, PEFTError):
            raise
        message = str(error).strip().splitlines()[0]
        raise PEFTError(f"processor: {auto_class} can't load {source!r}: {message}") from error


def require(package: str, extra: str) -> None:
    """Raises PEFTError where `package`, which the extra `extra` of this package brings, isn't installed."""
    if importlib.util.find_spec(package) is None:
        raise PEFTError(f"{extra} data needs the package {package!r}; pip install 'lightning-peft[{extra}]'")


def read_files(files: list[Any], read: Callable[[Any], Any]) -> list[Any]:
    """What `read` makes of each file of a table's column.

    Raises:
        PEFTError: one can't be read.
    """
    found = []
    for file in files:
        try:
            found.append(read(_opened(file)))
        except Exception as error:  # the libraries that decode files raise errors of many kinds
            raise PEFTError(f"{_named(file) or 'a file of the table'} can't be read: {reason_of(error)}") from error
    return found


def _opened(file: str | Mapping[str, Any]) -> str | io.BytesIO:
    """What a reader takes: the path of a file, or the bytes that a table has of it."""
    if isinstance(file, str):
        return file
    return io.BytesIO(file["bytes"]) if file["bytes"] is not None else cast(str, file["path"])


def _named(file: str | Mapping[str, Any] | None) -> str | None:
    """The path of a file; None where a table has nothing but its bytes."""
    return file if file is None or isinstance(file, str) else file["path"]


def _examined(examine: Callable[[Any], bool], file: str | Mapping[str, Any] | None) -> bool | str:
    """What `examine` says, or why a file can't be read."""
    if not file or not (isinstance(file, str) or any(file.values())):
        return "it is null"
    source = _opened(file)
    try:
        size = Path(source).stat().st_size if isinstance(source, str) else source.getbuffer().nbytes
        return examine(source) if size else "it is empty"
    except Exception as error:  # as above
        return reason_of(error)


def reason_of(error: Exception) -> str:
    """Why a file can't be read, on one line."""
    return "there is no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())


def _is_training_table(entry: Path) -> bool:
    word = re.split(r"[-_.]", entry.name, maxsplit=1)[0].lower()
    return entry.is_file() and entry.suffix.lower() in FORMATS and SPLITS.get(word) == "train"


def _undecoded(table: Dataset, column: str) -> Dataset:
    """`table` with a column that `datasets` would decode left as paths and bytes."""
    feature = table.features.get(column)
    return table.cast_column(column, type(feature)(decode=False)) if getattr(feature, "decode", False) else table


def absolute(table: Dataset, column: str, folder: str) -> Dataset:
    """`table` with the paths in a column, where it has any, seen from `folder`."""
    if getattr(table.features.get(column), "dtype", None) not in ("string", "large_string"):
        return table
    return table.map(_joined, batched=True, fn_kwargs={"column": column, "folder": folder})


def _joined(batch: dict[str, list[Any]], column: str, folder: str) -> dict[str, list[Any]]:
    return {column: [value and str(Path(folder, value)) for value in batch[column]]}


def _holds_files(feature: Any) -> bool:
    # a decoded feature is an object of its own, and one that was written without its name a plain struct
    held = feature if isinstance(feature, dict) else {"bytes", "path"} if hasattr(feature, "decode") else {}
    return getattr(feature, "dtype", None) in ("string", "large_string") or {"bytes", "path"} <= set(held)
