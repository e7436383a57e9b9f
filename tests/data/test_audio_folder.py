from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from lightning_peft.data.audio_folder import AudioFolderData
from lightning_peft.methods.errors import PEFTError

Write = Callable[..., str]
RATE = 8000


@pytest.fixture(scope="session")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a feature extractor that pads raw waves of 8,000 samples per second."""
    from transformers import Wav2Vec2FeatureExtractor

    folder = str(tmp_path_factory.mktemp("extractor"))
    options: dict[str, Any] = {"do_normalize": False, "return_attention_mask": True}
    Wav2Vec2FeatureExtractor(sampling_rate=RATE, **options).save_pretrained(folder)
    return folder


def tone(pitch: float, seconds: float = 0.1, rate: int = RATE) -> np.ndarray[Any, Any]:
    times = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * pitch * times)).astype(np.float32)


def play(path: Path, wave: np.ndarray[Any, Any], rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate)
    return path


@pytest.fixture
def tones(tmp_path: Path) -> Path:
    """Five low and five high tones, of 0.1 to 0.5 seconds."""
    for name, pitch in (("low", 200), ("high", 1000)):
        for number in range(5):
            play(tmp_path / "tones" / name / f"{number}.wav", tone(pitch, 0.1 * (number + 1)))
    return tmp_path / "tones"


def fault(data: AudioFolderData) -> list[str]:
    with pytest.raises(PEFTError) as caught:
        data.setup()
    return list(caught.value.faults)


def pitches(waves: torch.Tensor) -> list[float]:
    """The loudest pitch of each wave, in Hz."""
    spectra = torch.fft.rfft(waves).abs()
    return (spectra.argmax(dim=1) * RATE / waves.shape[1]).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("workers", [0, 2])
def test_folder_of_classes(workers: int, tones: Path, extractor: str) -> None:
    path = str(tones)
    data = AudioFolderData(
        path, validation_path=path, processor=extractor, validation_fraction=0.2, batch_size=5, num_workers=workers
    )
    data.prepare_data()
    data.setup("fit")
    assert (data.class_names, data.num_labels, data.class_counts) == (["high", "low"], 2, [5, 5])
    assert data.cut_rows == {"train": 0, "validation": 0}
    batches: list[dict[str, torch.Tensor]] = list(data.val_dataloader())  # type: ignore[arg-type]
    assert [sorted(batch) for batch in batches] == [["attention_mask", "input_values", "labels"]] * 2
    assert [tuple(batch["input_values"].shape) for batch in batches] == [(5, 4000)] * 2
    assert batches[0]["input_values"].dtype == torch.float32
    assert batches[0]["attention_mask"].sum(dim=1).tolist() == [800, 1600, 2400, 3200, 4000]
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [0] * 5 + [1] * 5
    # 16 bits per sample
    assert batches[0]["input_values"][0, :800].numpy() == pytest.approx(tone(1000), abs=1e-4)
    assert pitches(batches[1]["input_values"][4:]) == [200]


def test_long_sounds_are_cut_counted_and_logged(tones: Path, extractor: str, caplog: pytest.LogCaptureFixture) -> None:
    data = AudioFolderData(str(tones), validation_path=str(tones), processor=extractor, max_seconds=0.25)
    with caplog.at_level(logging.INFO):
        data.setup()
    assert data.cut_rows == {"train": 6, "validation": 6}
    assert "train: 6 of 10 sounds (60.0%) are longer than max_seconds=0.25 and are cut" in caplog.text
    batch: dict[str, torch.Tensor] = next(iter(data.val_dataloader()))
    assert batch["attention_mask"].sum(dim=1).tolist() == [800, 1600, 2000, 2000, 2000] * 2


def test_sounds_are_mixed_down_and_resampled(tmp_path: Path, extractor: str) -> None:
    folder = tmp_path / "sounds"
    loud, quiet = tone(440, 0.5, 44_100), tone(440, 0.5, 44_100) / 2
    play(folder / "a" / "stereo.flac", np.stack([loud, quiet], axis=1), 44_100)
    play(folder / "a" / "wide.ogg", tone(440, 0.5, 48_000), 48_000)
    play(folder / "b" / "narrow.aiff", tone(440, 0.5, 4_000), 4_000)
    data = AudioFolderData(str(folder), validation_path=str(folder), processor=extractor)
    data.setup()
    batch: dict[str, torch.Tensor] = next(iter(data.val_dataloader()))
    waves = batch["input_values"]
    assert waves.shape == (3, 4000)
    assert pitches(waves) == [440] * 3
    # away from the ends, where a resampler has only half of what it needs
    middle = slice(500, -500)
    expected = [0.75 * tone(440, 0.5), tone(440, 0.5), tone(440, 0.5)]
    for wave, right, near in zip(waves, expected, (2e-3, 2e-2, 2e-3), strict=True):
        assert np.abs(wave.numpy() - right)[middle].max() < near


def test_spectra_are_padded_as_their_model_needs_it(tones: Path, tmp_path: Path) -> None:
    from transformers import WhisperFeatureExtractor

    WhisperFeatureExtractor(feature_size=4, chunk_length=1, sampling_rate=RATE).save_pretrained(str(tmp_path / "x"))
    data = AudioFolderData(str(tones), processor=str(tmp_path / "x"), validation_fraction=0)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch) == ["input_features", "labels"]
    # one second, of which a frame has 160 samples
    assert batch["input_features"].shape == (10, 4, 50)


@pytest.mark.parametrize("held", [False, True])
def test_tables(held: bool, write: Write, tones: Path, extractor: str) -> None:
    """Paths in a CSV file, and sounds in a Parquet file as the hub has them: `datasets` would need torchcodec."""
    names = [("low/0.wav", "low"), ("high/0.wav", "high")]
    if held:
        from datasets import Audio, Dataset, Features, Value

        sounds = [{"bytes": (tones / name).read_bytes(), "path": None} for name, _ in names]
        features = Features({"audio": Audio(sampling_rate=16_000), "label": Value("string")})
        path = str(tones / "a.parquet")
        table = {"audio": sounds, "label": [label for _, label in names]}
        plain = Features({"audio": {"bytes": Value("binary"), "path": Value("string")}, "label": Value("string")})
        Dataset.from_dict(table, plain).cast(features).to_parquet(path)
        assert isinstance(Dataset.from_parquet(path).features["audio"], Audio)
    else:
        path = write("tones/a.csv", [{"audio": name, "label": label} for name, label in names])
    data = AudioFolderData(path, validation_path=path, processor=extractor)
    data.setup()
    batch: dict[str, torch.Tensor] = next(iter(data.val_dataloader()))
    assert batch["labels"].tolist() == [1, 0]
    assert pitches(batch["input_values"]) == [200, 1000]


def test_sounds_that_can_not_be_read_are_named(tones: Path, extractor: str) -> None:
    (tones / "low" / "1.wav").write_bytes(b"")
    (tones / "low" / "2.wav").write_bytes(b"no sound")
    play(tones / "low" / "3.wav", tone(200, 0))
    (told,) = fault(AudioFolderData(str(tones), processor=extractor, validation_fraction=0))
    assert told.startswith(
        f"train: 3 of 10 sounds can't be read: {tones}/low/1.wav (it is empty), {tones}/low/2.wav (Error opening"
    )
    assert told.endswith(f"{tones}/low/3.wav (it is 0 seconds long)")


def test_folders_and_numbers_are_checked(tones: Path, extractor: str) -> None:
    (tones / "low" / "a.mid").write_bytes(b"x")
    assert fault(AudioFolderData(str(tones), processor=extractor)) == [
        f"path: in {tones} 1 file lies (low/a.mid) with an unknown suffix; sounds: "
        ".aif .aiff .au .flac .mp3 .ogg .opus .wav"
    ]
    with pytest.raises(PEFTError) as caught:
        AudioFolderData(str(tones), max_seconds=0, batch_size=0)
    assert list(caught.value.faults) == ["max_seconds: 0 is not above 0", "batch_size: 0 is less than 1"]


def test_place_of_the_processor(tones: Path, tmp_path: Path) -> None:
    from transformers import ViTImageProcessor

    ViTImageProcessor().save_pretrained(str(tmp_path / "image"))
    (told,) = fault(AudioFolderData(str(tones), processor=str(tmp_path / "image")))
    assert told.startswith(f"processor: AutoFeatureExtractor can't load {str(tmp_path / 'image')!r}: ")
