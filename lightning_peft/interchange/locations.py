"""Where a model or a data file is: a path, a folder inside an installed Python package, or a name on the hub."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from lightning_peft.methods.errors import PEFTError, suggestion

PACKAGE = "package:"
"""The prefix of `package:NAME/sub/folder`, a folder or file inside the installed Python package NAME."""


def package_folder(name: str) -> Path | None:
    """The folder of the installed top-level package `name`, found without importing it; None where there is none."""
    if not name.isidentifier():
        return None
    spec = importlib.util.find_spec(name)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def installed_packages() -> list[str]:
    """The import names of all installed distributions, sorted."""
    return sorted(importlib.metadata.packages_distributions())


def resolve(source: str, field: str) -> str:
    """The path that `source` stands for, or `source` itself where it is the name of something on the hub.

    Args:
        source: `package:NAME/sub/folder`, a path (`~` is expanded), or a hub id such as `org/name`.
        field: the name of the field that holds `source`, for the error messages.

    Raises:
        PEFTError: the package isn't installed, or `source` is a path and nothing is there. A `source` that starts with
            `.`, `/` or `~`, ends in a file's suffix of three letters or more, or has two slashes is taken for a path.
    """
    if source.startswith(PACKAGE):
        return _inside_package(source, field)
    path = Path(source).expanduser()
    if path.exists():
        return str(path)
    looks_like_path = source.startswith((".", "/", "~")) or path.is_absolute() or source.count("/") > 1
    if looks_like_path or path.suffix.lower() in {".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet", ".arrow"}:
        raise PEFTError(f"{field}: there is no file or folder {source!r}{_siblings(path)}")
    return source


def _inside_package(source: str, field: str) -> str:
    name, _, inside = source.removeprefix(PACKAGE).partition("/")
    folder = package_folder(name)
    if folder is None:
        hint = suggestion(name, installed_packages()) or "; install it first, or give a folder or a hub id"
        raise PEFTError(f"{field}: {source!r} names the Python package {name!r}, which isn't installed{hint}")
    path = folder / inside
    if not path.exists():
        raise PEFTError(f"{field}: the package {name!r} holds no {inside!r}{_siblings(path)}")
    return str(path)


def _siblings(path: Path) -> str:
    """A suggestion from the names beside the first part of `path` that is missing."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    return suggestion(missing.name, sorted(entry.name for entry in missing.parent.iterdir() if missing.parent.is_dir()))
