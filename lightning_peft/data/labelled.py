"""Tables with one label per row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch.utils.data import DataLoader

from lightning_peft.data.labels import IGNORED, Classes, find_classes, has_labels, stratified_split, unseen_labels
from lightning_peft.data.module import TableData
from lightning_peft.methods.errors import PEFTError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


class LabelledData(TableData):
    """Mixed in front of a kind of data whose rows have one class each.

    A test table whose labels are withheld (no label column, or null or -1 throughout) serves for prediction only.

    Args:
        path: see `TableData`.
        label_column: the column that holds the class, a string or an integer.
        **options: see `TableData`. Validation rows are held out of each class alike.

    Attributes:
        class_names: the classes' names, by id; known after `setup`, as are the next two.
        num_labels: how many classes there are.
        class_counts: the number of training rows of each class, by id.
    """

    wanted: ClassVar[tuple[str, str]] = ("rows with labels", "file")
    """What a test needs, and what has it: for the message that there is none."""

    def __init__(self, path: str, *, label_column: str = "label", **options: Any) -> None:
        self.label_column = label_column
        super().__init__(path, **options)
        self.class_names: list[str] = []
        self.class_counts: list[int] = []
        self.num_labels = 0
        self._classes: Classes | None = None
        self._labelled: set[str] = set()

    def hold_out(self, splits: DatasetDict) -> None:
        """Validation rows of each class, and the classes of what is left."""
        classes = find_classes(splits["train"], self.label_column)
        if "validation" not in splits and self.validation_fraction > 0:
            splits["train"], splits["validation"] = stratified_split(
                splits["train"], self.label_column, self.validation_fraction, self.seed
            )
            classes = find_classes(splits["train"], self.label_column)
        self._classes = classes
        self.class_names, self.class_counts, self.num_labels = classes.names, classes.counts, len(classes.names)

    def row_faults(self, tables: Mapping[str, Dataset]) -> list[str]:
        """Labels that training doesn't have."""
        assert self._classes is not None
        classes, column = self._classes, self.label_column
        self._labelled = {s for s in tables if s != "test" or has_labels(tables[s], column, classes)}
        held = sorted(self._labelled - {"train"})
        return [fault for split in held for fault in unseen_labels(tables[split], column, classes, split)]

    def index(self, split: str) -> dict[Any, int] | None:
        """The class's id for each label; None where the split's labels are withheld."""
        assert self._classes is not None
        return self._classes.index if split in self._labelled else None

    def filler(self, row: dict[str, Any]) -> dict[str, Any]:
        """The same row without a label."""
        return {**row, "labels": IGNORED}

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test rows in order.

        Raises:
            PEFTError: there is no test table, or its labels are withheld.
        """
        if "test" not in self._labelled:
            things, place = self.wanted
            raise PEFTError(f"test_path: there are no test {things}; give a {place} that has them")
        return super().test_dataloader()
