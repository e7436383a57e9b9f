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
from lightning_peft.state.folders import read_folder
from lightning_peft.state.whole import set_aside, whole_file


def read_checkpoint(path: _PATH, map_location: Any = "cpu", weights_only: bool = True) -> dict[str, Any]:
    """The checkpoint at `path`, a local file or an fsspec address, or a folder that several processes wrote.

    Args:
        map_location: as in `torch.load`.
        weights_only: refuse a file that holds Python objects beyond tensors and plain types.

    Raises:
        PEFTError: there is no such file, it is truncated or no checkpoint, or it holds other objects.
    """
    if str(path).startswith("wandb:"):
        raise PEFTError(f"{path}: is in W&B; bring it here first: lightning-peft import {path} adapter.ckpt")
    path = path if "://" in str(path) else expanded(path)
    try:
        checkpoint = _read(path, map_location, weights_only)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise PEFTError(f"{path}: there is no such checkpoint file{_siblings(path)}") from error
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        if forbidden is None:
            raise _unreadable(path, error) from error
        name = forbidden[1].rpartition(".")[2]
        raise PEFTError(
            f"{path}: holds Python objects other than tensors and plain types, which could run code when loaded "
            f"({forbidden[1]}); if you trust the file, pass weights_only=False to trainer.fit, test or predict, or "
            f"call torch.serialization.add_safe_globals([{name}]) before load_from_checkpoint"
        ) from error
    except (OSError, RuntimeError, EOFError, BadZipFile, KeyError, ValueError, AttributeError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(checkpoint, dict):
        raise _unreadable(path, TypeError(f"holds a {type(checkpoint).__name__}"))
    return checkpoint


def expanded(path: _PATH) -> Path:
    """The local file, where `~` is the user's home, as it is for Lightning's own writer."""
    return Path(os.path.expanduser(path))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own file format, written beside its place and then renamed: at any moment the file is whole or
    absent."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`; an address of a remote store goes to Lightning's own writer."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = expanded(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: _PATH, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """As `read_checkpoint`; `weights_only=False` is the user's word that the file is trusted."""
        return read_checkpoint(path, map_location, weights_only is not False)


def _read(path: _PATH, map_location: Any, weights_only: bool) -> Any:
    if "://" not in str(path):
        local = Path(path)
        aside = set_aside(local)
        # a kill between two renames leaves it there
        found = aside if aside.exists() and not local.exists() else local
        if found.is_dir():
            return read_folder(found, map_location, weights_only)
        path = found
    return TorchCheckpointIO().load_checkpoint(path, map_location, weights_only)


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
