from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from lightning_peft.data import files
from lightning_peft.data.files import load_file, load_table
from lightning_peft.methods.errors import PEFTError

ROWS = [{"text": f"row {number}, with a comma", "label": number % 2} for number in range(5)]
Write = Callable[..., str]


def fault(source: str, streaming: bool = False) -> str:
    with pytest.raises(PEFTError) as caught:
        load_table(source, streaming=streaming)
    return str(caught.value)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of JSONL files in shards of 100 bytes."""
    monkeypatch.setattr(files, "PART", 100)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet", "a.arrow", "[a]*.jsonl"])
def test_every_format_gives_the_same_rows_without_the_network(
    name: str, streaming: bool, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    path = tmp_path / name
    if path.suffix == ".tsv":
        path.write_text("text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in ROWS))
    elif path.suffix == ".arrow":
        write_arrow(path)
    else:
        write(name, ROWS)
    tables = load_table(str(path), streaming=streaming)
    assert list(tables) == ["train"]
    assert list(tables["train"]) == ROWS


def write_arrow(path: Path) -> None:
    import pyarrow

    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_file_is_one_document(streaming: bool, tmp_path: Path) -> None:
    (tmp_path / "train-1.txt").write_text("one\ntwo\n\nthree\n")
    (tmp_path / "train-2.txt").write_text("four")
    tables = load_table(str(tmp_path), streaming=streaming)
    assert list(tables["train"]) == [{"text": "one\ntwo\n\nthree\n"}, {"text": "four"}]


def test_rows_with_differing_keys_have_null_where_one_is_missing(tmp_path: Path) -> None:
    few = write_lines(tmp_path / "few.jsonl", [{"a": "x"}, {"a": "y", "b": "z"}, {"b": "w"}])
    assert load_file(few, "path").to_list() == [{"a": "x", "b": None}, {"a": "y", "b": "z"}, {"a": None, "b": "w"}]
    # what comes after the first 10 MB is not looked at by datasets
    late = write_lines(
        tmp_path / "late.jsonl",
        [{"a": [{"r": "x" * 1000}], "n": 1}] * 11_000 + [{"a": [{"r": "y", "s": "z"}], "b": 2.5}],
    )
    table = load_file(late, "path")
    assert (len(table), table[0]["b"], table[-1]) == (11_001, None, {"a": [{"r": "y", "s": "z"}], "n": None, "b": 2.5})


def test_a_stream_has_the_columns_of_its_first_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "HEAD", 2)
    path = write_lines(tmp_path / "a.jsonl", [{"a": 1}, {"b": 2}, {"c": 3, "a": 4}])
    assert list(load_table(path, streaming=True)["train"]) == [
        {"a": 1, "b": None},
        {"a": None, "b": 2},
        {"a": 4, "b": None},
    ]


@pytest.mark.parametrize("lines", [1, 7, 40])
def test_shards_of_a_jsonl_file_hold_each_row_once(lines: int, tmp_path: Path, small_parts: None) -> None:
    rows = [{"n": number, "text": "é" * (number * 7 % 60)} for number in range(lines)]
    path = tmp_path / "a.jsonl"
    # a byte-order mark, blank lines, and no line break at the end
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    stream = load_table(str(path), streaming=True)["train"]
    assert stream.num_shards == -(-path.stat().st_size // 100)
    assert list(stream) == rows
    batches = DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted(row["n"] for row in batches) == list(range(lines))


def test_only_training_rows_are_streamed(write: Write, tmp_path: Path) -> None:
    write("data/train.jsonl", ROWS)
    write("data/test.csv", ROWS[:3])
    tables = load_table(str(tmp_path / "data"), streaming=True)
    assert list(tables["train"]) == ROWS
    assert tables["test"].to_list() == ROWS[:3]


def test_hub_datasets_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return datasets.IterableDatasetDict(
            {split: datasets.Dataset.from_list(ROWS).to_iterable_dataset() for split in ("train", "valid", "other")}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tables = load_table("org/name:config", streaming=True)
    assert asked == [(("org/name", "config"), {"streaming": True})]
    assert isinstance(tables["train"], datasets.IterableDataset)
    assert sorted(tables) == ["train", "validation"]
    assert tables["validation"].to_list() == ROWS


@pytest.mark.parametrize("workers", [0, 2])
def test_malformed_line_is_told_while_a_stream_runs(workers: int, tmp_path: Path, small_parts: None) -> None:
    path = tmp_path / "a.jsonl"
    good = [f"{json.dumps({'n': number})}\n" for number in range(2000)]
    path.write_text("".join([*good[:1500], '{"n": \n', *good[1500:]]))
    stream = load_table(str(path), streaming=True)["train"]
    with pytest.raises(PEFTError, match=r"a\.jsonl, line 1501: not JSON: Expecting value at character 6"):
        list(DataLoader(stream, batch_size=None, num_workers=workers))


def test_malformed_start_of_a_stream_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n[2]\n')
    assert fault(str(path), streaming=True) == f"path: {path}, line 2: a row is an object, not list"
    path.write_bytes(b'{"n": "\xff"}\n')
    assert fault(str(path), streaming=True) == f"path: {path}, line 1: not UTF-8: invalid start byte at byte 8"
    path.write_bytes(b"\n\n")
    assert fault(str(path), streaming=True) == f"path: '{path}' has no rows"
    path.write_bytes(b"")
    assert fault(str(path), streaming=True) == f"path: '{path}' is empty"
    listed = tmp_path / "a.json"
    listed.write_text('[{"n": 1}, 2]')
    assert fault(str(listed), streaming=True) == f"path: {listed}, row 2: a row is an object, not int"
    listed.write_text('[{"n": 1}, ')
    assert fault(str(listed), streaming=True) == f"path: {listed}: Expecting value: line 1 column 12 (char 11)"


def test_malformed_csv_row_is_told_while_a_stream_runs(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "a\n" * 30_000 + "b,c,d\n")
    stream = load_table(str(path), streaming=True)["train"]
    with pytest.raises(PEFTError) as caught:
        list(stream)
    assert str(caught.value) == (
        f"path: '{path}' can't be read as CSV: Error tokenizing data. C error: Expected 1 fields in line 30002, saw 3"
    )


def test_a_column_of_text_stays_one_where_a_later_part_of_a_csv_file_looks_like_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,more\n" + "a,\n" * 20_000 + "3,4\n" * 20_000)
    rows = list(load_table(str(path), streaming=True)["train"])
    assert (rows[0], rows[-1]) == ({"text": "a", "more": None}, {"text": "3", "more": "4"})


@pytest.mark.parametrize("streaming", [False, True])
def test_numbers_of_both_kinds_are_one_column(streaming: bool, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"n": 1}, {"n": 1.5}])
    assert [row["n"] for row in load_table(path, streaming=streaming)["train"]] == [1, 1.5]


def test_folder_gives_its_splits_from_one_or_more_files(write: Write, tmp_path: Path) -> None:
    write("data/train-00000-of-00002.jsonl", ROWS[:2])
    write("data/train-00001-of-00002.jsonl", ROWS[2:])
    write("data/dev.csv", ROWS[:1])
    write("data/test.parquet", ROWS[:3])
    (tmp_path / "data" / "README.md").write_text("not a table")
    tables = load_table(str(tmp_path / "data"))
    assert {split: len(tables[split]) for split in tables} == {"train": 5, "validation": 1, "test": 3}
    assert tables["train"].to_list() == ROWS


def test_changed_file_is_read_anew(write: Write) -> None:
    path = write("a.jsonl", ROWS[:2])
    assert len(load_file(path, "path")) == 2
    assert len(load_file(write("a.jsonl", ROWS), "path")) == 5


def test_folder_without_a_training_file(write: Write, tmp_path: Path) -> None:
    write("data/test.csv", ROWS)
    folder = str(tmp_path / "data")
    assert fault(folder) == (
        f"path: the folder {folder!r} has no training file (train.csv, train.jsonl, …); it holds test.csv"
    )


def test_folder_where_a_file_is_asked_for(write: Write, tmp_path: Path) -> None:
    write("data/train.csv", ROWS)
    write("data/test.csv", ROWS)
    folder = str(tmp_path / "data")
    with pytest.raises(PEFTError) as caught:
        load_file(folder, "test_path")
    assert str(caught.value) == f"test_path: {folder!r} holds the splits test, train; give one file"


def test_empty_files(tmp_path: Path) -> None:
    nothing, header = tmp_path / "nothing.jsonl", tmp_path / "header.csv"
    nothing.touch()
    header.write_text("text,label\n")
    assert fault(str(nothing)) == f"path: '{nothing}' is empty"
    assert fault(str(header)) == f"path: '{header}' has no rows"


def test_unknown_suffix(tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    path.write_bytes(b"PK")
    assert fault(str(path)) == (
        f"path: '{path}' has the unknown suffix '.xlsx'; use one of .csv, .tsv, .json, .jsonl, .parquet, .arrow, .txt"
    )


def test_every_malformed_row_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": "b", "label"\n\n[1, 2]\n{"text": "c", "label": "one"}\n')
    assert fault(str(path)).splitlines() == [
        f"path: {path}, line 2: not JSON: Expecting ':' delimiter at character 22",
        f"path: {path}, line 4: a row is an object, not list",
        f"path: {path}, line 5: 'label' is str, but int in line 1",
    ]


def test_malformed_files_of_other_formats(tmp_path: Path) -> None:
    json_file, parquet, csv = tmp_path / "a.json", tmp_path / "a.parquet", tmp_path / "a.csv"
    json_file.write_text('[{"text": "a"},\n {"text": }]')
    parquet.write_bytes(b"not parquet at all")
    csv.write_text('text,label\n"a",1\n"b",2,3,4\n')
    assert fault(str(json_file)) == f"path: {json_file}: Expecting value: line 2 column 11 (char 26)"
    assert fault(str(parquet)).startswith(f"path: '{parquet}' can't be read as Parquet: Parquet magic bytes not found")
    assert fault(str(csv)) == (
        f"path: '{csv}' can't be read as CSV: Error tokenizing data. C error: Expected 2 fields in line 3, saw 4"
    )


def test_mistyped_file_here_is_not_asked_of_the_hub(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("train.csv", ROWS)
    monkeypatch.chdir(tmp_path)
    assert fault("train.cvs") == "path: there is no file or folder 'train.cvs'; did you mean 'train.csv'?"


def test_hub_name_that_cannot_be_reached(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("org/such-data.csv", ROWS)
    monkeypatch.chdir(tmp_path)
    message = fault("org/no-such-dataset")
    assert message.startswith(
        "path: 'org/no-such-dataset' is no file or folder here, and can't be had from the hub either: "
    )
    assert message.endswith("; did you mean 'such-data.csv'?")
    assert "\n" not in message
