"""Checkpoints as folders, of which every process writes a share: by torch.distributed.checkpoint, in the layout that
Lightning gives it, where `meta.pt` has all that is no tensor of the module or an optimizer.

torch reads such a folder's index by pickle. Here it is read by an unpickler that knows what stands in an index and
nothing else, so that a folder from elsewhere runs no code; the rest is read with `weights_only`.
"""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_peft.state.whole import beside, put_in_place, synced

META = "meta.pt"
INDEX = ".metadata"
TENSORS = ("state_dict", "optimizer_states")
"""What of a checkpoint is written in shares."""
MARK = "tensor:"
"""In place of a tensor, before its key; no string of an optimizer's state begins so."""
KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {
        "Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
    },
    "collections": {"OrderedDict"},
}  # fmt: skip
"""What an index is made of; checked on torch 2.13."""


def save_folder(checkpoint: dict[str, Any], path: Path, *, together: bool) -> None:
    """Write a checkpoint beside its place and then rename it: at any moment a whole one can be read from `path`.

    Args:
        checkpoint: the same tensors on every process.
        path: on a file system that all processes share.
        together: whether every process calls it; else the first one does, and writes it all.

    Raises:
        OSError: it can't be written, on some process.
    """
    together = together and dist.is_available() and dist.is_initialized()
    is_first = not together or dist.get_rank() == 0
    unfinished = beside(path)
    if is_first:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    if together:
        dist.barrier()
    tensors: dict[str, Tensor] = {}
    rest = {name: _without(value, name, tensors) if name in TENSORS else value for name, value in checkpoint.items()}
    try:
        with _quiet():
            save(cast(Any, tensors), storage_writer=_Writer(unfinished), no_dist=not together)
    except CheckpointException as error:
        raise OSError(f"{path}: {error}") from error
    if is_first:
        with synced(unfinished / META) as file:
            torch.save(rest, file)
        put_in_place(unfinished, path)
    if together:
        dist.barrier()


def read_folder(path: Path, map_location: Any, weights_only: bool) -> dict[str, Any]:
    """The checkpoint in a folder, whole, on any number of processes.

    Args:
        path: the folder.
        map_location: as in `torch.load`; a function or mapping leaves tensors of the module on the CPU.
        weights_only: as in `torch.load`, of `meta.pt`.

    Raises:
        pickle.UnpicklingError: the index or `meta.pt` holds other objects.
        OSError, RuntimeError, ValueError, KeyError: a file is missing or broken.
    """
    rest = torch.load(path / META, map_location, weights_only=weights_only)
    reader = _Reader(path)
    entries = cast("dict[str, TensorStorageMetadata]", reader.read_metadata().state_dict_metadata)
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    try:
        with _quiet():
            load(cast(Any, tensors), storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise RuntimeError(next(str(fault) for fault in error.failures.values())) from error
    if isinstance(map_location, (str, torch.device)):
        tensors = {key: tensor.to(map_location) for key, tensor in tensors.items()}
    return {name: _with(value, tensors) if name in TENSORS else value for name, value in rest.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


class _Writer(FileSystemWriter):
    def storage_meta(self) -> None:
        """Nothing of where the folder was."""


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / INDEX).open("rb") as file:
            index = _Unpickler(file).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError("is no index")
        entries, places = index.state_dict_metadata, index.storage_data
        if not all(isinstance(entry, TensorStorageMetadata) for entry in entries.values()):
            raise ValueError("holds other things than tensors")
        if any(Path(place.relative_path).name != place.relative_path for place in places.values()):
            raise ValueError("names files outside of the folder")
        index.storage_meta = index.storage_meta or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} was not an allowed global")
        return super().find_class(module, name)


def _without(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """`value` with a mark in place of each tensor in it, which is put into `tensors`."""
    if isinstance(value, Tensor):
        tensors[key] = value.detach()
        return f"{MARK}{key}"
    if isinstance(value, dict):
        return {name: _without(item, f"{key}.{name}", tensors) for name, item in value.items()}
    if isinstance(value, list):
        return [_without(item, f"{key}.{place}", tensors) for place, item in enumerate(value)]
    return value


def _with(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_without`."""
    if isinstance(value, str) and value.startswith(MARK):
        return tensors[value.removeprefix(MARK)]
    if isinstance(value, dict):
        return {name: _with(item, tensors) for name, item in value.items()}
    return [_with(item, tensors) for item in value] if isinstance(value, list) else value
