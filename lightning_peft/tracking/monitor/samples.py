"""A few rows of a batch with what a module makes of them, as a person reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_peft.tracking.cost.unchanged import unchanged
from lightning_peft.tracking.monitor.throughput import rows
from lightning_peft.tracking.predictions import plain, rows_of

TARGETS = ("labels", "label", "targets", "target")
"""Names under which a batch holds what is to be predicted."""
FEW = 16
"""Numbers of a tensor that are shown one by one."""
LONG = 1000
"""Characters that are shown of a cell."""

Table = tuple[list[str], list[list[Any]]]
"""The columns' names, and rows of plain values."""


def sample_table(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, limit: int) -> Table | None:
    """The first rows of a validation batch: the input, the target where the batch has one, and what `predict_step`
    returns.

    Classes are named by the module's hyper-parameter `label_names`, also those of a row's tokens; other tokens are
    decoded by the tokenizer of the DataModule or the module, where there is one. A large tensor is told by its shape.
    Random numbers, modes and metrics stay what they are.

    Args:
        trainer: in whose validation `batch` was seen.
        module: in eval mode; where its base is sharded, every rank has to call this.
        batch: on the module's device, of a mapping or a sequence, whose tensors have rows in their first dimension.
        limit: rows at most.

    Returns:
        The table; None where the module has no `predict_step` of its own, or the batch no rows.

    Raises:
        Exception: that the module raises for such a batch, or PEFTError for what it returns.
    """
    count = rows(batch)
    if not count or not is_overridden("predict_step", module):
        return None
    some = _first_rows(batch, count, min(limit, count))
    with unchanged(module), torch.no_grad(), trainer.precision_plugin.predict_step_context():
        module.eval()
        predictions = rows_of(module.predict_step(some, 0))[:limit]
    tokenizer: Any = getattr(getattr(trainer, "datamodule", None), "tokenizer", getattr(module, "tokenizer", None))
    names = module.hparams.get("label_names")
    columns: dict[str, list[Any]] = {"input": _shown(_inputs(some), tokenizer, None)}
    if (targets := _targets(some)) is not None:
        columns["target"] = _shown(targets, tokenizer, names)
    if predictions and all(isinstance(value, Mapping) for value in predictions):
        columns |= {str(name): [_cell(value.get(name), names) for value in predictions] for name in predictions[0]}
    else:
        columns["prediction"] = [_cell(value, names) for value in predictions]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=False)]


def _first_rows(value: Any, count: int, limit: int, is_top: bool = True) -> Any:
    """`value` with the first `limit` of `count` rows in each tensor, and in each list that is no part of the batch's
    own structure."""
    if isinstance(value, Tensor):
        return value[:limit] if value.dim() and len(value) == count else value
    if isinstance(value, Mapping):
        return {name: _first_rows(part, count, limit, False) for name, part in value.items()}
    if isinstance(value, list) and len(value) == count and not is_top:
        return value[:limit]
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_first_rows(part, count, limit, False) for part in value)
    return value


def _inputs(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        mask, ids = batch.get("attention_mask"), batch.get("input_ids")
        if ids is not None:
            return _unpadded(ids, mask)
        return next((value for name, value in batch.items() if name not in TARGETS), None)
    return _inputs(batch[0]) if isinstance(batch, (list, tuple)) else batch


def _targets(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return next((batch[name] for name in TARGETS if name in batch), None)
    return batch[1] if isinstance(batch, (list, tuple)) and len(batch) > 1 else None


def _unpadded(ids: Tensor, mask: Any) -> list[Tensor]:
    same = isinstance(mask, Tensor) and mask.shape == ids.shape
    return [row[mask[place].bool()] if same else row for place, row in enumerate(ids)]


def _shown(values: Any, tokenizer: Any, names: Sequence[str] | None) -> list[Any]:
    """A cell for each row."""
    return [_cell(value, names, tokenizer) for value in values]


def _cell(value: Any, names: Sequence[str] | None, tokenizer: Any = None) -> Any:
    """A text or a number."""
    if isinstance(value, Tensor):
        are_integers = value.dim() == 1 and not value.is_floating_point()
        if are_integers and names:
            return _text(", ".join(str(_named(place, names)) for place in value[value >= 0].tolist()))
        if are_integers and tokenizer is not None:
            return _text(_decoded(value[value >= 0].tolist(), tokenizer))
        are_likelihoods = names is not None and value.shape == (len(names),)
        if value.numel() > FEW and not are_integers and not are_likelihoods:
            return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    value = plain(value)
    if names and isinstance(value, int):
        return _named(value, names)
    if names and isinstance(value, list) and len(value) == len(names) and all(isinstance(p, float) for p in value):
        best = max(range(len(names)), key=value.__getitem__)
        return f"{names[best]} ({value[best]:.3f})"
    return value if isinstance(value, (int, float)) else _text(value)


def _named(place: int, names: Sequence[str]) -> str | int:
    return names[place] if 0 <= place < len(names) else place


def _decoded(tokens: list[int], tokenizer: Any) -> str:
    # a target of CTC has a letter twice where it is spelled twice: only what a model hears is merged
    options = {"group_tokens": False} if hasattr(tokenizer, "word_delimiter_token") else {}
    return str(tokenizer.decode(tokens, skip_special_tokens=True, **options))


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONG else f"{text[: LONG - 1]}…"
