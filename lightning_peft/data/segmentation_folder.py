"""Images with masks that say the class of each pixel, from a folder, as batches for semantic segmentation."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from lightning_peft.data.annotated import IMAGE, AnnotatedImages, read_named, upright_size
from lightning_peft.data.file_rows import listed, reason_of
from lightning_peft.data.files import SPLITS
from lightning_peft.data.folders import by_split, counted_in, files_in, folders_by_split, subfolders
from lightning_peft.data.image_folder import ImageFolderData
from lightning_peft.data.labels import IGNORED
from lightning_peft.data.module import Collate
from lightning_peft.interchange.locations import resolve
from lightning_peft.methods.errors import PEFTError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

MASK = "mask"
"""The column of the masks' paths."""
CLASSES = "classes.txt"
MOST = 256
"""Values of a pixel of eight bits."""


class SegmentationFolderData(AnnotatedImages):
    """Images and masks of the same names, resized alike by the model's image processor.

    A batch holds `pixel_values`, float32 of shape (batch, 3, height, width), and `labels`, int64 of shape (batch,
    height, width), where -100 marks what is left out. A mask is an image with one value of eight bits for each pixel,
    the id of its class from 0: grey, or of a palette whose colours don't matter. All masks are read before training.

    Args:
        path: a folder with the folders `images` and `masks`, which may both have folders `train`, `validation` (or
            `valid`, `val`, `dev`) and `test`; or a folder with folders of these names, which have `images` and `masks`
            each. `a/b.jpg` in one goes with `a/b.png` in the other. Test images without any mask serve for prediction
            only.
        classes: the classes' names by id, or a file with one on each line; by default the file `classes.txt` in `path`,
            else the numbers that the training masks hold, up to the highest.
        ignore_index: the value of a pixel of no class.
        **options: see `AnnotatedImages`; `validation_path` and `test_path` are folders with `images` and `masks` too.

    Attributes:
        class_counts: the number of training pixels of each class, by id; known after `setup`.

    Raises:
        PEFTError: by the constructor, a number is out of its range; by `setup`, data that can't be trained on: a mask
            without an image or the other way round, of another size or with values that are no class; files that can't
            be read; fewer than two classes; `images` with some folders of splits, but without `train`.
    """

    annotations: ClassVar[str] = "masks"
    annotation_column: ClassVar[str] = MASK

    def __init__(
        self, path: str, *, classes: str | Sequence[str] | None = None, ignore_index: int = 255, **options: Any
    ) -> None:
        self.classes, self.ignore_index = classes, ignore_index
        super().__init__(path, **options)
        self.class_counts: list[int] = []
        self._counted: dict[str, np.ndarray[Any, np.dtype[np.int64]]] = {}

    def faults(self) -> list[str]:
        """What is wrong with the arguments."""
        outside = not 0 <= self.ignore_index < MOST
        told = [f"ignore_index: {self.ignore_index} is not between 0 and {MOST - 1}"] if outside else []
        return told + super().faults()

    def tables(self, place: Path, field: str, split: str) -> tuple[dict[str, Dataset], list[str]]:
        """The images and masks of each split's folder."""
        from datasets import Dataset

        if not place.is_dir():
            return {}, [f"{field}: {place} is no folder; one with `images` and `masks` is needed"]
        found, faults = _places(place, field, split)
        tables = {}
        for name, (images, masks) in found.items():
            columns, told = _pairs(images, masks, field, name)
            tables[name] = Dataset.from_dict(columns)
            faults += told
        return tables, faults

    def hold_out(self, splits: DatasetDict) -> None:
        """Validation images, and the classes' names."""
        super().hold_out(splits)
        self._counted = {}
        self.class_names = self._names()
        self.num_labels = len(self.class_names)

    def row_faults(self, tables: Mapping[str, Dataset]) -> list[str]:
        """Masks and images that don't fit each other or the classes."""
        faults = super().row_faults(tables)
        counts = np.zeros(MOST, np.int64)
        for path in tables["train"][MASK][:]:
            counts += self._counted.get(path, 0)
        counts[self.ignore_index] = 0
        if not self.class_names:
            highest = int(counts.nonzero()[0].max(initial=-1))
            self.class_names = [str(number) for number in range(highest + 1)]
            self.num_labels = len(self.class_names)
            faults += self._unknown({split: table for split, table in tables.items() if split != "train"})
        else:
            faults += self._unknown(tables)
        if self.num_labels < 2:
            faults.append(f"classes: the training masks hold {self.num_labels} class; two or more are needed")
        self.class_counts = counts[: self.num_labels].tolist()
        return faults

    def faults_of_row(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        """A mask of another size or with values of another kind; its values are counted."""
        width, height = upright_size(row[IMAGE])
        if MASK not in row:
            return []
        try:
            mask = _read_mask(row[MASK])
        except Exception as error:  # the libraries that decode files raise errors of many kinds
            return [("masks can't be read", f"{row[MASK]} ({reason_of(error)})")]
        self._counted[row[MASK]] = np.bincount(mask.ravel(), minlength=MOST)
        if mask.shape == (height, width):
            return []
        found = f"{row[MASK]} ({mask.shape[1]} x {mask.shape[0]}, the image {width} x {height})"
        return [("masks have another size than their image", found)]

    def load_processor(self, source: str) -> None:
        """Load the processor.

        Raises:
            PEFTError: there is none, or it makes no inputs for segmentation.
        """
        super().load_processor(source)
        if "segmentation_maps" not in inspect.signature(self.processor.preprocess).parameters:
            name = type(self.processor).__name__
            raise PEFTError(f"processor: {name} of {source!r} takes no masks; give one for semantic segmentation")
        # some would take 0 for no class, and the others for one less
        if hasattr(self.processor, "do_reduce_labels"):
            self.processor.do_reduce_labels = False

    def encode(self, table: Dataset, split: str) -> Any:
        """The table, whose files are read when its rows are."""
        return table.with_transform(_rows)

    def filler(self, row: dict[str, Any]) -> dict[str, Any]:
        """The same image, none of whose pixels counts."""
        return {**row, MASK: np.full_like(row[MASK], self.ignore_index)}

    def collate(self) -> Collate:
        """Pixels and labels of a batch."""
        return partial(_collate, processor=self.processor, ignored=self.ignore_index)

    def _names(self) -> list[str]:
        """The classes' names that are given; empty where none are."""
        given = self.classes
        if given is None:
            file = Path(resolve(self.path, "path")) / CLASSES
            return _lines(file) if file.is_file() else []
        if not isinstance(given, str):
            return list(given)
        if not Path(given).is_file():
            raise PEFTError(f"classes: there is no file {given!r}; give one with a name on each line, or a list")
        return _lines(Path(given))

    def _unknown(self, tables: Mapping[str, Dataset]) -> list[str]:
        """One fault for each split whose masks hold values that are no class."""
        faults = []
        for split, table in tables.items():
            told = []
            for path in table[MASK][:] if MASK in table.column_names else ():
                values = self._counted.get(path, np.zeros(0)).nonzero()[0]
                odd = [str(value) for value in values if value >= self.num_labels and value != self.ignore_index]
                if odd:
                    told.append(f"{path} ({listed(odd)})")
            if told:
                faults.append(
                    f"{split}: {len(told):,} of {len(table):,} masks hold values that are no class: {listed(told)}; "
                    f"there are {self.num_labels} classes, from 0, and {self.ignore_index} for what is left out"
                )
        return faults


def _places(place: Path, field: str, split: str) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
    """The folders of each split's images and masks, and what is wrong; splits are in `place` or in both folders."""
    images, masks = place / "images", place / "masks"
    inside = [subfolders(top) if top.is_dir() else [] for top in (images, masks)]
    found, faults = folders_by_split(place, field, split)
    if place not in found.values() or not any(entry.name.lower() in SPLITS for entry in inside[0]):
        return {name: (folder / "images", folder / "masks") for name, folder in found.items()}, faults
    (pictures, faults), (answers, told) = (by_split(entries, field) for entries in inside)
    faults += told
    if split == "train" and "train" not in pictures:
        faults.append(f"{field}: {images} has folders of splits, but none of them is `train`")
    for top in (images, masks):
        if loose := list(_by_name(top, "*").values()):
            faults.append(f"{field}: in {top} {counted_in(loose, top)} beside the folders of the splits")
    names = [*pictures, *(name for name in answers if name not in pictures)]
    return {name: (pictures.get(name, images / name), answers.get(name, masks / name)) for name in names}, faults


def _pairs(pictures: Path, answers: Path, field: str, split: str) -> tuple[dict[str, list[str]], list[str]]:
    """The columns of images and masks of the same names, and what is wrong."""
    images, masks = _by_name(pictures), _by_name(answers)
    if not images:
        return {IMAGE: []}, [f"{field}: {pictures} holds no image"]
    if split == "test" and not masks:
        return {IMAGE: [str(images[name]) for name in images]}, []
    faults = []
    for held, others, words in ((images, masks, "image has no mask"), (masks, images, "mask has no image")):
        if lone := [str(held[name]) for name in held if name not in others]:
            many = words.replace("image has", "images have").replace("mask has", "masks have")
            counted = f"{len(lone):,} {words if len(lone) == 1 else many}"
            faults.append(f"{field}: {counted} of the same name: {listed(lone)}")
    both = [name for name in images if name in masks]
    return {IMAGE: [str(images[name]) for name in both], MASK: [str(masks[name]) for name in both]}, faults


def _by_name(folder: Path, pattern: str = "**/*") -> dict[str, Path]:
    """The images in a folder, by default at any depth, by their names without a suffix."""
    files = files_in(folder, pattern) if folder.is_dir() else []
    known = [file for file in files if file.suffix.lower() in ImageFolderData.suffixes]
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in known}


def _read_mask(path: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The values of a mask, uint8 of shape (height, width)."""
    from PIL import Image

    with Image.open(path) as image:
        if image.mode not in ("1", "L", "P"):
            raise ValueError(f"its pixels are {image.mode}, not one value of eight bits")
        return np.asarray(image).astype(np.uint8)


def _rows(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    rows = {IMAGE: [read_named(path) for path in batch[IMAGE]]}
    return rows if MASK not in batch else {**rows, MASK: [_read_mask(path) for path in batch[MASK]]}


def _collate(rows: list[dict[str, Any]], processor: Any, ignored: int) -> dict[str, torch.Tensor]:
    masks = {"segmentation_maps": [row[MASK] for row in rows]} if MASK in rows[0] else {}
    inputs = dict(processor(images=[row[IMAGE] for row in rows], **masks, return_tensors="pt"))
    if "labels" in inputs:
        labels = torch.as_tensor(inputs["labels"]).long()
        inputs["labels"] = labels.masked_fill(labels == ignored, IGNORED)
    return inputs


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
