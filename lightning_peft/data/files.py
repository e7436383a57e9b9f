"""Reads tables (CSV, JSON, Parquet, Arrow, text, folders of them, hub datasets), mapped from disk or as streams."""

from __future__ import annotations

import glob
import importlib.util
import io
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_peft.interchange.locations import resolve
from lightning_peft.methods.errors import PEFTError, suggestion

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features, IterableDataset


class _Format(NamedTuple):
    """What a file's suffix says: the format's name, and the builder of `datasets` that reads it."""

    name: str
    builder: str
    options: dict[str, str]


FORMATS = {
    ".csv": _Format("CSV", "csv", {}),
    ".tsv": _Format("TSV", "csv", {"sep": "\t"}),
    ".json": _Format("JSON", "json", {}),
    ".jsonl": _Format("JSONL", "json", {}),
    ".parquet": _Format("Parquet", "parquet", {}),
    ".arrow": _Format("Arrow", "arrow", {}),
    ".txt": _Format("text", "text", {"sample_by": "document"}),
}
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_FAULTS_TOLD = 5
_BLOCK = 10 << 20
"""Bytes of a JSONL file whose columns are looked at together."""

HEAD = 1000
"""Rows of a stream that are checked before training, and whose columns it has."""
PART = 64 << 20
"""Bytes of a JSONL file that are one shard of a stream: workers share a file, and shuffling reaches all of it."""


def require_datasets() -> None:
    """Raises PEFTError where `datasets`, an optional dependency, isn't installed."""
    if importlib.util.find_spec("datasets") is None:
        raise PEFTError("the data modules need the package 'datasets'; pip install 'lightning-peft[data]'")


def load_table(source: str, field: str = "path", streaming: bool = False) -> DatasetDict:
    """The splits of a table: `train`, and `validation` and `test` where the source has them.

    Args:
        source: a file, which becomes `train`: `.csv`, `.tsv`, `.json` (a list of objects), `.jsonl`, `.parquet`,
            `.arrow`, or `.txt` (one row, whose column `text` is the whole file); a folder of such files named `train…`,
            `validation…` (or `valid`, `val`, `dev`) and `test…`, several per split allowed; or a dataset on the hub,
            `org/name` or `org/name:configuration`. Only the last of these uses the network.
        field: the name of the field that holds `source`, for the error messages.
        streaming: `train` is an `IterableDataset`, read as it is needed; a JSONL file is one shard for each 64 MiB, any
            other file is one shard. Its columns are those of its first 1,000 rows. The other splits are tables, since
            evaluation needs to know how many rows there are.

    Raises:
        PEFTError: nothing is there, a file is empty or of another format, a row is malformed (with its line), a folder
            has no training file, or the hub has no such dataset. A stream raises it wherever it is iterated.
    """
    require_datasets()
    from datasets import DatasetDict

    path = Path(resolve(source, field))
    if not path.exists():
        return _from_hub(source, field, streaming)
    files = _files_by_split(path, source, field) if path.is_dir() else {"train": [path]}
    return DatasetDict(
        {
            split: _stream(files[split], field) if streaming and split == "train" else _read(files[split], field)
            for split in files
        }
    )


def load_file(source: str, field: str) -> Dataset:
    """The one table that a single file holds; the arguments and errors are those of `load_table`."""
    tables = load_table(source, field)
    if set(tables) != {"train"}:
        raise PEFTError(f"{field}: {source!r} holds the splits {', '.join(sorted(tables))}; give one file")
    return tables["train"]


def _files_by_split(folder: Path, source: str, field: str) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in FORMATS)
    for name in names:
        word = re.split(r"[-_.]", name, maxsplit=1)[0].lower()
        if word in SPLITS:
            splits.setdefault(SPLITS[word], []).append(folder / name)
    if "train" not in splits:
        found = f"it holds {', '.join(names)}" if names else f"it holds no {', '.join(FORMATS)} file"
        raise PEFTError(f"{field}: the folder {source!r} has no training file (train.csv, train.jsonl, …); {found}")
    return splits


def _format_of(files: list[Path], field: str) -> _Format:
    """The one format of files that hold something."""
    suffixes = sorted({file.suffix.lower() for file in files})
    unknown = [suffix for suffix in suffixes if suffix not in FORMATS]
    if unknown or len(suffixes) > 1:
        reason = "can't be read together" if len(suffixes) > 1 else f"has the unknown suffix {unknown[0]!r}"
        raise PEFTError(f"{field}: {_names(files)} {reason}; use one of {', '.join(FORMATS)}")
    empty = [f"{field}: {str(file)!r} is empty" for file in files if file.stat().st_size == 0]
    if empty:
        raise PEFTError(empty)
    return FORMATS[suffixes[0]]


# whole tables


def _read(files: list[Path], field: str) -> Dataset:
    """One table from files of one format."""
    kind = _format_of(files, field)
    try:
        table = _load(kind, files)
    except _reader_errors() as error:
        if faults := _malformed(files, kind, field):
            raise PEFTError(faults) from error
        if kind.name != "JSONL":
            raise PEFTError(_reader_fault(files, kind, field, error)) from error
        table = _read_every_column(files, kind, field)
    if len(table) == 0:
        raise PEFTError(f"{field}: {_names(files)} has no rows")
    return table


def _load(kind: _Format, files: list[Path], **options: Any) -> Any:
    from datasets import load_dataset

    # its names are patterns
    names = [glob.escape(str(file.absolute())) for file in files]
    return load_dataset(kind.builder, data_files={"train": names}, split="train", **kind.options, **options)


def _reader_errors() -> tuple[type[Exception], ...]:
    from datasets.exceptions import DatasetsError

    return (DatasetsError, ValueError, OSError, TypeError, KeyError)


def _read_every_column(files: list[Path], kind: _Format, field: str) -> Dataset:
    """The table of JSONL files with all keys of all rows: `datasets` looks for them in the first 10 MB alone."""
    try:
        return _load(kind, files, features=_every_column(files))
    except _reader_errors() as error:
        raise PEFTError(_reader_fault(files, kind, field, error)) from error


def _every_column(files: list[Path]) -> Features:
    import pyarrow
    import pyarrow.json
    from datasets import Features

    schema = pyarrow.schema([])
    for file in files:
        with file.open("rb") as lines:
            while block := lines.read(_BLOCK) + lines.readline():
                options = pyarrow.json.ReadOptions(block_size=len(block))
                found = pyarrow.json.read_json(io.BytesIO(block), options).schema
                schema = pyarrow.unify_schemas([schema, found], promote_options="permissive")
    return Features.from_arrow_schema(schema)


# streams


def _stream(files: list[Path], field: str) -> IterableDataset:
    """A stream of the rows of files of one format."""
    from datasets import Dataset, IterableDataset

    kind = _format_of(files, field)
    if kind.builder == "json":
        parts = [(str(file), start) for file in files for start in _starts(file)]
        first = list(islice(_json_rows(parts, field, None), HEAD))
        columns = tuple(dict.fromkeys(column for row in first for column in row))
        stream = IterableDataset.from_generator(
            _json_rows, gen_kwargs={"parts": parts, "field": field, "columns": columns}
        )
    else:
        names = [str(file) for file in files]
        first = list(islice(_file_rows(names, kind, field, None), HEAD))
        features = _load(kind, files[:1], streaming=True).features or _text_for_null(Dataset.from_list(first).features)
        stream = IterableDataset.from_generator(
            _file_rows, features, gen_kwargs={"files": names, "kind": kind, "field": field, "features": features}
        )
    if not first:
        raise PEFTError(f"{field}: {_names(files)} has no rows")
    return stream


def _starts(file: Path) -> list[int]:
    """Where the shards of a JSON file begin: one where it is a single list, else one for each `PART` bytes of lines."""
    with file.open("rb") as lines:
        single = lines.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return [-1] if single else list(range(0, file.stat().st_size, PART))


def _json_rows(parts: list[tuple[str, int]], field: str, columns: tuple[str, ...] | None) -> Iterator[dict[str, Any]]:
    """The rows of parts of JSON files, each with all of `columns` and no other; as they are where these are None.

    Args:
        parts: a file, and the byte where its part begins; -1 for a file that is one list.
        field: the name of the field that names the files, for the error messages.
        columns: the columns that every row gets.
    """
    for file, start in parts:
        for row in _listed(file, field) if start < 0 else _lines(file, start, field):
            yield row if columns is None else {column: row.get(column) for column in columns}


def _lines(file: str, start: int, field: str) -> Iterator[dict[str, Any]]:
    with open(file, "rb") as lines:
        position = start
        if start:
            # a line belongs to the part that it begins in
            lines.seek(start - 1)
            position += len(lines.readline()) - 1
        while position < start + PART and (line := lines.readline()):
            try:
                row = _row(line)
            except ValueError as error:
                raise PEFTError(f"{field}: {file}, line {_line_number(file, position)}: {error}") from None
            position += len(line)
            if row is not None:
                yield row


def _listed(file: str, field: str) -> Iterator[dict[str, Any]]:
    try:
        rows = json.loads(Path(file).read_bytes())
    except ValueError as error:
        raise PEFTError(f"{field}: {file}: {error}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise PEFTError(f"{field}: {file}, row {number}: a row is an object, not {type(row).__name__}")
        yield row


def _line_number(file: str, position: int) -> int:
    number = 1
    with open(file, "rb") as lines:
        while position > 0 and (block := lines.read(min(position, 1 << 20))):
            number += block.count(b"\n")
            position -= len(block)
    return number


def _file_rows(files: list[str], kind: _Format, field: str, features: Features | None) -> Iterator[dict[str, Any]]:
    for file in files:
        try:
            yield from _load(kind, [Path(file)], streaming=True, features=features)
        except _reader_errors() as error:
            raise PEFTError(_reader_fault([Path(file)], kind, field, error)) from error


def _text_for_null(features: Features) -> Features:
    """The columns of a stream's head; one without values there is text, which fits any value of a CSV file."""
    from datasets import Features, Value

    null = Value("null")
    return Features({name: Value("string") if kind == null else kind for name, kind in features.items()})


# what is wrong with a file


def _malformed(files: list[Path], kind: _Format, field: str) -> list[str]:
    """The first faulty rows of JSON files, with their lines; read only once the fast reader has failed."""
    faults: list[str] = []
    for file in files:
        if kind.name == "JSON":
            try:
                json.loads(file.read_bytes())
            except ValueError as error:
                faults.append(f"{field}: {file}: {error}")
        elif kind.name == "JSONL":
            faults += _malformed_lines(file, field)
    return faults


def _malformed_lines(file: Path, field: str) -> list[str]:
    faults: list[str] = []
    types: dict[str, tuple[str, int]] = {}
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if len(faults) == _FAULTS_TOLD:
                break
            try:
                row = _row(line) or {}
            except ValueError as error:
                faults.append(f"{field}: {file}, line {number}: {error}")
                continue
            for column, value in row.items():
                if value is None:
                    continue
                kind = type(value).__name__
                first, where = types.setdefault(column, (kind, number))
                if kind != first and {kind, first} != {"int", "float"}:
                    faults.append(f"{field}: {file}, line {number}: {column!r} is {kind}, but {first} in line {where}")
    return faults


def _row(line: bytes) -> dict[str, Any] | None:
    """The object on a line of a JSONL file; None for a blank line.

    Raises:
        ValueError: it holds something else; the message says what.
    """
    if not line.strip():
        return None
    try:
        row = json.loads(line.strip())
    except json.JSONDecodeError as error:
        # its own line number counts from this row
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start + 1}") from None
    if not isinstance(row, dict):
        raise ValueError(f"a row is an object, not {type(row).__name__}")
    return row


def _reader_fault(files: list[Path], kind: _Format, field: str, error: BaseException) -> str:
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    message = " ".join(str(cause).split())
    if "corresponds to no data" in message:  # what datasets says of a file with a header alone
        return f"{field}: {_names(files)} has no rows"
    return f"{field}: {_names(files)} can't be read as {kind.name}: {message}"


def _names(files: list[Path]) -> str:
    return ", ".join(repr(str(file)) for file in files)


def _from_hub(source: str, field: str, streaming: bool) -> DatasetDict:
    from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
    from datasets.exceptions import DatasetsError

    path = Path(source)
    beside = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    near = suggestion(path.name, beside)
    if "/" not in source and path.suffix[1:].isalpha():
        # a hub name without an organisation has no suffix; asking the hub would take a minute where it can't be reached
        raise PEFTError(f"{field}: there is no file or folder {source!r}{near}")
    name, _, configuration = source.partition(":")
    try:
        found = load_dataset(name, configuration or None, streaming=streaming)
    except (DatasetsError, ValueError, OSError) as error:
        message = str(error).strip().splitlines()[0]
        raise PEFTError(
            f"{field}: {source!r} is no file or folder here, and can't be had from the hub either: {message}{near}"
        ) from error
    if isinstance(found, (Dataset, IterableDataset)):
        found = {"train": found}
    tables = DatasetDict({SPLITS[split]: table for split, table in found.items() if split in SPLITS})
    if "train" not in tables:
        raise PEFTError(f"{field}: {source!r} has no training split; it has {', '.join(found)}")
    for split in set(tables) - {"train"} if streaming else ():
        tables[split] = Dataset.from_list(list(tables[split]), features=tables[split].features)
    return tables
