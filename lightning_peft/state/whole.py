"""Files and folders that appear whole or not at all, whenever the process is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which stands at `path` once all is written."""
    with synced(beside(path)) as file:
        yield file
    put_in_place(beside(path), path)


@contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which is on the disk in the end."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def beside(path: Path) -> Path:
    """Where what will stand at `path` is written; the next write takes the name again, so that a kill leaves at most
    one behind."""
    return path.with_name(f".{path.name}.part")


def put_in_place(unfinished: Path, path: Path) -> None:
    """Let what was written stand at `path`; what is there is put aside until it does, for a kill in between."""
    aside = set_aside(path)
    if path.is_dir() or (path.exists() and unfinished.is_dir()):
        _remove(aside)
        path.rename(aside)
    unfinished.replace(path)
    _remove(aside)
    _sync(path.parent)


def set_aside(path: Path) -> Path:
    """Where what stood at `path` is while another takes its place."""
    return path.with_name(f".{path.name}.old")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    if os.name == "nt":
        return  # folders can't be opened there, and a rename is durable without it
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
