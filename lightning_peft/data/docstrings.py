"""Labelled text that every installation has: its libraries' docstrings, each labelled by its library."""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_peft.data.files import require_datasets
from lightning_peft.data.text_classification import TextClassificationData
from lightning_peft.interchange.locations import installed_packages, package_folder
from lightning_peft.methods.errors import PEFTError, suggestion

if TYPE_CHECKING:
    from datasets import DatasetDict

LIBRARIES = ("lightning", "networkx", "numpy", "pandas", "sympy", "torch", "torchmetrics", "transformers")

MASK = "[MASK]"

_NICKNAMES = {
    "lightning": ["pl"],
    "networkx": ["nx"],
    "numpy": ["np"],
    "pandas": ["pd"],
    "transformers": ["hf", "hugging"],
}
"""What else gives a library away. Like its name, masked inside other words too; up to three letters, only alone."""

_MIN_CHARACTERS = 60
_MAX_PER_MODULE = 20
_SAME_CHARACTERS = 200
_NOT_THE_LIBRARY = re.compile(r"(tests?|testing|test_.*|.*_test\.py|conftest\.py|_?vendor(ed)?|externals?)$")
_LINK = re.compile(r"https?://\S+|www\.\S+")
_WORD = re.compile(r"[^\W\d]\w*")
_MASKS = re.compile(r"\[MASK\](?:[./]\[MASK\])+")


class DocstringData(TextClassificationData):
    """Which library is a docstring from? Real text with labels, read from installed packages without importing them.

    A row is the docstring of one class, function or method, in one line. The libraries' names and nicknames, links, and
    the names of what it documents (itself, its class, its module) are replaced by `[MASK]`. Each library has the same
    number of rows, no two rows begin alike, and no module is in two splits. The rows depend on the libraries' versions,
    the fields below and nothing else. `read_splits` gives the columns `text`, `label` (the library) and `module`.

    Args:
        libraries: the import names of two or more installed packages.
        rows_per_library: the number of rows of each, over all splits.
        tokenizer: a hub id, a folder or `package:NAME/folder`; by default that of the module's `model`.
        max_length: rows are cut to this many tokens, special ones included; how many were cut is logged.
        batch_size: rows per batch and device.
        num_workers: processes per loader; 0 loads in the training process.
        validation_fraction: the part of the rows to validate on, and as many again to test on.
        seed: fixes which modules are read, and which split each of them is in.

    Raises:
        PEFTError: by `setup`, a library isn't installed or has too few docstrings.
    """

    def __init__(
        self,
        libraries: Sequence[str] = LIBRARIES,
        rows_per_library: int = 400,
        tokenizer: str | None = None,
        max_length: int = 64,
        batch_size: int = 32,
        num_workers: int = 0,
        validation_fraction: float = 0.15,
        seed: int = 0,
    ) -> None:
        super().__init__(
            path="docstrings",
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            num_workers=num_workers,
            validation_fraction=validation_fraction,
            seed=seed,
        )
        foreign = [
            "path",
            "validation_path",
            "test_path",
            "text_column",
            "label_column",
            "streaming",
            "group_by_length",
        ]
        self.save_hyperparameters(ignore=foreign)
        self.libraries = list(libraries)
        self.rows_per_library = rows_per_library

    def prepare_data(self) -> None:
        """Nothing to download: every process reads the same installed files."""

    def read_splits(self) -> DatasetDict:
        """The masked docstrings: `train`, and `validation` and `test` where `validation_fraction` isn't 0."""
        require_datasets()
        from datasets import Dataset, DatasetDict

        held = round(self.validation_fraction * self.rows_per_library)
        sizes = {"test": held, "validation": held, "train": self.rows_per_library - 2 * held}
        splits = docstring_rows(self.libraries, sizes, self.seed)
        rows = {split: [vars(row) for row in splits[split]] for split in ("train", "validation", "test")}
        return DatasetDict({split: Dataset.from_list(rows[split]) for split in rows if rows[split]})


@dataclass(frozen=True)
class DocstringRow:
    """A masked docstring, the library that it is from, and its module's file there (`nn/modules/linear.py`)."""

    text: str
    label: str
    module: str


def docstring_rows(libraries: Sequence[str], sizes: dict[str, int], seed: int) -> dict[str, list[DocstringRow]]:
    """Rows by split: of each library as many as `sizes` says, with each module in one split.

    Args:
        libraries: the import names of installed packages.
        sizes: the number of rows per library, by split.
        seed: fixes the order in which the modules are read.

    Raises:
        PEFTError: a library isn't installed, is named twice or has too few docstrings; all such faults at once.
    """
    faults = [] if len(libraries) > 1 else ["libraries: name two or more; a classifier needs two classes"]
    faults += [f"libraries: {name!r} is named twice" for name in sorted(set(libraries)) if libraries.count(name) > 1]
    folders = {name: package_folder(name) for name in libraries}
    installed = installed_packages() if None in folders.values() else []
    faults += [
        f"libraries: there is no installed package {name!r}{suggestion(name, installed)}"
        for name, folder in folders.items()
        if folder is None
    ]
    if faults:
        raise PEFTError(faults)
    splits: dict[str, list[DocstringRow]] = {split: [] for split in sizes}
    known: set[str] = set()
    for name, folder in folders.items():
        assert folder is not None
        modules = _modules(name, folder, _secrets(libraries), known, seed)
        found = 0
        for split, size in sizes.items():
            rows: list[DocstringRow] = []
            while len(rows) < size and (module := next(modules, None)) is not None:
                rows += module
            splits[split] += rows[:size]
            found += len(rows[:size])
        if found < sum(sizes.values()):
            faults.append(
                f"libraries: {name!r} has {found:,} docstrings that serve; rows_per_library is {sum(sizes.values()):,}"
            )
    if faults:
        raise PEFTError(faults)
    return splits


def _modules(
    library: str, folder: Path, secrets: re.Pattern[str], known: set[str], seed: int
) -> Iterator[list[DocstringRow]]:
    """The rows of one module after another, in an order fixed by `seed`; `known` collects how the rows' texts begin."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    paths = [path for path in paths if not any(_NOT_THE_LIBRARY.match(part) for part in path.split("/"))]
    # a string seeds in the same way in every process and Python version
    order = random.Random(f"{seed} {library}")
    order.shuffle(paths)
    for path in paths:
        try:
            tree = ast.parse((folder / path).read_bytes())
        except (SyntaxError, ValueError):
            continue  # templates, and code for another version of Python
        rows = []
        places = {part.lower() for part in path.removesuffix(".py").split("/")}
        for names, docstring in _docstrings(tree, ()):
            text = mask(docstring, secrets, places | {name.lower() for name in names})
            start = text[:_SAME_CHARACTERS].lower()
            if len(text) >= _MIN_CHARACTERS and start not in known:
                known.add(start)
                rows.append(DocstringRow(text, library, path))
        if rows:
            order.shuffle(rows)
            yield rows[:_MAX_PER_MODULE]


def _docstrings(node: ast.AST, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """The docstring of every class and function in `node`, each after its own name and those it is defined in."""
    # only statements can hold definitions; the expressions below them are most of a tree
    blocks = [getattr(node, field, []) for field in ("body", "handlers", "orelse", "finalbody")]
    for child in (statement for block in blocks if isinstance(block, list) for statement in block):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            path = (*names, child.name)
            docstring = ast.get_docstring(child)
            if docstring:
                yield path, docstring
            yield from _docstrings(child, path)
        else:
            yield from _docstrings(child, names)


def mask(text: str, secrets: re.Pattern[str], names: set[str]) -> str:
    """`text` in one line, with `[MASK]` for links, for words that match `secrets`, and for the words in `names`.

    Args:
        text: a docstring.
        secrets: matches, from its first letter, a word that says which library this is.
        names: words in lower case; one of one or two letters is left as it is.
    """

    def word(match: re.Match[str]) -> str:
        own = len(match.group()) > 2 and match.group().lower() in names
        return MASK if own or secrets.match(match.group()) else match.group()

    one_line = " ".join(_WORD.sub(word, _LINK.sub("\0", text)).replace("\0", MASK).split())
    return _MASKS.sub(MASK, one_line)


def _secrets(libraries: Sequence[str]) -> re.Pattern[str]:
    nicknames = [word for name in libraries for word in _NICKNAMES.get(name, [])]
    inside = [f".*{re.escape(word)}" for word in [*libraries, *nicknames] if len(word) > 3]
    whole = [f"{re.escape(word)}$" for word in [*libraries, *nicknames] if len(word) <= 3]
    return re.compile("|".join(inside + whole), re.IGNORECASE)
