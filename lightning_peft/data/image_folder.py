"""Labelled images from a folder, a table or the hub, as batches for a classifier."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lightning_peft.data.file_rows import require
from lightning_peft.data.folders import FolderData, labels_of
from lightning_peft.data.module import Collate

if TYPE_CHECKING:
    from datasets import DatasetDict
    from PIL.Image import Image


class ImageFolderData(FolderData):
    """Images with one label each, resized and normalized by the model's image processor.

    A batch holds `pixel_values`, float32 of shape (batch, 3, height, width), and `labels`, int64 of shape (batch,).
    Images of all kinds are read as RGB and turned as their EXIF data says, when they are needed and in the loaders'
    processes. Every file's header is checked before.

    Args:
        path: a folder with one folder per class, or with folders `train`, `validation` and `test` of these; or a table:
            see `FolderData`.
        image_column: the column of a table that holds the images or their paths.
        **options: see `FolderData`.

    Raises:
        PEFTError: by the constructor, a number is out of its range; by `setup`, data that can't be trained on: a
            missing folder or column, a single or an empty class, an unknown suffix, an image that can't be read.
    """

    kind: ClassVar[str] = "image"
    wanted: ClassVar[tuple[str, str]] = ("images with labels", "folder")
    column_field: ClassVar[str] = "image_column"
    auto_class: ClassVar[str] = "AutoImageProcessor"
    suffixes: ClassVar[tuple[str, ...]] = (
        ".bmp",
        ".gif",
        ".jpeg",
        ".jpg",
        ".pgm",
        ".png",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    )

    def __init__(self, path: str, *, image_column: str = "image", **options: Any) -> None:
        super().__init__(path, file_column=image_column, **options)

    def read_splits(self) -> DatasetDict:
        """The tables, or those of the images in the folders."""
        require("PIL", "vision")
        return super().read_splits()

    def examine(self, file: str | io.BytesIO) -> bool:
        """Raises an error where the file is no image; nothing of it is ever cut."""
        from PIL import Image

        with Image.open(file) as image:
            image.verify()
        return False

    def reader(self) -> Callable[[str | io.BytesIO], Any]:
        """Reads an image in RGB."""
        return read_image

    def collate(self) -> Collate:
        """Pixels and labels of a batch."""
        return partial(_collate, processor=self.processor)


def read_image(file: str | io.BytesIO) -> Image:
    """An image of any kind in RGB, turned as its EXIF data says."""
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            # 16 bits per pixel; a plain conversion would cut all above 255
            upright = upright.point(lambda value: value / 256).convert("L")
        return upright.convert("RGB")


def _collate(rows: list[dict[str, Any]], processor: Any) -> dict[str, torch.Tensor]:
    return {**processor(images=[row["file"] for row in rows], return_tensors="pt"), **labels_of(rows)}
