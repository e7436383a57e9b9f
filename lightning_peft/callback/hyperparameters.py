"""Hyper-parameters in a checkpoint: those with which no safe load could read it are left out, and missed later on."""

from __future__ import annotations

import warnings
from collections.abc import Container
from io import BytesIO
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_peft.state import KEY

UNSAVED = "unsaved_hyper_parameters"
"""Where a checkpoint's spec names those of the module that were left out."""


def drop_objects(checkpoint: dict[str, Any]) -> None:
    """Leave out hyper-parameters that are no plain values: modules, which would bring the frozen base back in, and
    what `torch.load(weights_only=True)` refuses, such as classes, functions and paths; with a warning.

    Args:
        checkpoint: with a spec; in place.
    """
    of_module = LightningModule.CHECKPOINT_HYPER_PARAMS_KEY
    for key in (of_module, LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY):
        parameters = checkpoint.get(key, {})
        objects = {name: type(value).__name__ for name, value in parameters.items() if not _is_plain(value)}
        if not objects:
            continue
        shown = ", ".join(f"{name} ({kind})" for name, kind in objects.items())
        rank_zero_warn(
            f"the hyper-parameters {shown} are no plain values and are not saved; use "
            f"save_hyperparameters(ignore={list(objects)}), and give them to load_from_checkpoint"
        )
        checkpoint[key] = {name: value for name, value in parameters.items() if name not in objects}
        if key == of_module:
            checkpoint[KEY][UNSAVED] = list(objects)


def warn_of_unsaved(spec: dict[str, Any], given: Container[str], cls: type[LightningModule], source: str) -> None:
    """Say which hyper-parameters were left out of a checkpoint and are not given now, so that `cls` has its own."""
    missed = [name for name in spec.get(UNSAVED, ()) if name not in given]
    if missed:
        arguments = ", ".join(f"{name}=…" for name in missed)
        warnings.warn(
            f"{source}: the hyper-parameters {', '.join(missed)} were not saved, and {cls.__name__} takes its "
            f"defaults; give those of the run: load_from_checkpoint({cls.__name__}, path, {arguments})",
            stacklevel=3,
        )


def _is_plain(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return False
    file = BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # whatever an object's own pickling raises
        return False
    return True
