"""Labelled sounds from a folder, a table or the hub, as batches for a classifier."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_peft.data.folders import FolderData, labels_of
from lightning_peft.data.module import Collate
from lightning_peft.data.sounds import SoundData, features, read_sound

if TYPE_CHECKING:
    from datasets import Dataset


class AudioFolderData(SoundData, FolderData):
    """Sounds with one label each, mixed down to one channel and resampled to the rate of the model.

    A batch holds what the model's feature extractor makes, `input_values` or `input_features` in float32 and for some
    models `attention_mask`, and `labels`, int64 of shape (batch,). Waves are padded to the longest of the batch;
    features as their extractor does it. Sounds are read when they are needed and in the loaders' processes; every
    file's header is checked before.

    Args:
        path: a folder with one folder per class, or with folders `train`, `validation` and `test` of these; or a table:
            see `FolderData`.
        audio_column: the column of a table that holds the sounds or their paths.
        max_seconds: sounds are cut to this length; how many were cut is logged.
        **options: see `FolderData`.

    Attributes:
        cut_rows: the number of sounds longer than `max_seconds`, by split; known after `setup`.

    Raises:
        PEFTError: by the constructor, a number is out of its range; by `setup`, data that can't be trained on: a
            missing folder or column, a single or an empty class, an unknown suffix, a sound that can't be read.
    """

    wanted: ClassVar[tuple[str, str]] = ("sounds with labels", "folder")

    def row_faults(self, tables: Mapping[str, Dataset]) -> list[str]:
        """Labels that training doesn't have, and files that can't be read; logs how many are cut."""
        faults = super().row_faults(tables)
        for split in tables:
            if self.long_rows[split]:
                rank_zero_info(f"{self.long_rows_told(split, len(tables[split]))} and are cut")
        return faults

    def reader(self) -> Callable[[str | io.BytesIO], Any]:
        """Reads a sound at the extractor's rate."""
        return partial(read_sound, rate=self.processor.sampling_rate, seconds=self.max_seconds)

    def collate(self) -> Collate:
        """The features and labels of a batch."""
        return partial(_collate, extractor=self.processor)


def _collate(rows: list[dict[str, Any]], extractor: Any) -> dict[str, torch.Tensor]:
    return {**features([row["file"] for row in rows], extractor), **labels_of(rows)}
