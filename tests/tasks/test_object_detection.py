from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import PEFT, LoRA
from lightning_peft.data import DetectionData
from lightning_peft.methods.errors import PEFTError
from lightning_peft.tasks import ObjectDetection, boxes
from lightning_peft.tasks.boxes import BOX_SCORES, MeanAveragePrecision, corners
from tests import stand_ins

HEADS = ["class_labels_classifier", "bbox_predictor"]


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(**{"accelerator": "cpu", "devices": 1, "default_root_dir": folder, **quiet, **options})


@pytest.fixture(scope="module")
def yolos(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stand_ins.yolos(tmp_path_factory.mktemp("yolos"))


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Red and blue squares on grey, with their boxes."""
    return stand_ins.save_squares(tmp_path_factory.mktemp("squares") / "squares") + "/images"


def test_lora_learns_the_squares(yolos: str, squares: str, tmp_path: Path) -> None:
    data = DetectionData(squares, validation_path=squares, batch_size=6)
    module = ObjectDetection(yolos, learning_rate=3e-2, metrics=["map", "map_50", "mar_1", "map_large"])
    (before,) = trainer(tmp_path).validate(ObjectDetection(yolos), data, verbose=False)
    assert sorted(before) == ["val_loss", "val_map"]
    peft = PEFT(LoRA(r=4), modules_to_save=HEADS)
    loops = trainer(tmp_path, max_epochs=20, check_val_every_n_epoch=20, callbacks=[peft])
    loops.fit(module, data)
    metrics = loops.callback_metrics
    assert metrics["val_loss"] < 0.9 * before["val_loss"]
    assert 0 <= metrics["val_map"] <= metrics["val_map_50"]
    assert metrics["val_map_large"].isnan(), "no square is as large as 96 by 96"
    assert module.model.config.id2label == {0: "red", 1: "blue"}

    found = [row for rows in loops.predict(module, data) for row in rows]  # type: ignore[union-attr]
    assert [sorted(row) for row in found] == [["boxes", "labels", "scores"]] * 12
    assert {tuple(row["boxes"].shape) for row in found} == {(4, 4)}
    targets = [target for batch in data.val_dataloader() for target in batch["labels"]]
    metric = MeanAveragePrecision()
    sizes = torch.tensor([30, 40])
    metric.update(found, [{"boxes": corners(t["boxes"], sizes), "labels": t["class_labels"]} for t in targets])
    assert float(metric.compute()["map"]) == pytest.approx(float(metrics["val_map"]), abs=1e-6)


class Given(nn.Module):
    """Gives the boxes and logits of a batch as they are, and as the loss how many boxes the labels have."""

    def forward(self, boxes: torch.Tensor, logits: torch.Tensor, labels: Any = None) -> Any:
        loss = None if labels is None else torch.tensor(float(sum(len(target["boxes"]) for target in labels)))
        return SimpleNamespace(loss=loss, logits=logits, pred_boxes=boxes)


def batch(*found: list[list[float]], labels: list[Any]) -> dict[str, Any]:
    """Images of 40 by 20 pixels, and answers of class 0 that are certain."""
    queries = torch.tensor(found)
    logits = torch.tensor([8.0, 0.0, 0.0]).expand(*queries.shape[:2], 3)
    return {"boxes": queries, "logits": logits, "sizes": torch.tensor([[20, 40]] * len(found)), "labels": labels}


def label(boxes: list[list[float]], **more: Any) -> dict[str, torch.Tensor]:
    return {"boxes": torch.tensor(boxes), "class_labels": torch.zeros(len(boxes), dtype=torch.int64), **more}


LEFT, RIGHT = [0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]


def scores(folder: Path, *batches: dict[str, Any], **options: Any) -> dict[str, float]:
    module = ObjectDetection(Given(), num_labels=2, **options)
    data: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    (found,) = trainer(folder).test(module, data, verbose=False)
    return dict(found)


def test_images_that_fill_up_count_in_nothing(tmp_path: Path) -> None:
    full = batch([LEFT], [RIGHT], labels=[label([LEFT]), label([RIGHT])])
    filled = batch([LEFT], [LEFT], [RIGHT], labels=[label([LEFT, RIGHT]), None, label([RIGHT])])
    alone = batch([LEFT], labels=[None])
    assert scores(tmp_path, full) == {"test_loss": 2, "test_map": 1}
    # three boxes in two images that count, of which one is not found: 67 of the 101 recalls have a precision
    assert scores(tmp_path, filled, alone) == {"test_loss": 3, "test_map": pytest.approx(67 / 101)}
    found = scores(tmp_path, alone)
    assert all(value != value for value in found.values())


def test_crowds_are_kept_from_the_loss_and_known_to_the_metric(tmp_path: Path) -> None:
    crowd = torch.tensor([0, 1])
    with_crowd = batch([LEFT, RIGHT], labels=[label([LEFT, RIGHT], iscrowd=crowd, area=torch.tensor([9.0, 9.0]))])
    found = scores(tmp_path, with_crowd, metrics=["map", "map_small", "map_medium"])
    assert found.pop("test_map_medium") != found["test_map"], "the boxes' area is said to be small"
    assert found == {"test_loss": 1, "test_map": 1, "test_map_small": 1}


def test_answers_are_not_each_sought_among_all_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some hundred thousand answers would take minutes."""

    class Unsought(np.ndarray[Any, Any]):
        def __contains__(self, value: object) -> bool:
            raise AssertionError("all boxes are looked through for one answer")

    rows = boxes._rows
    monkeypatch.setattr(boxes, "_rows", lambda *state: rows(*state).view(Unsought))
    metric = MeanAveragePrecision()
    place = torch.tensor([[0.0, 0.0, 9.0, 9.0]] * 2)
    labels = torch.tensor([0, 7])
    # a class without any box does not count
    found = {"boxes": place, "scores": torch.tensor([0.5, 0.9]), "labels": labels}
    metric.update([found], [{"boxes": place[:1], "labels": labels[:1]}])
    assert float(metric.compute()["map"]) == 1


def test_models_with_a_sigmoid_for_each_class_run_too(squares: str, tmp_path: Path) -> None:
    from transformers import (
        ConditionalDetrConfig,
        ConditionalDetrForObjectDetection,
        ResNetConfig,
        YolosImageProcessorPil,
    )

    backbone = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], out_features=["stage2"])
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5}
    config = ConditionalDetrConfig(backbone_config=backbone, use_timm_backbone=False, num_labels=2, **sizes, **heads)
    YolosImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "processor")
    data = DetectionData(squares, validation_path=squares, batch_size=6, processor=str(tmp_path / "processor"))
    module = ObjectDetection(ConditionalDetrForObjectDetection(config))
    loops = trainer(tmp_path, max_epochs=1)
    loops.fit(module, data)
    assert 0 <= loops.callback_metrics["val_map"] < 0.5
    (first, _) = loops.predict(module, data)  # type: ignore[misc]
    assert {len(found["scores"]) for found in first} == {10}, "five queries, two classes"


def test_metrics_that_are_not_known_are_refused() -> None:
    with pytest.raises(PEFTError) as caught:
        ObjectDetection("x", metrics=["map50", "accuracy"])
    first, second = caught.value.faults
    assert first.startswith("metrics: there is no 'map50'; did you mean 'map_50'")
    assert second == f"metrics: there is no 'accuracy'; the metrics are {', '.join(BOX_SCORES)}"
