"""What all kinds of sound data share: files that are checked, read, mixed down and resampled."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lightning_peft.data.file_rows import FileData, require
from lightning_peft.methods.errors import PEFTError

if TYPE_CHECKING:
    from datasets import DatasetDict


class SoundData(FileData):
    """Sounds, mixed down to one channel and resampled to the rate of the model.

    Args:
        path: see the kind of data.
        audio_column: the column of a table that holds the sounds or their paths.
        max_seconds: what is longer is cut or left out, as the kind of data says.
        **options: see `FileData`.
    """

    kind: ClassVar[str] = "sound"
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

    def long_rows_told(self, split: str, rows: int) -> str:
        """How many of a split's `rows` sounds are longer than `max_seconds`, as the start of a message."""
        long = len(self.long_rows[split])
        return (
            f"{split}: {long:,} of {rows:,} sounds ({long / rows:.1%}) are longer than max_seconds={self.max_seconds}"
        )


def features(sounds: list[Any], extractor: Any) -> dict[str, Any]:
    """What a feature extractor makes of a batch of sounds."""
    # waves have no length of their own; what makes spectra has one that its model expects
    padding = {"padding": True} if extractor.model_input_names[0] == "input_values" else {}
    return dict(extractor(sounds, sampling_rate=extractor.sampling_rate, return_tensors="pt", **padding))


def read_sound(file: str | io.BytesIO, rate: int, seconds: float | None) -> np.ndarray[Any, np.dtype[np.float32]]:
    """One channel in float32, at `rate` samples per second: all of a sound, or its first `seconds`."""
    import soundfile
    import soxr

    with soundfile.SoundFile(file) as sound:
        frames = -1 if seconds is None else int(seconds * sound.samplerate)
        channels = sound.read(frames, dtype="float32", always_2d=True)
        samples: np.ndarray[Any, np.dtype[np.float32]] = channels.mean(axis=1)
        return samples if sound.samplerate == rate else soxr.resample(samples, sound.samplerate, rate)
