"""An offline run of Weights & Biases, read back from its own record file by wandb's own message classes.

The one place in the tests that knows wandb's private formats, as of wandb 0.31. That version has no reader in Python
any more: the file's frames are parsed here, and each frame by `wandb.proto`.
"""

from __future__ import annotations

import json
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

MAGIC = b":W&B\xe1\xbe\x00"
BLOCK = 32_768
FRAME = struct.Struct("<IHB")
"""A checksum, a length, and whether the frame is a record's only one, its first, one between, or its last."""
ONLY, LAST = 1, 4


@contextmanager
def offline(folder: Path) -> Iterator[None]:
    """wandb without an account or another place than `folder`; its process ends with the context.

    Raises:
        AssertionError: a server was asked for.
    """
    import wandb

    places = ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR")
    with pytest.MonkeyPatch.context() as patch:
        for place in places:
            patch.setenv(place, str(folder / place.lower()))
            (folder / place.lower()).mkdir(parents=True, exist_ok=True)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("NETRC", str(folder / "netrc"))
        patch.delenv("WANDB_API_KEY", raising=False)
        wandb.teardown()  # settings are read once in a process
        with socket.create_server(("127.0.0.1", 0)) as server:
            patch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
            try:
                yield
            finally:
                wandb.teardown()
            asked, _, _ = select.select([server], [], [], 0)
            assert not asked, "wandb connected to a server"


@dataclass
class Logged:
    """An artifact's record."""

    name: str
    type: str
    aliases: list[str]
    metadata: dict[str, Any]
    digest: str
    used: bool
    files: dict[str, Path]
    references: dict[str, str]


@dataclass
class Recorded:
    """What a run wrote."""

    folder: Path
    id: str = ""
    group: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[Logged] = field(default_factory=list)
    exit_code: int | None = None

    def values(self, key: str) -> list[tuple[int, Any]]:
        """The optimizer step and value of each row of the history that has `key`."""
        return [(row["trainer/global_step"], row[key]) for row in self.history if key in row]

    def table(self, key: str, which: int = -1) -> dict[str, Any]:
        """Columns and data of a table."""
        content: dict[str, Any] = json.loads(self.media(key, which))
        return content

    def media(self, key: str, which: int = -1) -> str:
        """The text of the file that `key` has in the history."""
        path: str = self.values(key)[which][1]["path"]
        return (self.folder / "files" / path).read_text(encoding="utf-8")


def recorded(folder: Path) -> list[Recorded]:
    """The runs below `folder`, in the order of their start; all of them once `offline` is left."""
    found = [(file.parent.name, file) for file in folder.rglob("*.wandb")]
    return [_read(file) for _, file in sorted(found)]


def _read(file: Path) -> Recorded:
    run = Recorded(file.parent)
    for record in _records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.id, run.group = record.run.run_id, record.run.run_group
            _update(run.config, record.run.config.update)
        elif kind == "config":
            _update(run.config, record.config.update)
        elif kind == "history":
            row: dict[str, Any] = {}
            _update(row, record.history.item)
            run.history.append(row)
        elif kind == "artifact":
            run.artifacts.append(_artifact(record.artifact))
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _records(file: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    content = file.read_bytes()
    assert content.startswith(MAGIC)
    place, whole = len(MAGIC), b""
    while place + FRAME.size <= len(content):
        left = BLOCK - place % BLOCK
        if left < FRAME.size:  # a frame does not cross a block's end
            place += left
            continue
        _, length, kind = FRAME.unpack_from(content, place)
        place += FRAME.size
        whole += content[place : place + length]
        place += length
        if kind in (ONLY, LAST):
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def _update(target: dict[str, Any], items: Any) -> None:
    for item in items:
        *parents, name = list(item.nested_key) or [item.key]
        inner = target
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = json.loads(item.value_json)


def _artifact(record: Any) -> Logged:
    contents = list(record.manifest.contents)
    return Logged(
        record.name,
        record.type,
        list(record.aliases),
        json.loads(record.metadata or "{}"),
        record.digest,
        record.use_after_commit,
        {entry.path: Path(entry.local_path) for entry in contents if entry.local_path},
        {entry.path: entry.ref for entry in contents if entry.ref},
    )


def agent_command(sweep: dict[str, Any], setting: dict[str, Any]) -> list[str]:
    """The words that `wandb agent` runs on this system for a sweep and one setting of its parameters.

    It builds them inside of a method that starts the process, so that the last step, putting in what the placeholders
    stand for, is done again here.
    """
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    values = create_sweep_command_args({"args": {name: {"value": value} for name, value in setting.items()}})
    values |= {"program": [sweep["program"]], "env": ["/usr/bin/env"], "interpreter": ["python"]}
    words: list[str] = []
    for word in create_sweep_command(list(sweep["command"])):
        words += values[word[2:-1]] if word.startswith("${") else [word]
    return words


def set_by_agent(folder: Path, run_id: str, setting: dict[str, Any]) -> dict[str, str]:
    """The environment in which `wandb agent` runs them, with the file of the setting that wandb.init reads."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({"wandb_version": 1, **{name: {"value": value} for name, value in setting.items()}}))
    return {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": run_id, "WANDB_SWEEP_PARAM_PATH": str(file), "WANDB_PROJECT": "p"}
