from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import soundfile
import torch
from torchmetrics.functional.classification import multiclass_f1_score

from lightning_peft.data.audio_folder import AudioFolderData
from lightning_peft.tasks.speech_classification import SpeechClassification

RATE = 4000


@pytest.fixture(scope="module")
def tiny_wav2vec2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a randomly initialised wav2vec 2.0 for 4,000 samples per second, and its feature extractor."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    folder = str(tmp_path_factory.mktemp("tiny_wav2vec2"))
    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16, 16),
        conv_kernel=(20, 4),
        conv_stride=(10, 2),
        feat_extract_norm="layer",
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        layerdrop=0.0,
        classifier_proj_size=16,
        vocab_size=4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Wav2Vec2Model(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True).save_pretrained(folder)
    return folder


@pytest.fixture
def tones(tmp_path: Path) -> str:
    """20 low tones and 12 high ones, of 0.1 to 0.2 seconds, at another rate than the model's."""
    draw = np.random.default_rng(0)
    for name, pitch, count in (("low", 150, 20), ("high", 900, 12)):
        (tmp_path / "tones" / name).mkdir(parents=True)
        for number in range(count):
            times = np.arange(round(draw.uniform(0.1, 0.2) * 2 * RATE)) / (2 * RATE)
            wave = 0.5 * np.sin(2 * np.pi * (pitch * times + draw.random()))
            soundfile.write(tmp_path / "tones" / name / f"{number:02}.wav", wave, 2 * RATE)
    return str(tmp_path / "tones")


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(**{"accelerator": "cpu", "devices": 1, "default_root_dir": folder, **quiet, **options})


def test_fit_learns_the_pitches_and_load_from_checkpoint_gives_the_model_back(
    tiny_wav2vec2: str, tones: str, tmp_path: Path
) -> None:
    module = SpeechClassification(tiny_wav2vec2, learning_rate=1e-2)
    loops = trainer(tmp_path, max_epochs=10)
    rows = AudioFolderData(tones, validation_path=tones, batch_size=8)
    (before,) = trainer(tmp_path).validate(module, rows, verbose=False)
    loops.fit(module, rows)
    metrics = loops.callback_metrics
    assert metrics["val_loss"] < 0.2 * before["val_loss"]
    assert metrics["val_accuracy"] == 1
    assert metrics["val_macro_f1"] == 1
    assert float(metrics["val_majority"]) == pytest.approx(20 / 32)

    assert module.model.config.id2label == {0: "high", 1: "low"}
    loops.save_checkpoint(tmp_path / "model.ckpt")
    again = SpeechClassification.load_from_checkpoint(tmp_path / "model.ckpt")
    probabilities = torch.cat(loops.predict(module, rows))  # type: ignore[arg-type]
    assert torch.equal(torch.cat(trainer(tmp_path).predict(again.eval(), rows)), probabilities)  # type: ignore[arg-type]
    assert probabilities.argmax(dim=1).tolist() == [0] * 12 + [1] * 20


def test_metrics_equal_those_of_the_logits(tiny_wav2vec2: str, tones: str, tmp_path: Path) -> None:
    module = SpeechClassification(tiny_wav2vec2)
    data = AudioFolderData(tones, test_path=tones, batch_size=5, max_seconds=0.15)
    (found,) = trainer(tmp_path).test(module, data, verbose=False)
    batches: list[dict[str, torch.Tensor]] = list(data.test_dataloader())
    module.eval()
    truth = torch.cat([batch.pop("labels") for batch in batches])
    with torch.no_grad():
        logits = torch.cat([module.model(**batch).logits for batch in batches])
    assert found == {
        "test_loss": pytest.approx(torch.nn.functional.cross_entropy(logits, truth).item(), rel=1e-5),
        "test_accuracy": pytest.approx((logits.argmax(1) == truth).float().mean().item(), rel=1e-6),
        "test_macro_f1": pytest.approx(multiclass_f1_score(logits, truth, 2).item(), rel=1e-6),
        "test_majority": pytest.approx(20 / 32, rel=1e-6),
    }
