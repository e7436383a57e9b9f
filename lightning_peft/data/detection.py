"""Images with boxes around things, from COCO's JSON, as batches for object detection."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lightning_peft.data.annotated import IMAGE, AnnotatedImages, read_named, upright_size
from lightning_peft.data.file_rows import SHOWN, listed
from lightning_peft.data.folders import folders_by_split
from lightning_peft.data.module import Collate
from lightning_peft.interchange.locations import resolve
from lightning_peft.methods.errors import PEFTError, suggestion

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_ANNOTATION = ("boxes", "labels", "area", "iscrowd")
_OUTSIDE = 1.0
"""Pixels by which a box may stand out of an image: files hold rounded numbers."""


@dataclass
class _File:
    """What a COCO file holds.

    Attributes:
        categories: the classes' names in the order of their ids.
        columns: those of the table of its images.
        faults: what is wrong with it.
    """

    categories: list[str] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


class DetectionData(AnnotatedImages):
    """Images and the boxes that a COCO file has of them, resized by the model's image processor.

    A batch holds `pixel_values`, float32 of shape (batch, 3, height, width); `pixel_mask`, where the processor makes
    one; `sizes`, int64 of shape (batch, 2), the height and width of each image as it is on disk; and `labels`, a dict
    for each image. In it are `boxes`, float32 of shape (n, 4): centre, width and height as parts of that image, without
    what the processor pads it by; `class_labels`, int64 of shape (n,); `area` in square pixels, float32; and `iscrowd`,
    int64, 1 where a box stands around many things. An image may have no boxes.

    A COCO file is an object with `images` (`id`, `file_name` and, if wanted, `width` and `height`), `annotations`
    (`image_id`, `category_id`, `bbox` as left, top, width and height in pixels, and, if wanted, `area` and `iscrowd`)
    and `categories` (`id`, `name`). What is there if wanted may be null too. Class 0 is the category of the lowest id.
    A test file without `annotations` serves for prediction only. Every image's header is read before training.

    Args:
        path: a COCO file; or a folder with one beside the images, or with folders `train`, `validation` (or `valid`,
            `val`, `dev`) and `test` of these.
        image_folder: where the images of `path` are; by default where the COCO file is.
        validation_image_folder: where those of `validation_path` are.
        test_image_folder: where those of `test_path` are.
        **options: see `AnnotatedImages`; `validation_path` and `test_path` are COCO files or folders too.

    Attributes:
        class_counts: the number of training boxes of each class, by id; known after `setup`.

    Raises:
        PEFTError: by the constructor, a number is out of its range; by `setup`, data that can't be trained on: a file
            of another form, an image that isn't there or has another size, a box without an area or outside of its
            image, a category that training doesn't have.
    """

    annotations: ClassVar[str] = "boxes"
    annotation_column: ClassVar[str] = "boxes"

    def __init__(
        self,
        path: str,
        *,
        image_folder: str | None = None,
        validation_image_folder: str | None = None,
        test_image_folder: str | None = None,
        **options: Any,
    ) -> None:
        self.image_folders = {
            "path": image_folder,
            "validation_path": validation_image_folder,
            "test_path": test_image_folder,
        }
        super().__init__(path, **options)
        self.class_counts: list[int] = []

    def tables(self, place: Path, field: str, split: str) -> tuple[dict[str, Dataset], list[str]]:
        """The images and boxes of each split's file."""
        from datasets import Dataset

        found, faults = folders_by_split(place, field, split, _json_files) if place.is_dir() else ({split: place}, [])
        given = self.image_folders[field]
        tables = {}
        # training first, which says what the classes are
        for name, source in sorted(found.items(), key=lambda item: item[0] != "train"):
            file, told = _file_in(source, field)
            faults += told
            if file is None:
                continue
            folder = Path(resolve(given, field.replace("path", "image_folder"))) if given else file.parent
            held = _read(file, folder, field, name)
            faults += held.faults
            if name == "train":
                self.class_names, self.num_labels = held.categories, len(held.categories)
            else:
                faults += _fitted(held, self.class_names, name)
            tables[name] = Dataset.from_dict(held.columns)
        return tables, faults

    def hold_out(self, splits: DatasetDict) -> None:
        """Validation images, and how many boxes each class has in training."""
        super().hold_out(splits)
        counts = Counter(label for labels in splits["train"]["labels"][:] for label in labels)
        self.class_counts = [counts[label] for label in range(self.num_labels)]
        if not counts:
            raise PEFTError("path: the training images have no boxes at all")

    def faults_of_row(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        """An image of another size than its file says, and boxes outside of it."""
        width, height = upright_size(row[IMAGE])
        told = []
        if row["size"] and row["size"] != [width, height]:
            said = f"{row[IMAGE]} ({width} x {height}, the file says {row['size'][0]} x {row['size'][1]})"
            told.append(("images have another size than their file says", said))
        for left, top, wide, high in row.get("boxes") or ():
            if (
                min(left, top) < -_OUTSIDE
                or left + wide > width + _OUTSIDE
                or top + high > height + _OUTSIDE
                or left >= width
                or top >= height
            ):
                box = f"[{left:g}, {top:g}, {wide:g}, {high:g}]"
                told.append(("images have a box outside of them", f"{row[IMAGE]} ({box}, it is {width} x {height})"))
                break
        return told

    def encode(self, table: Dataset, split: str) -> Any:
        """The table, whose images are read when its rows are."""
        return table.with_transform(_rows)

    def filler(self, row: dict[str, Any]) -> dict[str, Any]:
        """The same image, which does not count."""
        return {**row, "filler": True}

    def collate(self) -> Collate:
        """Pixels and labels of a batch; the labels of an image that does not count are None."""
        return partial(_collate, processor=self.processor)


def _json_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


def _file_in(place: Path, field: str) -> tuple[Path | None, list[str]]:
    """The COCO file that a path means: it itself, or the only one of a folder."""
    if place.is_file():
        return place, []
    found = _json_files(place)
    if len(found) == 1:
        return found[0], []
    what = ", ".join(file.name for file in found[:SHOWN]) or "none"
    return None, [f"{field}: {place} should hold one COCO file beside its images (*.json); it holds {what}"]


def _read(file: Path, folder: Path, field: str, split: str) -> _File:
    """What a COCO file holds; of its faults, the first of each kind with their places."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        return _File(faults=[f"{field}: {file}: {error}"])
    needed = ["images", "categories", *(["annotations"] if split != "test" else [])]
    lists = content if isinstance(content, dict) else {}
    if missing := [name for name in needed if not isinstance(lists.get(name), list)]:
        return _File(faults=[f"{field}: {file} is no COCO file: it has no list {', '.join(map(repr, missing))}"])
    faults: dict[str, list[str]] = {}
    names = _names(lists["categories"], faults)
    index = {key: number for number, key in enumerate(sorted(names))}
    rows = _images(lists["images"], faults)
    boxes = lists.get("annotations")
    for number, annotation in enumerate(boxes or ()):
        if fault := _enter(annotation, rows, index):
            faults.setdefault(fault[0], []).append(f"{number}{fault[1]}")
    told = [f"{field}: {file}: {kind}: {listed(places)}" for kind, places in faults.items()]
    if not rows and not told:
        told.append(f"{field}: {file} has no images")
    columns: dict[str, list[Any]] = {
        IMAGE: [str(folder / row["file_name"]) for row in rows.values()],
        "size": [row["size"] for row in rows.values()],
    }
    if boxes is not None:
        columns |= {name: [row[name] for row in rows.values()] for name in _ANNOTATION}
    return _File(list(dict.fromkeys(name for _, name in sorted(names.items()))), columns, told)


def _names(categories: list[Any], faults: dict[str, list[str]]) -> dict[int, str]:
    """The names of categories by id."""
    names: dict[int, str] = {}
    for number, category in enumerate(categories):
        key, name = (category.get("id"), category.get("name")) if isinstance(category, dict) else (None, None)
        if not isinstance(key, int) or not isinstance(name, str):
            faults.setdefault("categories without an integer `id` and a `name`", []).append(str(number))
        elif key in names or name in names.values():
            faults.setdefault("categories of the same id or name as one before", []).append(f"{number} ({name!r})")
        else:
            names[key] = name
    return names


def _images(images: list[Any], faults: dict[str, list[str]]) -> dict[Any, dict[str, Any]]:
    """A row for each image, by its id, as yet without boxes."""
    rows: dict[Any, dict[str, Any]] = {}
    for number, image in enumerate(images):
        key, name = (image.get("id"), image.get("file_name")) if isinstance(image, dict) else (None, None)
        if not isinstance(key, (int, str)) or not isinstance(name, str):
            faults.setdefault("images without an `id` and a `file_name`", []).append(str(number))
        elif key in rows:
            faults.setdefault("images of the same id as one before", []).append(f"{number} ({key})")
        else:
            sides = [image.get("width"), image.get("height")]
            size = [] if None in sides else sides
            rows[key] = {"file_name": name, "size": size, **{column: [] for column in _ANNOTATION}}
    return rows


def _enter(annotation: Any, rows: Mapping[Any, dict[str, Any]], index: Mapping[Any, int]) -> tuple[str, str] | None:
    """Put a box to its image; or what kind of fault it has, and what to say of it."""
    if not isinstance(annotation, dict):
        return "annotations that are no object", ""
    image, category = annotation.get("image_id"), annotation.get("category_id")
    box: Any = annotation.get("bbox")
    if not isinstance(image, (int, str)) or image not in rows:
        return "annotations of an `image_id` that no image has", f" ({image})"
    if not isinstance(category, int) or category not in index:
        return "annotations of a `category_id` that no category has", f" ({category})"
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(side, (int, float)) for side in box)
    if not numbers or not min(box[2:]) > 0:
        return "annotations whose `bbox` is not left, top, and a width and height above 0", f" ({box})"
    row = rows[image]
    row["boxes"].append([float(side) for side in box])
    row["labels"].append(index[category])
    row["area"].append(float(annotation.get("area") or box[2] * box[3]))
    row["iscrowd"].append(int(annotation.get("iscrowd") or 0))
    return None


def _fitted(held: _File, names: list[str], split: str) -> list[str]:
    """Give the boxes the classes that training has; one fault for each category that it does not have."""
    faults = [
        f"{split}: the category {name!r} does not occur in training{suggestion(name, names)}"
        for name in held.categories
        if name not in names
    ]
    if not faults and "labels" in held.columns:
        index = [names.index(name) for name in held.categories]
        held.columns["labels"] = [[index[label] for label in labels] for labels in held.columns["labels"]]
    return faults


def _rows(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    rows = {IMAGE: [read_named(path) for path in batch[IMAGE]]}
    return rows | {name: batch[name] for name in _ANNOTATION if name in batch}


def _collate(rows: list[dict[str, Any]], processor: Any) -> dict[str, Any]:
    images = [row[IMAGE] for row in rows]
    inputs = dict(processor(images=images, return_tensors="pt"))
    inputs["sizes"] = torch.tensor([[image.height, image.width] for image in images])
    if "boxes" in rows[0]:
        inputs["labels"] = [None if row.get("filler") else _target(row) for row in rows]
    return inputs


def _target(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    """An image's boxes, cut to it, as a model's loss takes them."""
    width, height = row[IMAGE].size
    edges = torch.tensor([width, height, width, height])
    boxes = torch.tensor(row["boxes"], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = torch.minimum(boxes.clamp(min=0), edges) / edges
    return {
        "boxes": torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1),
        "class_labels": torch.tensor(row["labels"], dtype=torch.int64),
        "area": torch.tensor(row["area"], dtype=torch.float32),
        "iscrowd": torch.tensor(row["iscrowd"], dtype=torch.int64),
    }
