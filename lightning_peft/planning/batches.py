"""The batch that a step is planned for: of the configuration's sizes, full rows without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_peft.methods.errors import PEFTError
from lightning_peft.planning.trainer import PlanningTrainer
from lightning_peft.tasks import (
    CausalLM,
    ImageClassification,
    QuestionAnswering,
    Seq2Seq,
    SequenceClassification,
    SpeechClassification,
    TokenClassification,
)
from lightning_peft.tasks.chunked_loss import SCALINGS
from lightning_peft.tasks.decoding import text_config

SAMPLING_RATE = 16000
"""Samples a second, where a model's configuration names no other: that of speech models."""
IMAGE = 224
"""Pixels of a side, where a model's configuration names none."""
TOKEN = 3
"""One of every vocabulary that is padding in none that is known."""
TEXTS = (CausalLM, QuestionAnswering, Seq2Seq, SequenceClassification, TokenClassification)


def prepare_task(module: pl.LightningModule, trainer: pl.Trainer) -> None:
    """Let a task find out what it does as training starts; to be called where tensors have no values."""
    if not isinstance(module, CausalLM) or not module.hparams["chunked_loss"]:
        return
    config = text_config(module.model)
    # without values it can't be seen that logits are changed
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in SCALINGS):
        return
    trainer.state.fn = TrainerFn.VALIDATING
    module.on_validation_start()
    trainer.state.fn = TrainerFn.FITTING


def batch_of(
    module: pl.LightningModule, trainer: PlanningTrainer, rows: int | None = None, length: int | None = None
) -> Any:
    """A batch for one device, with numbers on the meta device, and token ids and labels with values.

    Args:
        module: with its model.
        trainer: with the datamodule, by whose sizes it goes: `batch_size`, `max_length`, `packing`. Where the module is
            no task of this package around a model of transformers, the datamodule's first batch is read; without one,
            `example_input_array` is taken.
        rows: in place of `batch_size`.
        length: in place of `max_length`, or for sounds the number of samples.

    Raises:
        PEFTError: neither says what a batch is, or it has no length that could be given.
    """
    data = trainer.datamodule
    sizes = rows or getattr(data, "batch_size", None), length or getattr(data, "max_length", None)
    config = getattr(getattr(module, "model", None), "config", None)
    if config is not None and isinstance(module, TEXTS):
        return _texts(module, data, *_known(sizes))
    if length is not None and not (config is not None and isinstance(module, SpeechClassification)):
        raise PEFTError(
            f"batch: a length can't be given to {type(module).__name__}, whose rows are as its data or its model make "
            f"them; give their number alone, such as --batch {rows or 8}"
        )
    if config is not None and isinstance(module, ImageClassification):
        side = getattr(config, "image_size", None) or IMAGE
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        (count,) = _known(sizes[:1])
        pixels = _floats(count, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": pixels, "labels": torch.zeros(count, dtype=torch.int64)}
    if config is not None and isinstance(module, SpeechClassification):
        seconds = getattr(data, "max_seconds", 10.0)
        (count,) = _known(sizes[:1])
        samples = length or int(seconds * getattr(config, "sampling_rate", SAMPLING_RATE))
        return {"input_values": _floats(count, samples), "labels": torch.zeros(count, dtype=torch.int64)}
    return _given(module, trainer, rows)


def _texts(module: pl.LightningModule, data: Any, rows: int, length: int) -> dict[str, Tensor]:
    """Full rows need no mask, and models make none then."""
    batch = {"input_ids": _integers(rows, length)}
    if isinstance(module, QuestionAnswering):
        return {**batch, "start_positions": _integers(rows), "end_positions": _integers(rows)}
    if isinstance(module, SequenceClassification):
        return {**batch, "labels": torch.zeros(rows, dtype=torch.int64)}
    if getattr(data, "packing", False):
        # several texts in a row, which a mask keeps apart
        batch["position_ids"] = (torch.arange(length) % -(-length // 2)).expand(rows, length)
    labels = getattr(data, "max_target_length", None) if isinstance(module, Seq2Seq) else None
    return {**batch, "labels": _integers(rows, labels or length)}


def _given(module: pl.LightningModule, trainer: PlanningTrainer, rows: int | None) -> Any:
    if trainer.datamodule is not None:
        trainer.prepare_data()
        loaders = trainer.datamodule.train_dataloader()
        # as the Trainer does it for several
        combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")
        batch, _, _ = next(iter(combined))
    elif module.example_input_array is not None:
        batch = module.example_input_array
    else:
        raise PEFTError(
            f"plan: nothing says what a batch of {type(module).__name__} is; give a datamodule in the section data, or "
            "the module an example_input_array of what its training_step takes"
        )
    tensors: list[Tensor] = []
    with_tensors(batch, tensors.append)
    if not tensors or not tensors[0].dim():
        raise PEFTError(f"plan: a batch of {type(module).__name__} holds no tensors")
    count = len(tensors[0])
    return with_tensors(batch, lambda tensor: _like(tensor, count, rows))


def _like(tensor: Tensor, count: int, rows: int | None) -> Tensor:
    shape = list(tensor.shape)
    if rows is not None and shape and shape[0] == count:
        shape[0] = rows
    if tensor.is_floating_point() or shape != list(tensor.shape):
        return torch.empty(shape, dtype=tensor.dtype, device="meta")
    return tensor


def with_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A nest of mappings, sequences and dataclasses with each tensor changed."""
    return apply_to_collection(value, Tensor, change)


def _known(sizes: Sequence[int | None]) -> list[int]:
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        raise PEFTError("plan: nothing says how large a batch is; give --batch ROWSxLENGTH, such as --batch 2x2048")
    return known


def _integers(*shape: int) -> Tensor:
    return torch.full(shape, TOKEN)


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")
