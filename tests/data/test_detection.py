from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_peft.data import DetectionData
from lightning_peft.methods.errors import PEFTError

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]


@pytest.fixture(scope="session")
def processor(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a processor that scales to a height of 8 pixels and pads what is narrower than its batch."""
    from transformers import DetrImageProcessorPil

    folder = str(tmp_path_factory.mktemp("processor"))
    numbers: dict[str, Any] = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    DetrImageProcessorPil(size={"shortest_edge": 8, "longest_edge": 64}, **numbers).save_pretrained(folder)
    return folder


def coco(folder: Path, annotations: Any, sizes: Any = ((20, 10), (30, 10)), name: str = "a.json", **more: Any) -> str:
    """A COCO file with images of those widths and heights beside it, the first of which is white in its left half."""
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for number, (width, height) in enumerate(sizes):
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[:, : width // 2] = 255
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": 100 + number, "file_name": f"{number}.png", "width": width, "height": height})
    content = {"images": images, "categories": CATEGORIES, "annotations": annotations, **more}
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return str(folder / name)


def box(image: int, category: int, *sides: float, **more: Any) -> dict[str, Any]:
    return {"image_id": 100 + image, "category_id": category, "bbox": list(sides), **more}


TWO = [box(0, 7, 0, 0, 10, 10), box(0, 3, 15, 5, 5.5, 5), box(0, 3, 0, 0, 20, 10, iscrowd=1, area=77.5)]


def fault(data: DetectionData) -> list[str]:
    with pytest.raises(PEFTError) as caught:
        data.setup()
    return list(caught.value.faults)


@pytest.mark.parametrize("workers", [0, 2])
def test_boxes_are_parts_of_their_images_whatever_is_padded(workers: int, tmp_path: Path, processor: str) -> None:
    path = coco(tmp_path, TWO)
    data = DetectionData(path, validation_path=path, processor=processor, num_workers=workers)
    data.prepare_data()
    data.setup()
    # class 0 is the category of the lowest id
    assert (data.class_names, data.num_labels, data.class_counts) == (["dog", "cat"], 2, [2, 1])
    (batch,) = data.val_dataloader()
    assert sorted(batch) == ["labels", "pixel_mask", "pixel_values", "sizes"]
    assert tuple(batch["pixel_values"].shape) == (2, 3, 8, 24)
    assert batch["pixel_mask"][:, 0].sum(dim=1).tolist() == [16, 24]
    assert batch["sizes"].tolist() == [[10, 20], [10, 30]]
    first, second = batch["labels"]
    assert first["boxes"].tolist() == [
        [0.25, 0.5, 0.5, 1.0],
        pytest.approx([0.875, 0.75, 0.25, 0.5]),  # it stood out by half a pixel
        [0.5, 0.5, 1.0, 1.0],
    ]
    assert first["class_labels"].tolist() == [1, 0, 0]
    assert first["area"].tolist() == [100, 27.5, 77.5]
    assert first["iscrowd"].tolist() == [0, 0, 1]
    assert second["boxes"].shape == (0, 4)
    assert {name: (tuple(value.shape), value.dtype) for name, value in second.items() if name != "boxes"} == {
        "class_labels": ((0,), torch.int64),
        "area": ((0,), torch.float32),
        "iscrowd": ((0,), torch.int64),
    }
    # the left half of the first image, which is white, is what its first box says
    assert batch["pixel_values"][0, :, :, :7].min() > 0.9 > 0.1 > batch["pixel_values"][0, :, :, 9:].max()


def test_split_folders_image_folders_and_test_images_without_boxes(tmp_path: Path, processor: str) -> None:
    coco(tmp_path / "a" / "train", TWO)
    # other ids and another order, but the same names
    coco(tmp_path / "a" / "valid", [box(1, 2, 0, 0, 5, 5)], categories=[{"id": 2, "name": "cat"}])
    coco(tmp_path / "a" / "test", None)
    data = DetectionData(str(tmp_path / "a"), processor=processor)
    data.setup()
    (batch,) = data.val_dataloader()
    assert [target["class_labels"].tolist() for target in batch["labels"]] == [[], [1]]
    (batch,) = data.predict_dataloader()
    assert sorted(batch) == ["pixel_mask", "pixel_values", "sizes"]
    with pytest.raises(PEFTError) as caught:
        data.test_dataloader()
    assert str(caught.value) == "test_path: there are no test images with boxes; give some"

    moved = {}
    for split in ("train", "valid", "test"):
        moved[split] = str(tmp_path / f"{split}.json")
        (tmp_path / "a" / split / "a.json").rename(moved[split])
    folders = {
        "image_folder": str(tmp_path / "a" / "train"),
        "validation_image_folder": str(tmp_path / "a" / "valid"),
        "test_image_folder": str(tmp_path / "a" / "test"),
    }
    paths = {"validation_path": moved["valid"], "test_path": moved["test"]}
    data = DetectionData(moved["train"], processor=processor, **paths, **folders)
    data.setup()
    assert data.class_counts == [2, 1]


def test_null_is_as_good_as_nothing(tmp_path: Path, processor: str) -> None:
    path = coco(tmp_path, [box(0, 7, 0, 0, 10, 10, iscrowd=None, area=None)])
    content = json.loads(Path(path).read_text())
    content["images"][1] |= {"width": None, "height": None}
    Path(path).write_text(json.dumps(content))
    data = DetectionData(path, validation_path=path, processor=processor)
    data.setup()
    (batch,) = data.val_dataloader()
    assert (batch["labels"][0]["iscrowd"].tolist(), batch["labels"][0]["area"].tolist()) == ([0], [100])


def test_rows_that_fill_up_do_not_count(tmp_path: Path, processor: str) -> None:
    path = coco(tmp_path, TWO)
    data = DetectionData(path, validation_path=path, processor=processor)
    data.setup()
    data.trainer = SimpleNamespace(world_size=3)  # type: ignore[assignment]
    (batch,) = data.val_dataloader()
    assert [target is None for target in batch["labels"]] == [False, False, True]
    assert len(batch["pixel_values"]) == len(batch["sizes"]) == 3


def test_a_faulty_file_is_told_in_full(tmp_path: Path, processor: str) -> None:
    annotations = [
        box(5, 7, 0, 0, 1, 1),
        box(0, 9, 0, 0, 1, 1),
        box(0, 7, 0, 0, 0, 1),
        {"image_id": 100, "category_id": 7, "bbox": [1, 2, 3]},
        "x",
    ]
    categories = [*CATEGORIES, {"id": 7, "name": "cow"}, {"name": "x"}]
    path = coco(tmp_path, annotations, categories=categories, images=[{"id": 100, "file_name": "0.png"}] * 2 + [{}])
    assert fault(DetectionData(path, processor=processor)) == [
        f"path: {path}: categories of the same id or name as one before: 2 ('cow')",
        f"path: {path}: categories without an integer `id` and a `name`: 3",
        f"path: {path}: images of the same id as one before: 1 (100)",
        f"path: {path}: images without an `id` and a `file_name`: 2",
        f"path: {path}: annotations of an `image_id` that no image has: 0 (105)",
        f"path: {path}: annotations of a `category_id` that no category has: 1 (9)",
        f"path: {path}: annotations whose `bbox` is not left, top, and a width and height above 0: "
        "2 ([0, 0, 0, 1]), 3 ([1, 2, 3])",
        f"path: {path}: annotations that are no object: 4",
    ]


def test_images_that_do_not_fit_their_file(tmp_path: Path, processor: str) -> None:
    outside = [box(0, 7, 15, 0, 10, 5), box(0, 3, -3, 0, 5, 5), box(1, 7, 0, 8, 5, 2.9), box(2, 7, 0, 0, 1, 1)]
    path = coco(tmp_path, outside, sizes=((20, 10), (30, 10), (4, 4), (5, 5)))
    Image.new("RGB", (4, 5)).save(tmp_path / "2.png")
    (tmp_path / "3.png").unlink()
    assert fault(DetectionData(path, processor=processor, validation_fraction=0)) == [
        f"train: 1 of 4 images have a box outside of them: {tmp_path}/0.png ([15, 0, 10, 5], it is 20 x 10)",
        f"train: 1 of 4 images have another size than their file says: {tmp_path}/2.png (4 x 5, the file says 4 x 4)",
        f"train: 1 of 4 images can't be read: {tmp_path}/3.png (there is no such file)",
    ]


def test_files_that_are_none(tmp_path: Path, processor: str) -> None:
    def told(content: str, name: str = "a.json") -> list[str]:
        (tmp_path / name).write_text(content)
        return fault(DetectionData(str(tmp_path / name), processor=processor))

    path = tmp_path / "a.json"
    assert told("{") == [f"path: {path}: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"]
    assert told("[]") == [f"path: {path} is no COCO file: it has no list 'images', 'categories', 'annotations'"]
    assert told('{"images": [], "categories": [], "annotations": []}') == [f"path: {path} has no images"]
    (tmp_path / "b").mkdir()
    expected = f"path: {tmp_path / 'b'} should hold one COCO file beside its images (*.json); it holds "
    assert fault(DetectionData(str(tmp_path / "b"), processor=processor)) == [f"{expected}none"]
    for name in ("x", "y"):
        (tmp_path / "b" / f"{name}.json").write_text("{}")
    assert fault(DetectionData(str(tmp_path / "b"), processor=processor)) == [f"{expected}x.json, y.json"]
    empty = coco(tmp_path / "c", [])
    assert fault(DetectionData(empty, processor=processor)) == ["path: the training images have no boxes at all"]


def test_a_category_that_training_does_not_have(tmp_path: Path, processor: str) -> None:
    train = coco(tmp_path / "a", TWO)
    other = coco(tmp_path / "b", [box(0, 1, 0, 0, 1, 1)], categories=[{"id": 1, "name": "cats"}])
    assert fault(DetectionData(train, validation_path=other, processor=processor)) == [
        "validation: the category 'cats' does not occur in training; did you mean 'cat'?"
    ]
