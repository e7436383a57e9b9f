"""Loads a pretrained model for a task."""

from __future__ import annotations

from typing import Any

import torch

from lightning_peft.interchange.locations import resolve
from lightning_peft.methods.errors import PEFTError


def load_pretrained(auto_class: str, name: str, **options: Any) -> torch.nn.Module:
    """The model called `name`, in training mode: `from_pretrained` leaves it in eval mode, which Lightning would keep.

    Args:
        auto_class: the class of `transformers` to load it with, such as `AutoModelForSequenceClassification`.
        name: a hub id, a folder or `package:NAME/folder`.
        options: passed on to `from_pretrained`.

    Raises:
        PEFTError: nothing is there, or it is no such model.
    """
    import transformers

    place = resolve(name, "model")
    try:
        model: torch.nn.Module = getattr(transformers, auto_class).from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        message = " ".join(str(error).split())
        raise PEFTError(f"model: {auto_class} can't load {name!r}: {message}") from error
    return model.train()
