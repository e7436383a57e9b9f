"""Whether a model keeps the texts of a packed row apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_peft.methods.errors import PEFTError
from lightning_peft.tasks.decoding import without_cache

LENGTH = 8
"""Tokens in each text of the trial."""


def check_packing(model: torch.nn.Module, vocabulary: int) -> None:
    """Run two short texts in one row, and refuse a model in which the first one reaches the second.

    The second one's logits have to be the same whatever the first one is, and the same as alone. The model runs as it
    is in evaluation and is left as it was, its modules' modes and torch's random numbers included.

    Args:
        model: takes `input_ids` and `position_ids`, int64 of shape (batch, length), and gives logits of shape (batch,
            length, vocabulary) or has them as `.logits`.
        vocabulary: the number of tokens that it knows.

    Raises:
        PEFTError: it takes no positions, or it mixes texts.
    """
    device = next(model.parameters()).device
    # from the middle of the vocabulary, since its ends hold tokens that a model may treat in its own way
    tokens = (vocabulary // 2 + torch.arange(2 * LENGTH, device=device)) % vocabulary
    first, second = tokens[:LENGTH], tokens[LENGTH:]
    try:
        with undisturbed(model, device):
            packed = _last_logits(model, first, second)
            other = _last_logits(model, (first + 1) % vocabulary, second)
            alone = _last_logits(model, second)
    except (TypeError, ValueError) as error:
        raise PEFTError(f"packing: {_name(model)} takes no position_ids ({error}); use packing=False") from error
    # half of the digits: far more than rounding takes, far less than another text brings
    tolerance = torch.finfo(packed.dtype).eps ** 0.5
    if max(_difference(packed, other), _difference(packed, alone)) > tolerance:
        raise PEFTError(
            f"packing: the attention of {_name(model)} ignores where a document ends, and each would be trained on "
            "those packed before it; use packing=False"
        )


def _last_logits(model: torch.nn.Module, *texts: torch.Tensor) -> torch.Tensor:
    inputs = {
        "input_ids": torch.cat(texts)[None],
        "position_ids": torch.cat([torch.arange(len(text), device=text.device) for text in texts])[None],
    }
    output = model(**inputs, **without_cache(model))
    logits: torch.Tensor = getattr(output, "logits", output)
    return logits[0, -LENGTH:]


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest distance at any token, as a part of how far the logits there lie apart."""
    one, other = one.float(), other.float()
    spread = (one - one.mean(dim=-1, keepdim=True)).norm(dim=-1)
    return float(((one - other).norm(dim=-1) / spread.clamp(min=1e-12)).max())


def _name(model: torch.nn.Module) -> str:
    place = getattr(getattr(model, "config", None), "name_or_path", "")
    return f"{type(model).__name__} {place!r}" if place else type(model).__name__


@contextmanager
def undisturbed(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Run `model` in evaluation without gradients, and leave its modules' modes and torch's random numbers as they
    were."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
