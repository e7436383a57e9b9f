from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.classification import multiclass_f1_score

from lightning_peft.data.image_folder import ImageFolderData
from lightning_peft.tasks.image_classification import ImageClassification


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a randomly initialised ViT for 8 by 8 pixels with a head for five classes, and its processor."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = str(tmp_path_factory.mktemp("tiny_vit"))
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        initializer_range=0.2,
        num_labels=5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture
def squares(tmp_path: Path) -> str:
    """16 reddish images, 12 greenish ones and 8 bluish ones, none like another."""
    draw = np.random.default_rng(0)
    for channel, (name, count) in enumerate((("red", 16), ("green", 12), ("blue", 8))):
        (tmp_path / "squares" / name).mkdir(parents=True)
        for number in range(count):
            pixels = draw.integers(0, 120, (9, 7, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(tmp_path / "squares" / name / f"{number:02}.png")
    return str(tmp_path / "squares")


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(**{"accelerator": "cpu", "devices": 1, "default_root_dir": folder, **quiet, **options})


def test_fit_learns_the_colours_and_load_from_checkpoint_gives_the_model_back(
    tiny_vit: str, squares: str, tmp_path: Path
) -> None:
    module = ImageClassification(tiny_vit, learning_rate=1e-2)
    loops = trainer(tmp_path, max_epochs=8)
    rows = ImageFolderData(squares, validation_path=squares, batch_size=8)
    (before,) = trainer(tmp_path).validate(module, rows, verbose=False)
    loops.fit(module, rows)
    metrics = loops.callback_metrics
    assert metrics["val_loss"] < 0.2 * before["val_loss"]
    assert metrics["val_accuracy"] == 1
    assert metrics["val_macro_f1"] == 1
    assert float(metrics["val_majority"]) == pytest.approx(16 / 36)

    # the checkpoint's own head had five classes
    assert module.model.classifier.weight.shape == (3, 16)
    assert module.model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    loops.save_checkpoint(tmp_path / "model.ckpt")
    again = ImageClassification.load_from_checkpoint(tmp_path / "model.ckpt")
    probabilities = torch.cat(loops.predict(module, rows))  # type: ignore[arg-type]
    assert torch.equal(torch.cat(trainer(tmp_path).predict(again.eval(), rows)), probabilities)  # type: ignore[arg-type]
    assert probabilities.argmax(dim=1).tolist() == [0] * 8 + [1] * 12 + [2] * 16


def test_head_of_the_checkpoint_is_kept_where_it_fits(tiny_vit: str) -> None:
    from transformers import ViTForImageClassification

    stored = ViTForImageClassification.from_pretrained(tiny_vit).state_dict()
    for classes in (5, 2):
        module = ImageClassification(tiny_vit, num_labels=classes)
        module.configure_model()
        assert module.model.classifier.weight.shape == (classes, 16)
        found = module.model.state_dict()
        assert found.keys() == stored.keys()
        changed = {name for name, value in found.items() if not torch.equal(value, stored[name])}
        assert changed == (set() if classes == 5 else {"classifier.weight", "classifier.bias"})


def test_metrics_equal_those_of_the_logits(tiny_vit: str, squares: str, tmp_path: Path) -> None:
    module = ImageClassification(tiny_vit)
    data = ImageFolderData(squares, test_path=squares, batch_size=5)
    (found,) = trainer(tmp_path).test(module, data, verbose=False)
    batches: list[dict[str, torch.Tensor]] = list(data.test_dataloader())
    with torch.no_grad():
        logits = torch.cat([module.model(pixel_values=batch["pixel_values"]).logits for batch in batches])
    truth = torch.cat([batch["labels"] for batch in batches])
    assert found == {
        "test_loss": pytest.approx(torch.nn.functional.cross_entropy(logits, truth).item(), rel=1e-5),
        "test_accuracy": pytest.approx((logits.argmax(1) == truth).float().mean().item(), rel=1e-6),
        "test_macro_f1": pytest.approx(multiclass_f1_score(logits, truth, 3).item(), rel=1e-6),
        "test_majority": pytest.approx(16 / 36, rel=1e-6),
    }
