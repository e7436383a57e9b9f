"""Class labels of a table: their names, their counts, and whether every split can use them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_peft.methods.errors import PEFTError, suggestion

if TYPE_CHECKING:
    from datasets import Dataset


IGNORED = -100
"""The label of a row that only fills up the last batch; losses and metrics leave it out."""


@dataclass(frozen=True)
class Classes:
    """The classes of a training table.

    Attributes:
        index: the class's id, from 0, for each value that the label column holds.
        names: the class's name, by id.
        counts: the number of training rows, by id.
    """

    index: dict[Hashable, int]
    names: list[str]
    counts: list[int]


def find_classes(table: Dataset, column: str) -> Classes:
    """The classes of a training table: those of its `ClassLabel` feature, else the strings or integers found, sorted.

    Raises:
        PEFTError: a label is missing or of another type than these, or there are fewer than two classes.
    """
    from datasets import ClassLabel

    feature = table.features[column]
    named = isinstance(feature, ClassLabel)
    withheld = [row for row, value in enumerate(table[column][:], 1) if value is None or (named and value == -1)]
    if withheld:
        counted = f"{len(withheld):,} of {len(table):,} training rows have no label: {row_numbers(withheld)}"
        raise PEFTError(f"label_column: {counted}")
    return classes_of(Counter(table[column][:]), feature, column, "label_column")


def classes_of(found: Mapping[Hashable, int], feature: Any, column: str, field: str) -> Classes:
    """The classes of counted values, none of them null; the arguments and errors are as in `find_classes`.

    Args:
        found: how often each value occurs in training.
        feature: the feature of the single values.
        column: the column that holds them, and `field`, the name of the field that says so: for the error messages.
    """
    from datasets import ClassLabel

    if isinstance(feature, ClassLabel):
        values: list[Hashable] = list(range(feature.num_classes))
        names = list(feature.names)
    else:
        odd = {type(value).__name__ for value in found if not isinstance(value, (str, int))}
        if odd:
            kinds = ", ".join(sorted(odd))
            raise PEFTError(f"{field}: {column!r} holds {kinds}; a class is a string or an integer")
        values = sorted(found)  # type: ignore[type-var]
        names = [str(value) for value in values]
    if sum(value in found for value in values) < 2:
        only = next((name for value, name in zip(values, names, strict=True) if value in found), "none")
        raise PEFTError(f"{field}: {column!r} holds one class only, {only!r}; a classifier needs two or more")
    index = {value: number for number, value in enumerate(values)}
    return Classes(index, names, [found.get(value, 0) for value in values])


def has_labels(table: Dataset, column: str, classes: Classes) -> bool:
    """Whether any row of a test table says its class; hub datasets write null or -1 where it is withheld."""
    found = set(table[column][:]) if column in table.column_names else set()
    return any(value in classes.index or value not in (None, -1) for value in found)


def unseen_labels(table: Dataset, column: str, classes: Classes, split: str) -> list[str]:
    """One fault for each label of `table` that training doesn't have."""
    return unseen(Counter(table[column][:]), classes, split)


def unseen(
    found: Mapping[Hashable, int], classes: Classes, split: str, word: str = "label", unit: str = "row"
) -> list[str]:
    """One fault for each of the counted values that training doesn't have; `unit` is what the counts count."""
    faults = []
    for value, count in sorted(found.items(), key=lambda item: str(item[0])):
        if value not in classes.index:
            known = suggestion(str(value), classes.names) or f"; its classes are {_listed(classes.names)}"
            times = f"1 {unit}" if count == 1 else f"{count:,} {unit}s"
            faults.append(f"{split}: the {word} {value!r} ({times}) does not occur in training{known}")
    return faults


def row_numbers(rows: Sequence[int], limit: int = 5) -> str:
    """`row 3`, or `rows 2, 4, …`: the first of these numbers, for an error message."""
    shown = ", ".join(str(row) for row in rows[:limit]) + (", …" if len(rows) > limit else "")
    return f"row {shown}" if len(rows) == 1 else f"rows {shown}"


def stratified_split(table: Dataset, column: str, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """`table` in two: about `1 - fraction` of each class, at least one row, and the rest. Fixed by `seed`."""
    rows: dict[Hashable, list[int]] = {}
    for row, value in enumerate(table[column][:]):
        rows.setdefault(value, []).append(row)
    generator = np.random.default_rng(seed)
    held: list[int] = []
    for value in sorted(rows, key=str):
        order = generator.permutation(rows[value])
        held += order[: min(round(fraction * len(order)), len(order) - 1)].tolist()
    chosen = set(held)
    return table.select([row for row in range(len(table)) if row not in chosen]), table.select(sorted(held))


def _listed(names: list[str], limit: int = 10) -> str:
    return ", ".join(repr(name) for name in names[:limit]) + (", …" if len(names) > limit else "")
