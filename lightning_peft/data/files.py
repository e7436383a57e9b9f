"""Reads tables (CSV, JSON, JSONL, Parquet, folders of them, hub datasets) with `datasets`, mapped from disk."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_peft.interchange.locations import resolve
from lightning_peft.methods.errors import PEFTError, suggestion

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_FORMATS = {".csv": "CSV", ".json": "JSON", ".jsonl": "JSONL", ".parquet": "Parquet"}
_SPLITS = {"train": "train", **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"), "test": "test"}
_FAULTS_TOLD = 5


def require_datasets() -> None:
    """Raises PEFTError where `datasets`, an optional dependency, isn't installed."""
    if importlib.util.find_spec("datasets") is None:
        raise PEFTError("the data modules need the package 'datasets'; pip install 'lightning-peft[data]'")


def load_table(source: str, field: str = "path", streaming: bool = False) -> DatasetDict:
    """The splits of a table: `train`, and `validation` and `test` where the source has them.

    Args:
        source: a file (`.csv`, `.json`, `.jsonl`, `.parquet`), which becomes `train`; a folder of such files named
            `train…`, `validation…` (or `valid`, `val`, `dev`) and `test…`, several per split allowed; or a dataset on
            the hub, `org/name` or `org/name:configuration`. Only the last of these uses the network.
        field: the name of the field that holds `source`, for the error messages.

    Raises:
        PEFTError: nothing is there, a file is empty or of another format, a row is malformed (with its line), a folder
            has no training file, or the hub has no such dataset.
    """
    require_datasets()
    from datasets import DatasetDict

    path = Path(resolve(source, field))
    if path.is_dir():
        files = _files_by_split(path, source, field)
        return DatasetDict({split: _read(files[split], field) for split in files})
    if path.exists():
        return DatasetDict({"train": _read([path], field)})
    return _from_hub(source, field)


def load_file(source: str, field: str) -> Dataset:
    """The one table that a single file holds; the arguments and errors are those of `load_table`."""
    tables = load_table(source, field)
    if set(tables) != {"train"}:
        raise PEFTError(f"{field}: {source!r} holds the splits {', '.join(sorted(tables))}; give one file")
    return tables["train"]


def _files_by_split(folder: Path, source: str, field: str) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in _FORMATS)
    for name in names:
        word = re.split(r"[-_.]", name, maxsplit=1)[0].lower()
        if word in _SPLITS:
            splits.setdefault(_SPLITS[word], []).append(folder / name)
    if "train" not in splits:
        found = f"it holds {', '.join(names)}" if names else f"it holds no {', '.join(_FORMATS)} file"
        raise PEFTError(f"{field}: the folder {source!r} has no training file (train.csv, train.jsonl, …); {found}")
    return splits


def _read(files: list[Path], field: str) -> Dataset:
    """One table from files of one format."""
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    suffixes = sorted({file.suffix.lower() for file in files})
    unknown = [suffix for suffix in suffixes if suffix not in _FORMATS]
    if unknown or len(suffixes) > 1:
        names = ", ".join(repr(str(file)) for file in files)
        reason = "can't be read together" if len(suffixes) > 1 else f"has the unknown suffix {unknown[0]!r}"
        raise PEFTError(f"{field}: {names} {reason}; use one of {', '.join(_FORMATS)}")
    empty = [f"{field}: {str(file)!r} is empty" for file in files if file.stat().st_size == 0]
    if empty:
        raise PEFTError(empty)
    kind = _FORMATS[suffixes[0]]
    read = {"CSV": Dataset.from_csv, "Parquet": Dataset.from_parquet}.get(kind, Dataset.from_json)
    try:
        table = read([str(file) for file in files])
    except (DatasetsError, ValueError, OSError, TypeError) as error:
        raise PEFTError(_malformed(files, kind, field) or _reader_fault(files, kind, field, error)) from error
    if len(table) == 0:
        raise PEFTError(f"{field}: {', '.join(repr(str(file)) for file in files)} has no rows")
    return table


def _malformed(files: list[Path], kind: str, field: str) -> list[str]:
    """The first faulty rows of JSON files, with their lines; read only once the fast reader has failed."""
    faults: list[str] = []
    for file in files:
        if kind == "JSON":
            try:
                json.loads(file.read_bytes())
            except ValueError as error:
                faults.append(f"{field}: {file}: {error}")
        elif kind == "JSONL":
            faults += _malformed_lines(file, field)
    return faults


def _malformed_lines(file: Path, field: str) -> list[str]:
    faults: list[str] = []
    types: dict[str, tuple[type, int]] = {}
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if len(faults) == _FAULTS_TOLD:
                break
            try:
                row = json.loads(line.strip() or b"{}")
            except json.JSONDecodeError as error:
                # its own line number counts from this row
                faults.append(f"{field}: {file}, line {number}: not JSON: {error.msg} at character {error.pos + 1}")
                continue
            except UnicodeDecodeError as error:
                faults.append(f"{field}: {file}, line {number}: not UTF-8: {error.reason} at byte {error.start + 1}")
                continue
            if not isinstance(row, dict):
                faults.append(f"{field}: {file}, line {number}: a row is an object, not {type(row).__name__}")
                continue
            for column, value in row.items():
                first, where = types.setdefault(column, (type(value), number)) if value is not None else (None, 0)
                if first is not None and not isinstance(value, first):
                    faults.append(
                        f"{field}: {file}, line {number}: {column!r} is {type(value).__name__}, "
                        f"but {first.__name__} in line {where}"
                    )
    return faults


def _reader_fault(files: list[Path], kind: str, field: str, error: BaseException) -> str:
    names = ", ".join(repr(str(file)) for file in files)
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    message = " ".join(str(cause).split())
    if "corresponds to no data" in message:  # what datasets says of a file with a header alone
        return f"{field}: {names} has no rows"
    return f"{field}: {names} can't be read as {kind}: {message}"


def _from_hub(source: str, field: str) -> DatasetDict:
    from datasets import Dataset, DatasetDict, load_dataset
    from datasets.exceptions import DatasetsError

    path = Path(source)
    beside = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    near = suggestion(path.name, beside)
    if "/" not in source and path.suffix[1:].isalpha():
        # a hub name without an organisation has no suffix; asking the hub would take a minute where it can't be reached
        raise PEFTError(f"{field}: there is no file or folder {source!r}{near}")
    name, _, configuration = source.partition(":")
    try:
        found = load_dataset(name, configuration or None)
    except (DatasetsError, ValueError, OSError) as error:
        message = str(error).strip().splitlines()[0]
        raise PEFTError(
            f"{field}: {source!r} is no file or folder here, and can't be had from the hub either: {message}{near}"
        ) from error
    if isinstance(found, Dataset):
        found = DatasetDict({"train": found})
    tables = DatasetDict({_SPLITS[split]: table for split, table in found.items() if split in _SPLITS})
    if "train" not in tables:
        raise PEFTError(f"{field}: {source!r} has no training split; it has {', '.join(found)}")
    return tables
