"""The tensors of safetensors files: names, shapes and dtypes from the headers, each tensor or a slice of it when asked
for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_peft.methods.errors import PEFTError, some, suggestion

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
"""The format's names of those dtypes that torch computes with."""


@dataclass(frozen=True)
class Stored:
    """What a file's header says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Shards:
    """The tensors of one or more files, by key; only the headers have been read.

    Iterating gives the keys in the order in which the tensors lie in the files, so that a disk is read from front to
    back. The files stay mapped until `close`, which leaving a `with` block calls.
    """

    def __init__(self, path: Path, stored: Mapping[str, Stored], files: Mapping[Path, Any]) -> None:
        self.path = path
        self.stored: Mapping[str, Stored] = MappingProxyType(dict(stored))
        self._files = dict(files)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __contains__(self, key: object) -> bool:
        return key in self.stored

    def read(self, key: str) -> Tensor:
        """The whole tensor, on the CPU in the file's dtype.

        It is a view of the mapped file: it takes no memory of its own, must not be written to, and has to be copied
        where it is to outlive the file.
        """
        whole: Tensor = self._file(key).get_tensor(key)
        return whole

    def read_slice(self, key: str, *index: slice) -> Tensor:
        """The part of the tensor that `index`, one slice per leading dimension, means; as a view like `read`.

        A slice has no step. Only the pages of the part are read from the disk.
        """
        part: Tensor = self._file(key).get_slice(key)[index or ...]
        return part

    def close(self) -> None:
        """Give the files back; tensors that were read stay valid as long as they are held."""
        self._files.clear()

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _file(self, key: str) -> Any:
        if key not in self.stored:
            raise KeyError(f"{self.path} has no tensor {key!r}{suggestion(key, self.stored)}")
        return self._files[self.stored[key].file]


def open_shards(path: str | Path) -> Shards:
    """Read the headers of the safetensors files at `path`.

    Args:
        path: a `.safetensors` file, an index of shards (`….index.json`), or a folder that holds `model.safetensors` or
            `model.safetensors.index.json`; `~` is expanded. Where an index names what a file holds, its word counts:
            tensors that it leaves out aren't there.

    Raises:
        PEFTError: with all that is wrong: nothing is there, it is a pickle, a file is truncated or no safetensors, the
            index is garbled, leads out of its folder, or names a file or a tensor that isn't there.
    """
    place = _located(Path(path).expanduser())
    wanted = _weight_map(place) if place.name.endswith(".json") else None
    names = [place] if wanted is None else [place.parent / name for name in sorted(set(wanted.values()))]
    faults: list[str] = []
    files: dict[Path, Any] = {}
    stored: dict[str, Stored] = {}
    for file in names:
        opened = _opened(file, place, faults)
        if opened is None:
            continue
        files[file] = opened
        for key in opened.offset_keys():
            if wanted is not None and wanted.get(key) != file.name:
                continue
            part = opened.get_slice(key)
            dtype = DTYPES.get(part.get_dtype())
            if dtype is None:
                faults.append(f"{file}: {key} has the dtype {part.get_dtype()}, which can't be loaded")
            else:
                stored[key] = Stored(file, tuple(part.get_shape()), dtype)
        here = set(opened.keys())
        absent = [key for key, name in (wanted or {}).items() if name == file.name and key not in here]
        if absent:
            faults.append(f"{file}: {some(absent)} {'is' if len(absent) == 1 else 'are'} not in it, as {place} says")
    if faults:
        raise PEFTError(faults)
    return Shards(place, stored, files)


def _located(path: Path) -> Path:
    """The file or the index that `path` means."""
    if path.is_dir():
        for name in (ONE_FILE, INDEX):
            if (path / name).is_file():
                return path / name
        found = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", *PICKLES))
        pickles = [name for name in found if name.endswith(PICKLES)]
        if pickles and len(pickles) == len(found):
            raise PEFTError(_pickled(path / pickles[0]))
        others = f"; give one of its files: {', '.join(found[:5])}" if found else ""
        raise PEFTError(f"{path}: the folder holds neither {ONE_FILE} nor {INDEX}{others}")
    if path.name.endswith(PICKLES) or any(path.name.endswith(f"{suffix}.index.json") for suffix in PICKLES):
        raise PEFTError(_pickled(path))
    if not path.is_file():
        beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise PEFTError(f"{path}: there is no such file or folder{suggestion(path.name, beside)}")
    if path.suffix not in (".safetensors", ".json"):
        raise PEFTError(f"{path}: is no .safetensors file, no index of shards (.index.json) and no folder with one")
    return path


def _pickled(path: Path) -> str:
    return (
        f"{path}: is pickled, so that reading it could run code, and can't be read tensor by tensor; convert it once: "
        "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) for a transformers model (with its "
        'class), else safetensors.torch.save_file({k: v.contiguous().clone() for k, v in torch.load("'
        f'{path.name}", map_location="cpu", weights_only=True).items()}}, "{ONE_FILE}")'
    )


def _weight_map(index: Path) -> dict[str, str]:
    """The file name of each key; every name is that of a safetensors file right beside the index."""
    try:
        wanted = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        faults = [f"{index}: names {name!r} for {key!r}" for key, name in wanted.items() if not isinstance(name, str)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PEFTError(
            f'{index}: is no index of shards, which is JSON with "weight_map": {{tensor: file}} '
            f"({type(error).__name__}: {error})"
        ) from error
    for name in sorted({name for name in wanted.values() if isinstance(name, str)}):
        if name.endswith(PICKLES):
            faults.append(_pickled(index.parent / name))
        elif "/" in name or "\\" in name or ":" in name or not name.endswith(".safetensors"):
            faults.append(
                f"{index}: names {name!r}, which is not a .safetensors file in the same folder; nothing else is read"
            )
    if not wanted:
        faults.append(f"{index}: names no tensor")
    if faults:
        raise PEFTError(faults)
    return dict(wanted)


def _opened(file: Path, place: Path, faults: list[str]) -> Any:
    """The file, its header read; None where it can't be, which is then told in `faults`."""
    if not file.is_file():
        faults.append(f"{file}: the file is missing, as {place} names it; fetch the whole model again")
        return None
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        with file.open("rb") as content:
            pointer = content.read(24).startswith(b"version https://git-lfs")
        what = (
            "is a pointer of Git LFS; run `git lfs pull`"
            if pointer
            else f"is truncated or no safetensors file ({error}; {file.stat().st_size:,} bytes); fetch it again"
        )
        faults.append(f"{file}: {what}")
        return None
