"""Labelled files, such as images or sounds: in a folder per class, or named in a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_peft.data.file_rows import FileData, listed, read_files
from lightning_peft.data.files import SPLITS
from lightning_peft.data.labelled import LabelledData
from lightning_peft.methods.errors import PEFTError

if TYPE_CHECKING:
    from datasets import Dataset


class FolderData(LabelledData, FileData):
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

    def needed(self, split: str) -> dict[str, list[str]]:
        """The files, and their labels where they have to have them."""
        return {**super().needed(split), "label_column": [] if split == "test" else [self.label_column]}

    def row_faults(self, tables: Mapping[str, Dataset]) -> list[str]:
        """Labels that training doesn't have, and files that can't be read."""
        return LabelledData.row_faults(self, tables) + FileData.row_faults(self, tables)

    def encode(self, table: Dataset, split: str) -> Any:
        """The table, whose files are read when its rows are."""
        index = self.index(split)
        columns = [self.file_column, *([self.label_column] if index is not None else [])]
        return table.with_transform(partial(_rows, columns=columns, index=index, read=self.reader()), columns=columns)

    def folder_tables(self, folder: Path, field: str, split: str) -> dict[str, Dataset]:
        """The files in the folders of the classes."""
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


def folders_by_split(
    folder: Path, field: str, split: str, held: Callable[[Path], list[Path]] | None = None
) -> tuple[dict[str, Path], list[str]]:
    """The folder of each split, and what is wrong; `folder` itself as that of `split` where it has no `train`.

    Args:
        folder: may have folders of splits.
        field: the name of the field that says where it is, for the error messages.
        split: what it holds where it has none.
        held: what a split's folder has inside, by default folders.
    """
    inside = subfolders(folder)
    # a class may be called "train" too; the folder of the split has the classes' folders
    if not any(SPLITS.get(entry.name.lower()) == "train" and (held or subfolders)(entry) for entry in inside):
        return {split: folder}, []
    return by_split(inside, field)


def by_split(folders: list[Path], field: str) -> tuple[dict[str, Path], list[str]]:
    """Folders by the split that their names mean, and what is wrong; `field` is for the error messages."""
    found: dict[str, Path] = {}
    faults = []
    for entry in folders:
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
    loose = [file for file in files_in(folder, "*") if file.suffix.lower() in suffixes]
    if split == "test" and not classes and loose:
        return [(file, None) for file in loose], []
    faults = []
    if not classes:
        faults.append(f"{field}: {folder} has no folder per class" + (f"; its {kind}s lie loose" if loose else ""))
    elif loose:
        faults.append(f"{field}: in {folder} {counted_in(loose, folder)} beside the folders of the classes")
    if split == "train" and len(classes) == 1:
        faults.append(f"{field}: {folder} has one class only, {classes[0].name!r}; a classifier needs two or more")
    found: list[tuple[Path, str | None]] = []
    for place in classes:
        files = files_in(place, "**/*")
        if not files and split == "train":
            faults.append(f"{field}: the class {place.name!r} has no {kind} in {place}")
        found += [(file, place.name) for file in files]
    if unknown := [file for file, _ in found if file.suffix.lower() not in suffixes]:
        faults.append(
            f"{field}: in {folder} {counted_in(unknown, folder)} with an unknown suffix; {kind}s: {' '.join(suffixes)}"
        )
    return found, faults


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, by name; those whose names start with a dot left out."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def labels_of(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """`labels`, int64 of shape (batch,), where the rows have them."""
    return {"labels": torch.tensor([row["labels"] for row in rows])} if "labels" in rows[0] else {}


def _rows(
    batch: dict[str, list[Any]], columns: list[str], index: Mapping[Any, int] | None, read: Callable[[Any], Any]
) -> dict[str, list[Any]]:
    """Rows with `file`, as it was read, and `labels`."""
    rows = {"file": read_files(batch[columns[0]], read)}
    return rows if index is None else {**rows, "labels": [index[value] for value in batch[columns[1]]]}


def files_in(folder: Path, pattern: str) -> list[Path]:
    """The files in a folder that a pattern finds, by name; those whose names start with a dot left out."""
    files = (file for file in folder.glob(pattern) if file.is_file())
    return sorted(file for file in files if not any(p.startswith(".") for p in file.relative_to(folder).parts))


def counted_in(files: list[Path], folder: Path) -> str:
    """How many files lie in a folder and what their names are, as a part of a message."""
    count = "1 file lies" if len(files) == 1 else f"{len(files):,} files lie"
    return f"{count} ({listed([file.relative_to(folder).as_posix() for file in files])})"
