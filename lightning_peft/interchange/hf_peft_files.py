"""The two files of an HF peft directory: where they come from, and how they are read and written."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lightning_peft.interchange.locations import resolve
from lightning_peft.methods.errors import PEFTError
from lightning_peft.state.whole import whole_file

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"


def fetched(source: str | Path, revision: str | None) -> Path:
    """The local folder of an adapter: `source` itself, or what the hub has under that id.

    Raises:
        PEFTError: there is no such folder, or the hub does not give it.
    """
    place = Path(resolve(str(source), "source"))
    if place.is_dir() and revision is None:
        return place
    if place.exists():
        what = f"revision: {revision!r} is for hub ids" if place.is_dir() else f"source: {place} is no folder"
        raise PEFTError(f"{what}; give the folder that holds {CONFIG}" + " alone" * place.is_dir())
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(source), revision=revision, allow_patterns=[CONFIG, TENSORS, PICKLED]),
        )
    except (OSError, ValueError) as error:
        at = f" at revision {revision!r}" if revision else ""
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise PEFTError(
            f"source: {str(source)!r} is no folder here, and the hub does not give it{at}: {reason}"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of `adapter_config.json`.

    Raises:
        PEFTError: there is none, or it is no JSON object with a peft_type.
    """
    file = folder / CONFIG
    if not file.is_file():
        inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        hint = f"; {', '.join(inner[:3])} in it has one" if inner else ""
        raise PEFTError(f"{folder}: holds no {CONFIG}, so it is no HF PEFT directory{hint}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PEFTError(f"{file}: is no JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise PEFTError(f"{file}: names no peft_type, so it does not say which method the adapter is")
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors by key, on the CPU; the safetensors file where there is one, else the pickled one without running
    any of it.

    Raises:
        PEFTError: there is neither, or it is garbled, or holds other objects than tensors.
    """
    if (folder / TENSORS).is_file():
        try:
            return load_file(folder / TENSORS)
        except (SafetensorError, OSError, ValueError) as error:
            raise PEFTError(f"{folder / TENSORS}: is truncated or no safetensors file ({error})") from error
    file = folder / PICKLED
    if not file.is_file():
        raise PEFTError(f"{folder}: holds no {TENSORS} and no {PICKLED}")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise PEFTError(
            f"{file}: is garbled, or holds Python objects other than tensors, which could run code when loaded; "
            f"ask its author for {TENSORS}"
        ) from error
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, AttributeError) as error:
        raise PEFTError(f"{file}: is truncated or garbled ({next(iter(str(error).splitlines()), '')})") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise PEFTError(f"{file}: holds other things than tensors by name")
    return {str(key): tensor for key, tensor in tensors.items()}


def folder_faults(folder: Path) -> list[str]:
    """Why `folder` can't take an adapter; empty where it can."""
    if folder.is_dir():
        # a kill while an adapter is written leaves a hidden file, or the tensors alone
        visible = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
        if visible and not visible & {CONFIG, TENSORS}:
            return [f"folder: {folder} holds other things than an adapter; give another one"]
    return [f"folder: {folder} is a file"] if folder.exists() and not folder.is_dir() else []


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files, each of them whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        # tied tensors would share their storage, which safetensors refuses
        own = tensor.detach().cpu().contiguous()
        plain[key] = own.clone() if own.data_ptr() in seen else own
        seen.add(own.data_ptr())
    text = json.dumps(config, indent=2, sort_keys=True)
    for name, content in {TENSORS: save(plain, metadata={"format": "pt"}), CONFIG: text.encode()}.items():
        with whole_file(folder / name) as file:
            file.write(content)
