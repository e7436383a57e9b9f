"""Checkpoint files: written so that a kill leaves no half of one, read so that a bad one is named and runs no code."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_peft.methods.errors import PEFTError


def read_checkpoint(path: _PATH, map_location: Any = "cpu", weights_only: bool = True) -> dict[str, Any]:
    """The checkpoint at `path`, a local file or an fsspec address.

    Args:
        map_location: as in `torch.load`.
        weights_only: refuse a file that holds Python objects beyond tensors and plain types.

    Raises:
        PEFTError: there is no such file, it is truncated or no checkpoint, or it holds other objects.
    """
    try:
        checkpoint = TorchCheckpointIO().load_checkpoint(path, map_location, weights_only)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise PEFTError(f"{path}: there is no such checkpoint file{_siblings(path)}") from error
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        if forbidden is None:
            raise _unreadable(path, error) from error
        raise PEFTError(
            f"{path}: holds Python objects other than tensors and plain types, which could run code when loaded "
            f"({forbidden[1]}); if you trust the file, pass weights_only=False to trainer.fit, test or predict"
        ) from error
    except (OSError, RuntimeError, EOFError, BadZipFile, KeyError, ValueError, AttributeError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(checkpoint, dict):
        raise _unreadable(path, TypeError(f"holds a {type(checkpoint).__name__}"))
    return checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own file format, written beside its place and then renamed: at any moment the file is whole or
    absent."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`; an address of a remote store goes to Lightning's own writer."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        # a name that a later write of the same checkpoint takes again, so that a kill leaves at most one behind
        unfinished = target.with_name(f".{target.name}.part")
        with unfinished.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)
        _sync_folder(target.parent)

    def load_checkpoint(
        self, path: _PATH, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """As `read_checkpoint`; `weights_only=False` is the user's word that the file is trusted."""
        return read_checkpoint(path, map_location, weights_only is not False)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # folders can't be opened there, and a rename is durable without it
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unreadable(path: _PATH, error: Exception) -> PEFTError:
    size = f"{Path(path).stat().st_size:,} bytes" if Path(path).is_file() else "not a local file"
    return PEFTError(
        f"{path}: is truncated or no checkpoint ({size}; {_first_line(error)}); "
        f"resume from another one{_siblings(path)}"
    )


def _first_line(error: Exception) -> str:
    return next(iter(re.split(r"\n|\. ", str(error).strip())), "")[:200] or type(error).__name__


def _siblings(path: _PATH) -> str:
    folder = Path(path).parent
    found = sorted(folder.glob("*.ckpt"), key=lambda file: -file.stat().st_mtime) if folder.is_dir() else []
    names = [file.name for file in found if file.name != Path(path).name][:3]
    return f"; in {folder} there is {', '.join(names)}" if names else ""
