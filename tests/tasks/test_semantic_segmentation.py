from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import PEFT, LoRA, load_from_checkpoint
from lightning_peft.data import SegmentationFolderData
from lightning_peft.methods.errors import PEFTError
from lightning_peft.tasks import SemanticSegmentation
from tests import stand_ins


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(**{"accelerator": "cpu", "devices": 1, "default_root_dir": folder, **quiet, **options})


@pytest.fixture(scope="module")
def segformer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stand_ins.segformer(tmp_path_factory.mktemp("segformer"))


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Red and blue squares on grey, with their masks."""
    return stand_ins.save_squares(tmp_path_factory.mktemp("squares") / "squares")


class Given(nn.Module):
    """Gives the logits of a batch, of shape (batch, classes, h, w), as they are."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values


def rows(*pairs: tuple[Any, Any]) -> DataLoader[Any]:
    """Batches of one image each, from the class that is predicted for each pixel and the right one."""
    logits = [4 * nn.functional.one_hot(torch.tensor(found), 4).permute(2, 0, 1).float() for found, _ in pairs]
    images = zip(logits, pairs, strict=True)
    return DataLoader([{"pixel_values": x, "labels": torch.tensor(right)} for x, (_, right) in images])  # type: ignore[arg-type]


def test_scores_by_hand_are_over_all_images_together(tmp_path: Path) -> None:
    # class 0: 2 of 4 pixels of the union; class 1: 3 of 5; class 2: not there, but said once; class 3: neither
    data = rows(([[0, 0], [1, 1]], [[0, 1], [1, 1]]), ([[0, 1], [2, 0]], [[0, 1], [0, -100]]))
    metrics = ["mean_iou", "per_class_iou", "accuracy", "majority", "per_class_recall"]
    module = SemanticSegmentation(Given(), num_labels=4, label_names=["a", "b", "c", "d"], metrics=metrics)
    (found,) = trainer(tmp_path).test(module, data, verbose=False)
    ious = {"a": 2 / 4, "b": 3 / 4, "c": 0, "d": 0}
    assert found.pop("test_loss") > 0
    assert found == pytest.approx(
        {
            "test_mean_iou": (2 / 4 + 3 / 4 + 0) / 3,
            **{f"test_per_class_iou_{name}": value for name, value in ious.items()},
            "test_accuracy": 5 / 7,
            **{
                f"test_per_class_recall_{name}": value
                for name, value in {"a": 2 / 3, "b": 3 / 4, "c": 0, "d": 0}.items()
            },
        },
        abs=1e-6,
    )


def test_loss_is_the_mean_over_pixels_of_logits_scaled_to_the_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4, 2, 3), torch.randint(0, 4, (3, 8, 6))
    labels[0] = -100
    labels[1, :3] = -100
    pairs = zip(logits, labels, strict=True)
    data = DataLoader([{"pixel_values": x, "labels": y} for x, y in pairs])  # type: ignore[arg-type]
    (found,) = trainer(tmp_path).test(SemanticSegmentation(Given(), num_labels=4), data, verbose=False)
    scaled = nn.functional.interpolate(logits, (8, 6), mode="bilinear").movedim(1, -1)[labels >= 0]
    expected = nn.functional.cross_entropy(scaled, labels[labels >= 0])
    assert found["test_loss"] == pytest.approx(expected.item(), rel=1e-5)
    accuracy = (scaled.argmax(-1) == labels[labels >= 0]).float().mean()
    assert found["test_accuracy"] == pytest.approx(accuracy.item(), rel=1e-6)


def test_lora_learns_the_squares_and_load_from_checkpoint_gives_the_model_back(
    segformer: str, squares: str, tmp_path: Path
) -> None:
    data = SegmentationFolderData(squares, validation_path=squares, batch_size=6)
    module = SemanticSegmentation(segformer, learning_rate=3e-2)
    peft = PEFT(LoRA(target_modules="all-linear"), modules_to_save=["decode_head"])
    loops = trainer(tmp_path, max_epochs=15, check_val_every_n_epoch=15, callbacks=[peft])
    (before,) = trainer(tmp_path).validate(SemanticSegmentation(segformer), data, verbose=False)
    loops.fit(module, data)
    metrics = loops.callback_metrics
    assert metrics["val_loss"] < 0.5 * before["val_loss"]
    assert metrics["val_mean_iou"] > before["val_mean_iou"] + 0.1
    # the checkpoint's own head had two classes
    assert module.model.decode_head.classifier.weight.shape[:2] == (3, 8)
    assert module.model.config.id2label == {0: "ground", 1: "red", 2: "blue"}
    found = torch.cat(loops.predict(module, data))  # type: ignore[arg-type]
    assert (found.dtype, tuple(found.shape)) == (torch.int64, (12, 32, 32))
    labels = torch.cat([batch["labels"] for batch in data.val_dataloader()])
    assert (found == labels).float().mean().item() == pytest.approx(float(metrics["val_accuracy"]))
    loops.save_checkpoint(tmp_path / "a.ckpt")
    again = load_from_checkpoint(SemanticSegmentation, tmp_path / "a.ckpt")
    assert torch.equal(torch.cat(trainer(tmp_path).predict(again, data)), found)  # type: ignore[arg-type]


def test_metrics_that_are_not_known_are_refused() -> None:
    with pytest.raises(PEFTError) as caught:
        SemanticSegmentation("x", metrics=["mean_iu", "top2_accuracy"])
    first, second = caught.value.faults
    assert first == "metrics: there is no 'mean_iu'; did you mean 'mean_iou' or 'per_class_iou'?"
    assert second.startswith("metrics: there is no 'top2_accuracy'; did you mean 'accuracy'")
