"""Images with annotations of their own: what is in which part of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch.utils.data import DataLoader

from lightning_peft.data.file_rows import listed, load_processor, reason_of, require
from lightning_peft.data.files import require_datasets
from lightning_peft.data.image_folder import read_image
from lightning_peft.data.module import TableData
from lightning_peft.data.tokenizing import source_of
from lightning_peft.interchange.locations import resolve
from lightning_peft.methods.errors import PEFTError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

IMAGE = "image"
"""The column of the images' paths."""


class AnnotatedImages(TableData):
    """Images on disk, each with an annotation.

    Test images without annotations serve for prediction only.

    Args:
        path: see the kind of data.
        processor: what makes the model's inputs: a hub id, a folder or `package:NAME/folder`; by default that of the
            module's `model`.
        **options: see `TableData`.

    Attributes:
        class_names: the classes' names, by id; known after `setup`, as is the next.
        num_labels: how many classes there are.
    """

    annotations: ClassVar[str]
    """What an annotation is, in the plural: `masks` or `boxes`."""
    annotation_column: ClassVar[str]
    """The column of a table that only annotated images have."""

    def __init__(self, path: str, *, processor: str | None = None, **options: Any) -> None:
        self.processor_name = processor
        super().__init__(path, **options)
        self.processor: Any = None
        self.class_names: list[str] = []
        self.num_labels = 0
        self._annotated: set[str] = set()

    @abstractmethod
    def tables(self, place: Path, field: str, split: str) -> tuple[dict[str, Dataset], list[str]]:
        """The splits that a place holds, of which a single one is called `split`, and what is wrong with them.

        Args:
            place: a file or folder that is there.
            field: the name of the field that says where it is, for the error messages.
            split: `train`, `validation` or `test`. A table has the column `IMAGE` of paths.
        """

    @abstractmethod
    def faults_of_row(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        """What is wrong with an annotated image, each as the kind of fault and the words that name this one.

        Any error that it raises means that the image can't be read.
        """

    def prepare_data(self) -> None:
        """Nothing: the files are read where they lie."""

    def load_processor(self, source: str) -> None:
        """Load the processor."""
        self.processor = load_processor("AutoImageProcessor", source)

    def processor_source(self) -> str:
        """What to load the processor from."""
        return source_of("processor", self.processor_name, self.trainer)

    def read_splits(self) -> DatasetDict:
        """The tables of all splits."""
        require("PIL", "vision")
        require_datasets()
        from datasets import DatasetDict

        found, faults = self.tables(_place(self.path, "path"), "path", "train")
        for split, source in (("validation", self.validation_path), ("test", self.test_path)):
            if source is None:
                continue
            held, told = self.tables(_place(source, f"{split}_path"), f"{split}_path", split)
            faults += told
            if set(held) - {split}:
                names = ", ".join(sorted(held))
                faults.append(f"{split}_path: {source!r} holds the splits {names}; give one of them")
            found |= held
        if faults:
            raise PEFTError(faults)
        self._annotated = {split for split, table in found.items() if self.annotation_column in table.column_names}
        return DatasetDict(found)

    def column_faults(self, table: Dataset, split: str) -> list[str]:
        """None: the columns were made here."""
        return []

    def row_faults(self, tables: Mapping[str, Dataset]) -> list[str]:
        """Images that can't be read, and annotations that don't fit them; every file is looked at."""
        return [fault for split, table in tables.items() for fault in self._split_faults(table, split)]

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test images in order.

        Raises:
            PEFTError: there are none, or they have no annotations.
        """
        if "test" not in self._annotated:
            raise PEFTError(f"test_path: there are no test images with {self.annotations}; give some")
        return super().test_dataloader()

    def _split_faults(self, table: Dataset, split: str) -> list[str]:
        told: dict[str, list[str]] = {}
        with ThreadPoolExecutor() as threads:
            for faults in threads.map(self._told, table):
                for kind, words in faults:
                    told.setdefault(kind, []).append(words)
        return [f"{split}: {len(words):,} of {len(table):,} {kind}: {listed(words)}" for kind, words in told.items()]

    def _told(self, row: dict[str, Any]) -> list[tuple[str, str]]:
        try:
            return self.faults_of_row(row)
        except Exception as error:  # the libraries that decode files raise errors of many kinds
            return [("images can't be read", f"{row[IMAGE]} ({reason_of(error)})")]


def upright_size(path: str) -> tuple[int, int]:
    """Width and height of an image as `read_image` gives it; raises any error where it can't be read."""
    from PIL import ExifTags, Image

    with Image.open(path) as image:
        image.verify()
    # opened again, as it can't be used after that
    with Image.open(path) as image:
        width, height = image.size
        # from 5 on, the orientation is one that lies on its side
        return (height, width) if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5 else (width, height)


def read_named(path: str) -> Any:
    """The image at a path, in RGB.

    Raises:
        PEFTError: it can't be read any more.
    """
    try:
        return read_image(path)
    except Exception as error:  # as above
        raise PEFTError(f"{path} can't be read: {reason_of(error)}") from error


def _place(source: str, field: str) -> Path:
    place = Path(resolve(source, field))
    if not place.exists():
        raise PEFTError(f"{field}: there is no file or folder {source!r}")
    return place
