"""Adapters on images and sounds: each method learns to tell two classes apart from a frozen random backbone."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_peft import PEFT, BitFit, DiffPruning, Houlsby, LoRA, Method, ParallelAdapter, Pfeiffer
from lightning_peft.data import AudioFolderData, ImageFolderData
from lightning_peft.tasks import ImageClassification, SpeechClassification
from tests import stand_ins

pytestmark = pytest.mark.usefixtures("datasets_cache")
CONVOLUTIONS = r".*\.layer\.\d\.convolution"


def resnet(folder: Path) -> str:
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetModel

    ConvNextImageProcessor(size={"shortest_edge": 16}, crop_pct=1.0).save_pretrained(folder)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ResNetModel(config).save_pretrained(folder)
    return str(folder)


def accuracy(module: L.LightningModule, data: L.LightningDataModule, method: Method, folder: Path) -> float:
    """On the training rows, after twenty epochs through the callback."""
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    options = {"max_epochs": 20, "accelerator": "cpu", "devices": 1, "default_root_dir": folder, **quiet}
    trainer = L.Trainer(callbacks=[PEFT(method, modules_to_save=["classifier"])], **options)  # type: ignore[arg-type]
    trainer.fit(module, data)
    return float(trainer.callback_metrics["val_accuracy"])


@pytest.mark.parametrize(
    "method",
    [
        LoRA(target_modules=CONVOLUTIONS),
        BitFit(),
        Houlsby(target_modules=CONVOLUTIONS, reduction=4),
        Pfeiffer(target_modules=CONVOLUTIONS, reduction=4),
        ParallelAdapter(target_modules=r".*stages\.0.*\.layer\.0\.convolution", reduction=4),
        DiffPruning(target=0.05),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_convolutional_network(method: Method, tmp_path: Path) -> None:
    images = stand_ins.save_images(tmp_path / "images")
    (tmp_path / "model").mkdir()
    data = ImageFolderData(images, validation_path=images, batch_size=6)
    module = ImageClassification(resnet(tmp_path / "model"), learning_rate=1e-2)
    assert accuracy(module, data, method, tmp_path) == 1


@pytest.mark.parametrize(
    "method",
    [LoRA(), BitFit(), Houlsby(), Pfeiffer(), ParallelAdapter(), DiffPruning(target=0.05)],
    ids=lambda method: type(method).__name__,
)
def test_a_vision_transformer(method: Method, tmp_path: Path) -> None:
    images = stand_ins.save_images(tmp_path / "images")
    (tmp_path / "model").mkdir()
    data = ImageFolderData(images, validation_path=images, batch_size=6)
    module = ImageClassification(stand_ins.vit(tmp_path / "model"), learning_rate=1e-2)
    assert accuracy(module, data, method, tmp_path) == 1


def test_lora_on_a_speech_encoder(tmp_path: Path) -> None:
    tones = stand_ins.save_tones(tmp_path / "tones")
    (tmp_path / "model").mkdir()
    data = AudioFolderData(tones, validation_path=tones, batch_size=6)
    module = SpeechClassification(stand_ins.wav2vec2(tmp_path / "model"), learning_rate=1e-2)
    assert accuracy(module, data, LoRA(), tmp_path) == 1
