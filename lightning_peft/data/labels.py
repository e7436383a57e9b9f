"""Class labels of a table: their names, their counts, and whether every split can use them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    found = Counter(table[column][:])
    named = isinstance(feature, ClassLabel)
    withheld = [row for row, value in enumerate(table[column][:], 1) if value is None or (named and value == -1)]
    if withheld:
        shown = ", ".join(str(row) for row in withheld[:5]) + (", …" if len(withheld) > 5 else "")
        raise PEFTError(f"label_column: {len(withheld):,} of {len(table):,} training rows have no label: rows {shown}")
    if named:
        values: list[Hashable] = list(range(feature.num_classes))
        names = list(feature.names)
    else:
        odd = {type(value).__name__ for value in found if not isinstance(value, (str, int))}
        if odd:
            kinds = ", ".join(sorted(odd))
            raise PEFTError(f"label_column: {column!r} holds {kinds}; a class is a string or an integer")
        values = sorted(found)
        names = [str(value) for value in values]
    if sum(value in found for value in values) < 2:
        only = next((name for value, name in zip(values, names, strict=True) if value in found), "none")
        raise PEFTError(f"label_column: {column!r} holds one class only, {only!r}; a classifier needs two or more")
    index = {value: number for number, value in enumerate(values)}
    return Classes(index, names, [found[value] for value in values])


def has_labels(table: Dataset, column: str, classes: Classes) -> bool:
    """Whether any row of a test table says its class; hub datasets write null or -1 where it is withheld."""
    found = set(table[column][:]) if column in table.column_names else set()
    return any(value in classes.index or value not in (None, -1) for value in found)


def unseen_labels(table: Dataset, column: str, classes: Classes, split: str) -> list[str]:
    """One fault for each label of `table` that training doesn't have."""
    found = Counter(table[column][:])
    faults = []
    for value, count in sorted(found.items(), key=lambda item: str(item[0])):
        if value not in classes.index:
            known = suggestion(str(value), classes.names) or f"; its classes are {_listed(classes.names)}"
            rows = "1 row" if count == 1 else f"{count:,} rows"
            faults.append(f"{split}: the label {value!r} ({rows}) does not occur in training{known}")
    return faults


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
