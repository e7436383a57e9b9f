"""Scores of boxes, beside pycocotools and cases that are computed by hand."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft.methods.errors import PEFTError
from lightning_peft.tasks.boxes import BOX_SCORES, MOST, MeanAveragePrecision, best_boxes, corners
from tests.processes import run_ranks

Images = list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]


def generated(count: int, classes: int = 3) -> Images:
    """Images with up to four boxes, some of them crowds, and with answers near them or anywhere."""
    draw = torch.Generator().manual_seed(0)
    images = []
    for _ in range(count):
        right, wrong = int(torch.randint(0, 5, (), generator=draw)), int(torch.randint(0, 4, (), generator=draw))
        corner = torch.rand(right, 2, generator=draw) * 200
        truth = torch.cat([corner, corner + torch.rand(right, 2, generator=draw) * 150 + 4], 1)
        anywhere = torch.rand(wrong, 4, generator=draw) * 100
        anywhere[:, 2:] += anywhere[:, :2]
        boxes = torch.cat([truth + torch.randn(right, 4, generator=draw) * 6, anywhere])
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        labels = torch.randint(0, classes, (right,), generator=draw)
        # a class beside those that there are is named too
        other = torch.randint(0, classes + 1, (wrong,), generator=draw)
        found = {
            "boxes": boxes,
            "scores": torch.rand(right + wrong, generator=draw),
            "labels": torch.cat([labels, other]),
        }
        crowd = (torch.rand(right, generator=draw) < 0.1).long()
        area = (truth[:, 2:] - truth[:, :2]).prod(1) * torch.rand(right, generator=draw)
        images.append((found, {"boxes": truth, "labels": labels, "iscrowd": crowd, "area": area}))
    return images


def scores(images: Images, names: Any = BOX_SCORES, at_once: int = 7) -> dict[str, float]:
    metric = MeanAveragePrecision(names)
    for start in range(0, len(images), at_once):
        found, truth = zip(*images[start : start + at_once], strict=True)
        metric.update(found, truth)
    return {name: float(value) for name, value in metric.compute().items()}


def sides(box: list[float]) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def test_scores_are_those_of_pycocotools() -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images = generated(60)
    annotations: list[Any] = []
    answers: list[Any] = []
    for number, (found, truth) in enumerate(images):
        for box, label, crowd, area in zip(*(truth[n].tolist() for n in ("boxes", "labels", "iscrowd", "area"))):  # noqa: B905
            row = {"image_id": number, "category_id": label, "iscrowd": crowd, "area": area, "bbox": sides(box)}
            annotations.append({"id": len(annotations) + 1, **row})
        for box, label, score in zip(*(found[n].tolist() for n in ("boxes", "labels", "scores"))):  # noqa: B905
            answers.append({"image_id": number, "category_id": label, "score": score, "bbox": sides(box)})
    with contextlib.redirect_stdout(io.StringIO()):
        right = COCO()
        right.dataset = {
            "images": [{"id": number} for number in range(60)],
            "categories": [{"id": label} for label in range(4)],
            "annotations": annotations,
        }
        right.createIndex()
        evaluation = COCOeval(right, right.loadRes(answers), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    found = scores(images)
    assert list(found) == list(BOX_SCORES)
    assert list(found.values()) == pytest.approx(evaluation.stats.tolist(), abs=1e-6)
    assert 0.1 < found["map"] < 0.9


def image(boxes: list[list[float]], labels: list[int], given: list[float] | None = None) -> dict[str, torch.Tensor]:
    made = {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": torch.tensor(labels).long()}
    return made if given is None else {**made, "scores": torch.tensor(given)}


A, B, FAR = [0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0], [50.0, 50.0, 60.0, 60.0]


@pytest.mark.parametrize(
    ("found", "truth", "expected"),
    [
        # all right
        (image([A, B], [0, 0], [0.9, 0.8]), image([A, B], [0, 0]), {"map": 1, "map_50": 1, "mar_1": 0.5, "mar_10": 1}),
        # one of two is found: 51 of the 101 recalls, from 0 to 0.5, have a precision of 1
        (image([A], [0], [0.9]), image([A, B], [0, 0]), {"map": 51 / 101, "mar_100": 0.5}),
        # the best answer is wrong, so that the precision is a half at every recall
        (image([FAR, A], [0, 0], [0.9, 0.8]), image([A], [0]), {"map": 0.5, "mar_1": 0, "mar_10": 1}),
        # 8 of 10 columns: an overlap of 0.8 is enough for seven of the ten thresholds
        (image([[0, 0, 8, 10]], [0], [1.0]), image([A], [0]), {"map": 0.7, "map_50": 1, "map_75": 1, "mar_100": 0.7}),
        # another class, and none at all
        (image([A], [1], [0.9]), image([A], [0]), {"map": 0, "mar_100": 0}),
        (image([], [], []), image([A], [0]), {"map": 0, "mar_100": 0}),
        # the mean over classes, of which one has no box and doesn't count
        (image([A, B, FAR], [0, 1, 2], [0.9, 0.8, 0.7]), image([A, A], [0, 1]), {"map": 0.5}),
        # what is within a crowd is not wrong
        (
            image([A, B], [0, 0], [0.8, 0.9]),
            {**image([A, [18, 0, 32, 12]], [0, 0]), "iscrowd": torch.tensor([0, 1])},
            {"map": 1, "mar_100": 1},
        ),
        # sizes are told by `area`, where it is given
        (
            image([A, B], [0, 0], [0.9, 0.8]),
            {**image([A, B], [0, 0]), "area": torch.tensor([100.0, 5000.0])},
            {"map_small": 1, "map_medium": 1, "map_large": math.nan, "mar_large": math.nan},
        ),
        (image([A], [0], [0.9]), image([], []), {"map": math.nan, "mar_1": math.nan}),
    ],
)
def test_scores_by_hand(found: Any, truth: Any, expected: dict[str, float]) -> None:
    assert scores([(found, truth)], tuple(expected)) == pytest.approx(expected, nan_ok=True)


def test_nothing_was_entered() -> None:
    metric = MeanAveragePrecision(["map", "mar_1"])
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert all(value.isnan() for value in metric.compute().values())
    metric.update([], [])
    assert metric.compute()["map"].isnan()


def test_an_image_counts_against_the_boxes_of_its_own() -> None:
    """The right boxes on the wrong images are wrong; `reset` begins anew."""
    swapped = [(image([A], [0], [0.9]), image([B], [0])), (image([B], [0], [0.9]), image([A], [0]))]
    assert scores(swapped, ["map"], at_once=1)["map"] == scores(swapped, ["map"], at_once=2)["map"] == 0
    metric = MeanAveragePrecision()
    metric.update(*zip(*swapped, strict=True))
    metric.reset()
    metric.update([image([A], [0], [0.9])], [image([A], [0])])
    assert float(metric.compute()["map"]) == 1


def test_softmax_with_no_object_or_sigmoid_of_each_class() -> None:
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.5, 0.2]]])
    sizes = torch.tensor([[100, 200]])
    logits = torch.tensor([[[1.0, 0.0, 3.0], [0.0, 2.0, 0.0]]])
    (found,) = best_boxes(logits, boxes, sizes, 2)
    assert found["labels"].tolist() == [1, 0]
    assert found["scores"].tolist() == pytest.approx(
        [math.exp(2) / (2 + math.exp(2)), math.e / (math.e + 1 + math.e**3)]
    )
    assert found["boxes"].tolist() == [pytest.approx([0, 40, 100, 60], abs=1e-4), [0, 0, 200, 100]]
    # three classes, none of them for no object: one query gives a box of each
    (found,) = best_boxes(logits, boxes, sizes, 3)
    assert found["labels"].tolist()[:3] == [2, 1, 0]
    assert found["scores"].tolist()[:3] == pytest.approx([1 / (1 + math.exp(-x)) for x in (3, 2, 1)])
    assert found["boxes"].tolist()[1] == pytest.approx([0, 40, 100, 60], abs=1e-4)
    assert len(found["boxes"]) == 6
    (found,) = best_boxes(torch.randn(1, 70, 3), torch.rand(1, 70, 4), sizes, 3)
    assert len(found["scores"]) == MOST == 100
    assert found["scores"].diff().max() <= 0


def test_corners() -> None:
    box = torch.tensor([[0.5, 0.25, 0.2, 0.5]])
    assert corners(box, torch.tensor([40, 10])).tolist() == [pytest.approx([4, 0, 6, 20])]


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    hidden = "faster_coco_eval"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == hidden else find(name, *more))
    with pytest.raises(PEFTError) as caught:
        MeanAveragePrecision(["map_50"])
    told = "map_50: this metric needs the package 'faster-coco-eval'; pip install 'lightning-peft[vision]'"
    assert str(caught.value) == told


PROGRAM = """
import os, sys, torch
from tests.tasks.test_boxes import generated, MeanAveragePrecision, BOX_SCORES
rank = int(os.environ["LOCAL_RANK"])
torch.distributed.init_process_group("gloo", rank=rank, world_size=3)
images = generated(30)
metric = MeanAveragePrecision(BOX_SCORES)
# the first rank has two thirds of the images, the second the others, the third none at all
for image in (images[:20], images[20:], [])[rank]:
    metric.update([image[0]], [image[1]])
found = metric.compute()
assert len(metric.found) == (20, 10, 0)[rank], "each rank has its own boxes again"
torch.save(found, f"{sys.argv[1]}/{rank}.pt")
"""


@pytest.mark.xdist_group("devices")
@pytest.mark.slow
def test_ranks_with_images_of_differing_number_or_none(tmp_path: Path) -> None:
    run_ranks(tmp_path / "ranks", ["-c", PROGRAM, tmp_path], count=3)
    expected = scores(generated(30))
    for rank in range(3):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert {name: float(value) for name, value in found.items()} == pytest.approx(expected, abs=1e-6)
