"""What a run was made of: its base and its data, told from others by plain values."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from lightning_peft.methods._host import own_class
from lightning_peft.methods._targets import base_modules, is_transformers_model

HUB = "https://huggingface.co/"
LOADING = {
    "batch_size",
    "num_workers",
    "pin_memory",
    "persistent_workers",
    "prefetch_factor",
    "shuffle",
    "drop_last",
    "group_by_length",
}
"""Arguments of a DataModule that change how rows are loaded, and not which."""
FILES = 2_000
"""A folder with more is told by its name alone."""
SAMPLE = 1 << 20
"""Bytes read at either end of a file."""


@dataclass(frozen=True)
class Source:
    """What a run was made of."""

    kind: Literal["base", "dataset"]
    name: str
    """A hub id, or what stands for it: a folder's last name, a class."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """Plain values by which another one is told from it."""
    address: str = ""
    """Where it is on the web; empty where it isn't."""


def sources(trainer: pl.Trainer, module: pl.LightningModule) -> list[Source]:
    """The base and the data of a run.

    The base is the outermost transformers model of `module`, or `module` itself where it has none; the data is the
    DataModule's, or the training loader's dataset where there is no DataModule and fitting has begun.
    """
    data = _data(trainer)
    return [_base(module), *([data] if data else [])]


def plain(value: Any) -> Any:
    """`value` as JSON has it: what is no number, text, list or mapping by its class's name, a number that is not finite
    as None."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value if value is None or isinstance(value, (bool, int, str)) else type(value).__name__


def class_path(thing: object) -> str:
    """The whole name of `thing`'s class; of a module, the one that it had before adapters stood on it."""
    cls = own_class(thing) if isinstance(thing, pl.LightningModule) else type(thing)
    return f"{cls.__module__}.{cls.__qualname__}"


def _base(module: pl.LightningModule) -> Source:
    root = next((part for _, part in base_modules(module) if is_transformers_model(part)), None)
    config: Any = getattr(root, "config", None)
    given = module.hparams.get("model")
    place = given if isinstance(given, str) else str(getattr(config, "_name_or_path", None) or "")
    identity = {"class": f"{own_class(root or module).__module__}.{own_class(root or module).__qualname__}"}
    if revision := getattr(config, "_commit_hash", None):
        identity["revision"] = str(revision)
    if not place:
        return Source("base", own_class(root or module).__name__, identity)
    return Source("base", _name(place), identity, _address(place, ""))


def _data(trainer: pl.Trainer) -> Source | None:
    module: Any = getattr(trainer, "datamodule", None)
    if module is None:
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        if dataset is None:
            return None
        rows = {"rows": len(dataset)} if hasattr(dataset, "__len__") else {}
        return Source("dataset", type(dataset).__name__, {"class": class_path(dataset), **rows})
    arguments = {
        name: value
        for name, value in dict(module.hparams).items()
        if name not in LOADING and not name.startswith("_") and value is not None
    }
    place = arguments.get("path")
    identity: dict[str, Any] = {"class": class_path(module)}
    for name, value in arguments.items():
        found = _existing(value)
        # a file is the same wherever it lies
        identity[name] = {"name": found.name, "sha256": _digest(found)} if found else plain(value)
    if not isinstance(place, str):
        return Source("dataset", type(module).__name__, identity)
    return Source("dataset", _name(place), identity, _address(place.partition(":")[0], "datasets/"))


def _existing(value: Any) -> Path | None:
    """The file or folder that a hyper-parameter names, which a word does too that happens to be a folder's here."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        return None
    path = Path(value).expanduser()
    try:
        return path.resolve() if path.exists() else None
    except OSError:  # a text that is too long for a name
        return None


def _digest(path: Path) -> str | None:
    """SHA-256 over names, sizes, and up to 1 MB at either end of each file; None for a folder of too many."""
    files = [path]
    if path.is_dir():
        found = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
        files = sorted(itertools.islice(found, FILES + 1))
        if len(files) > FILES:
            return None
    whole = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        name = "" if file == path else file.relative_to(path).as_posix()
        whole.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as content:
            whole.update(content.read(SAMPLE))
            if size > SAMPLE:
                content.seek(max(SAMPLE, size - SAMPLE))
                whole.update(content.read(SAMPLE))
    return whole.hexdigest()


def _is_local(place: str) -> bool:
    return Path(place).expanduser().exists() or place.startswith((".", "/", "~"))


def _name(place: str) -> str:
    return Path(place).expanduser().resolve().name if _is_local(place) else place


def _address(place: str, kind: str) -> str:
    """The hub's page of `org/name`; empty for anything else."""
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", place) is not None and not _is_local(place)
    return f"{HUB}{kind}{place}" if is_id else ""
