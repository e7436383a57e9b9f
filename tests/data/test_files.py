from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_peft.data.files import load_file, load_table
from lightning_peft.methods.errors import PEFTError

ROWS = [{"text": f"row {number}, with a comma", "label": number % 2} for number in range(5)]
Write = Callable[..., str]


def fault(source: str) -> str:
    with pytest.raises(PEFTError) as caught:
        load_table(source)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.parquet"])
def test_every_format_gives_the_same_rows_without_the_network(
    name: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    tables = load_table(write(name, ROWS))
    assert list(tables) == ["train"]
    assert tables["train"].to_list() == ROWS


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
    assert (
        fault(str(path)) == f"path: '{path}' has the unknown suffix '.xlsx'; use one of .csv, .json, .jsonl, .parquet"
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
