"""Labelled files, such as images or sounds: in a folder per class, or named in a table."""

from __future__ import annotations

import importlib.util
import io
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from lightning_peft.data.files import FORMATS, SPLITS, load_table, require_datasets
from lightning_peft.data.labelled import LabelledData
from lightning_peft.data.tokenizing import missing_columns, source_of
from lightning_peft.interchange.locations import resolve
from lightning_peft.methods.errors import PEFTError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_SHOWN = 5


class FolderData(LabelledData):
    """Files with one label each.

    A folder has one folder per class, with files at any depth, or folders `train`, `validation` (or `valid`, `val`,
    `dev`) and `test` of these; a folder `test` may also hold files without classes, which serve for prediction only.
    Files whose names start with a dot are left out. A table names the files, relative to where it lies itself, or holds
    them.

    Args:
        path: a folder; or a table, as in `TableData`.
        label_column: the column of a table that holds the class, a string or an integer.
        processor: what makes the model's inputs: a hub id, a folder or `package:NAME/folder`; by default that of the
            module's `model`.
        **options: see `LabelledData`; `validation_path` and `test_path` may be folders of classes too.
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
        self.cut_rows: dict[str, int] = {}
        self.processor: Any = None

    @abstractmethod
    def examine(self, file: str | io.BytesIO) -> bool:
        """Whether a file is longer than what is read of it; raises any error where it can't be read."""

    @abstractmethod
    def reader(self) -> Callable[[str | io.BytesIO], Any]:
        """What reads a file for the processor; it is sent to the loaders' processes."""

    def load_processor(self, source: str) -> None:
        """Load the processor.

        Raises:
            PEFTError: there is none.
        """
        import transformers

        try:
            self.processor = getattr(transformers, self.auto_class).from_pretrained(resolve(source, "processor"))
        except (OSError, ValueError) as error:
            if isinstance(error, PEFTError):
                raise
            message = str(error).strip().splitlines()[0]
            raise PEFTError(f"processor: {self.auto_class} can't load {source!r}: {message}") from error

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

    def column_faults(self, table: Dataset, split: str) -> list[str]:
        """Columns that are missing, and files that are none."""
        column, labels = self.file_column, [] if split == "test" else [self.label_column]
        faults = missing_columns(table, split, {self.column_field: [column], "label_column": labels})
        if column in table.column_names and not _holds_files(table.features[column]):
            faults.append(f"{self.column_field}: {column!r} of the {split} data holds neither paths nor files")
        return faults

    def row_faults(self, tables: Mapping[str, Dataset]) -> list[str]:
        """Labels that training doesn't have, and files that can't be read."""
        unreadable = [fault for split, table in tables.items() for fault in self._file_faults(table, split)]
        return super().row_faults(tables) + unreadable

    def encode(self, table: Dataset, split: str) -> Any:
        """The table, whose files are read when its rows are."""
        index = self.index(split)
        columns = [self.file_column, *([self.label_column] if index is not None else [])]
        return table.with_transform(partial(_rows, columns=columns, index=index, read=self.reader()), columns=columns)

    def _tables(self, source: str, field: str, split: str = "train") -> dict[str, Dataset]:
        """The splits of a source, of which a single one is called `split`."""
        place = Path(resolve(source, field))
        if place.is_dir() and not any(_is_training_table(entry) for entry in place.iterdir()):
            return self._folder_tables(place, field, split)
        tables = dict(load_table(source, field))
        if place.exists():
            folder = str((place if place.is_dir() else place.parent).absolute())
            tables = {name: _absolute(table, self.file_column, folder) for name, table in tables.items()}
        return {split: tables["train"]} if set(tables) == {"train"} else tables

    def _folder_tables(self, folder: Path, field: str, split: str) -> dict[str, Dataset]:
        from datasets import Dataset

        found, faults = folders_by_split(folder, field, split)
        tables = {}
        for name, place in found.items():
            files, told = labelled_files(place, field, name, self.kind, self.suffixes)
            faults += told
            labels = {self.label_column: [label for _, label in files]} if any(label for _, label in files) else {}
            tables[name] = Dataset.from_dict({self.file_column: [str(file) for file, _ in files], **labels})
        if faults:
            raise PEFTError(faults)
        return tables

    def _file_faults(self, table: Dataset, split: str) -> list[str]:
        told: list[str] = []
        row = cut = 0
        with ThreadPoolExecutor() as threads:
            # in parts, since a table may hold the files themselves
            for batch in table.select_columns([self.file_column]).iter(batch_size=256):
                files = batch[self.file_column]
                for file, found in zip(files, threads.map(partial(_examined, self.examine), files), strict=True):
                    row += 1
                    if isinstance(found, str):
                        told.append(f"{_named(file) or f'row {row}'} ({found})")
                    else:
                        cut += found
        self.cut_rows[split] = cut
        shown = ", ".join(told[:_SHOWN]) + (", …" if len(told) > _SHOWN else "")
        return [f"{split}: {len(told):,} of {row:,} {self.kind}s can't be read: {shown}"] if told else []


def require(package: str, extra: str) -> None:
    """Raises PEFTError where `package`, which the extra `extra` of this package brings, isn't installed."""
    if importlib.util.find_spec(package) is None:
        raise PEFTError(f"{extra} data needs the package {package!r}; pip install 'lightning-peft[{extra}]'")


def folders_by_split(folder: Path, field: str, split: str) -> tuple[dict[str, Path], list[str]]:
    """The folder of each split, and what is wrong; `folder` itself as that of `split` where it has no `train`."""
    inside = subfolders(folder)
    # a class may be called "train" too; the folder of the split has the classes' folders
    if not any(SPLITS.get(entry.name.lower()) == "train" and subfolders(entry) for entry in inside):
        return {split: folder}, []
    found: dict[str, Path] = {}
    faults = []
    for entry in inside:
        name = SPLITS.get(entry.name.lower())
        if name is None or name in found:
            reason = "is no split" if name is None else f"is the split {found[name].name!r} again"
            faults.append(f"{field}: {entry} {reason}; beside `train` there may be `validation` and `test`")
        else:
            found[name] = entry
    return found, faults


def labelled_files(
    folder: Path, field: str, split: str, kind: str, suffixes: tuple[str, ...]
) -> tuple[list[tuple[Path, str | None]], list[str]]:
    """The files of a split's folder with their classes, in order, and what is wrong with it.

    Args:
        folder: has a folder for each class; in the split `test` it may have the files themselves, of no class.
        field: the name of the field that says where it is, and `kind`, what a file is: for the error messages.
        split: training needs two classes or more, none of them empty.
        suffixes: those of the files that can be read.
    """
    classes = subfolders(folder)
    loose = [file for file in _files(folder, "*") if file.suffix.lower() in suffixes]
    if split == "test" and not classes and loose:
        return [(file, None) for file in loose], []
    faults = []
    if not classes:
        faults.append(f"{field}: {folder} has no folder per class" + (f"; its {kind}s lie loose" if loose else ""))
    elif loose:
        faults.append(f"{field}: in {folder} {_counted(loose, folder)} beside the folders of the classes")
    if split == "train" and len(classes) == 1:
        faults.append(f"{field}: {folder} has one class only, {classes[0].name!r}; a classifier needs two or more")
    found: list[tuple[Path, str | None]] = []
    for place in classes:
        files = _files(place, "**/*")
        if not files and split == "train":
            faults.append(f"{field}: the class {place.name!r} has no {kind} in {place}")
        found += [(file, place.name) for file in files]
    if unknown := [file for file, _ in found if file.suffix.lower() not in suffixes]:
        faults.append(
            f"{field}: in {folder} {_counted(unknown, folder)} with an unknown suffix; {kind}s: {' '.join(suffixes)}"
        )
    return found, faults


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, by name; those whose names start with a dot left out."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _opened(file: str | Mapping[str, Any]) -> str | io.BytesIO:
    """What a reader takes: the path of a file, or the bytes that a table has of it."""
    if isinstance(file, str):
        return file
    return io.BytesIO(file["bytes"]) if file["bytes"] is not None else cast(str, file["path"])


def _named(file: str | Mapping[str, Any] | None) -> str | None:
    """The path of a file; None where a table has nothing but its bytes."""
    return file if file is None or isinstance(file, str) else file["path"]


def labels_of(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """`labels`, int64 of shape (batch,), where the rows have them."""
    return {"labels": torch.tensor([row["labels"] for row in rows])} if "labels" in rows[0] else {}


def _rows(
    batch: dict[str, list[Any]], columns: list[str], index: Mapping[Any, int] | None, read: Callable[[Any], Any]
) -> dict[str, list[Any]]:
    """Rows with `file`, as it was read, and `labels`."""
    rows: dict[str, list[Any]] = {"file": []}
    for file in batch[columns[0]]:
        try:
            rows["file"].append(read(_opened(file)))
        except Exception as error:  # the libraries that decode files raise errors of many kinds
            raise PEFTError(f"{_named(file) or 'a file of the table'} can't be read: {_reason(error)}") from error
    return rows if index is None else {**rows, "labels": [index[value] for value in batch[columns[1]]]}


def _examined(examine: Callable[[Any], bool], file: str | Mapping[str, Any] | None) -> bool | str:
    """What `examine` says, or why a file can't be read."""
    if not file or not (isinstance(file, str) or any(file.values())):
        return "it is null"
    source = _opened(file)
    try:
        size = Path(source).stat().st_size if isinstance(source, str) else source.getbuffer().nbytes
        return examine(source) if size else "it is empty"
    except Exception as error:  # as above
        return _reason(error)


def _reason(error: Exception) -> str:
    return "there is no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())


def _files(folder: Path, pattern: str) -> list[Path]:
    files = (file for file in folder.glob(pattern) if file.is_file())
    return sorted(file for file in files if not any(p.startswith(".") for p in file.relative_to(folder).parts))


def _counted(files: list[Path], folder: Path) -> str:
    shown = ", ".join(file.relative_to(folder).as_posix() for file in files[:_SHOWN])
    count = "1 file lies" if len(files) == 1 else f"{len(files):,} files lie"
    return f"{count} ({shown}{', …' if len(files) > _SHOWN else ''})"


def _is_training_table(entry: Path) -> bool:
    word = re.split(r"[-_.]", entry.name, maxsplit=1)[0].lower()
    return entry.is_file() and entry.suffix.lower() in FORMATS and SPLITS.get(word) == "train"


def _undecoded(table: Dataset, column: str) -> Dataset:
    """`table` with a column that `datasets` would decode left as paths and bytes."""
    feature = table.features.get(column)
    return table.cast_column(column, type(feature)(decode=False)) if getattr(feature, "decode", False) else table


def _absolute(table: Dataset, column: str, folder: str) -> Dataset:
    if getattr(table.features.get(column), "dtype", None) not in ("string", "large_string"):
        return table
    return table.map(_joined, batched=True, fn_kwargs={"column": column, "folder": folder})


def _joined(batch: dict[str, list[Any]], column: str, folder: str) -> dict[str, list[Any]]:
    return {column: [value and str(Path(folder, value)) for value in batch[column]]}


def _holds_files(feature: Any) -> bool:
    # a decoded feature is an object of its own, and one that was written without its name a plain struct
    held = feature if isinstance(feature, dict) else {"bytes", "path"} if hasattr(feature, "decode") else {}
    return getattr(feature, "dtype", None) in ("string", "large_string") or {"bytes", "path"} <= set(held)
