"""Labelled sounds from a folder, a table or the hub, as batches for a classifier."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_peft.data.folders import FolderData, labels_of, require
from lightning_peft.data.module import Collate
from lightning_peft.methods.errors import PEFTError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


class AudioFolderData(FolderData):
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

    kind: ClassVar[str] = "sound"
    wanted: ClassVar[tuple[str, str]] = ("sounds with labels", "folder")
    column_field: ClassVar[str] = "audio_column"
    auto_class: ClassVar[str] = "AutoFeatureExtractor"
    suffixes: ClassVar[tuple[str, ...]] = (".aif", ".aiff", ".au", ".flac", ".mp3", ".ogg", ".opus", ".wav")

    def __init__(self, path: str, *, audio_column: str = "audio", max_seconds: float = 10.0, **options: Any) -> None:
        self.max_seconds = max_seconds
        super().__init__(path, file_column=audio_column, **options)

    def faults(self) -> list[str]:
        """What is wrong with the arguments."""
        told = f"max_seconds: {self.max_seconds} is not above 0"
        return ([] if self.max_seconds > 0 else [told]) + super().faults()

    def read_splits(self) -> DatasetDict:
        """The tables, or those of the sounds in the folders."""
        require("soundfile", "audio")
        require("soxr", "audio")
        return super().read_splits()

    def row_faults(self, tables: Mapping[str, Dataset]) -> list[str]:
        """Labels that training doesn't have, and files that can't be read; logs how many are cut."""
        faults = super().row_faults(tables)
        for split, cut in self.cut_rows.items():
            if cut:
                rows = len(tables[split])
                told = f"{cut:,} of {rows:,} sounds ({cut / rows:.1%}) are longer than max_seconds={self.max_seconds}"
                rank_zero_info(f"{split}: {told} and are cut")
        return faults

    def load_processor(self, source: str) -> None:
        """Load the feature extractor.

        Raises:
            PEFTError: there is none, or it is not one for sounds.
        """
        super().load_processor(source)
        if not hasattr(self.processor, "sampling_rate"):
            raise PEFTError(f"processor: that of {source!r} has no sampling rate; it is not one for sounds")

    def examine(self, file: str | io.BytesIO) -> bool:
        """Whether the sound is longer than `max_seconds`; raises an error where it can't be read."""
        import soundfile

        header = soundfile.info(file)
        if header.frames == 0:
            raise ValueError("it is 0 seconds long")
        return bool(header.frames > self.max_seconds * header.samplerate)

    def reader(self) -> Callable[[str | io.BytesIO], Any]:
        """Reads a sound at the extractor's rate."""
        return partial(_read, rate=self.processor.sampling_rate, seconds=self.max_seconds)

    def collate(self) -> Collate:
        """The features and labels of a batch."""
        return partial(_collate, extractor=self.processor)


def _read(file: str | io.BytesIO, rate: int, seconds: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """One channel in float32, at `rate` samples per second."""
    import soundfile
    import soxr

    with soundfile.SoundFile(file) as sound:
        channels = sound.read(int(seconds * sound.samplerate), dtype="float32", always_2d=True)
        samples: np.ndarray[Any, np.dtype[np.float32]] = channels.mean(axis=1)
        return samples if sound.samplerate == rate else soxr.resample(samples, sound.samplerate, rate)


def _collate(rows: list[dict[str, Any]], extractor: Any) -> dict[str, torch.Tensor]:
    # waves have no length of their own; what makes spectra has one that its model expects
    padding = {"padding": True} if extractor.model_input_names[0] == "input_values" else {}
    sounds = [row["file"] for row in rows]
    batch = extractor(sounds, sampling_rate=extractor.sampling_rate, return_tensors="pt", **padding)
    return {**batch, **labels_of(rows)}
