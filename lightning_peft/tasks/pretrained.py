"""Loads a pretrained model for a task, and checks that data fits it."""

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


def check_length(model: torch.nn.Module, data: object) -> None:
    """Refuse rows that may be longer than the model has positions for.

    Raises:
        PEFTError: the datamodule's `max_length` is more than the model's configuration says.
    """
    config = getattr(model, "config", None)
    most, asked = getattr(config, "max_position_embeddings", None), getattr(data, "max_length", None)
    if isinstance(most, int) and isinstance(asked, int) and 0 < most < asked:
        raise PEFTError(f"max_length: {asked} is more than the {most} tokens that the model reads")
