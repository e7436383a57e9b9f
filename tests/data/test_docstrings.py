from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_peft.data import DocstringData
from lightning_peft.data.docstrings import LIBRARIES, MASK, DocstringRow, _secrets, docstring_rows, mask
from lightning_peft.interchange.locations import installed_packages
from lightning_peft.methods.errors import PEFTError, suggestion

SIZES = {"test": 60, "validation": 60, "train": 280}


@pytest.fixture(scope="module")
def splits() -> dict[str, list[DocstringRow]]:
    for library in LIBRARIES:
        pytest.importorskip(library)
    return docstring_rows(LIBRARIES, SIZES, seed=0)


def every(splits: dict[str, list[DocstringRow]]) -> Iterator[DocstringRow]:
    for rows in splits.values():
        yield from rows


def test_three_thousand_rows_or_more_in_balanced_classes(splits: dict[str, list[DocstringRow]]) -> None:
    assert sum(len(rows) for rows in splits.values()) == 3200
    for split, rows in splits.items():
        assert Counter(row.label for row in rows) == dict.fromkeys(LIBRARIES, SIZES[split])


def test_no_module_is_in_two_splits(splits: dict[str, list[DocstringRow]]) -> None:
    modules = [{(row.label, row.module) for row in rows} for rows in splits.values()]
    assert sum(len(group) for group in modules) == len(set.union(*modules))
    assert all(len(group) >= 3 * len(LIBRARIES) for group in modules)


def test_no_text_names_a_library(splits: dict[str, list[DocstringRow]]) -> None:
    names = re.compile("|".join(LIBRARIES) + r"|hugging|\b(np|pd|nx|pl)\b|https?://", re.IGNORECASE)
    assert [row for row in every(splits) if names.search(row.text)] == []


def test_no_two_texts_begin_alike_and_none_is_short(splits: dict[str, list[DocstringRow]]) -> None:
    texts = [row.text for row in every(splits)]
    assert len({text[:200].lower() for text in texts}) == len(texts)
    assert min(len(text) for text in texts) >= 60
    assert not any("\n" in text for text in texts)


def test_rows_are_fixed_by_the_seed() -> None:
    sizes = {"train": 30}
    libraries = ["networkx", "torchmetrics"]
    first = docstring_rows(libraries, sizes, seed=1)
    assert docstring_rows(libraries, sizes, seed=1) == first
    assert docstring_rows(libraries, sizes, seed=2) != first


def test_mask_hides_what_gives_it_away() -> None:
    text = """Use np.array or PyTorch's torch.nn.Linear; see https://pandas.pydata.org/x.

        Linear(x) of `linear.py` is no nonlinear map, and an input is no np_input."""
    secrets = _secrets(["numpy", "torch", "pandas"])
    assert mask(text, secrets, {"linear", "an"}) == (
        f"Use {MASK}.array or {MASK}'s {MASK}.nn.{MASK}; see {MASK} {MASK}(x) of `{MASK}.py` is no nonlinear map, "
        "and an input is no np_input."
    )


def _library(folder: Path, name: str, modules: dict[str, str]) -> None:
    (folder / name).mkdir()
    for module, source in {"__init__.py": "raise ImportError('imported')", **modules}.items():
        (folder / name / module).parent.mkdir(exist_ok=True)
        (folder / name / module).write_text(source)


@pytest.fixture
def two_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that can't be imported, with a module that can't be parsed and one of tests."""
    long = "and so on, at a length that makes this worth reading for a classifier of texts"
    nested = f'''
class Thing:
    """A Thing of library one, {long}."""
    if True:
        def work(self):
            """Its work {long}."""
            def inner():
                """Inside of work, {long}."""
    def short(self):
        """Short."""
'''
    _library(
        tmp_path, "library_one", {"a.py": nested, "b.py": "def broken(:", "tests/c.py": nested.replace("so", "no")}
    )
    _library(tmp_path, "library_two", {"a.py": f'def alone():\n    """Alone in library two, {long}."""\n'})
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("two_libraries")
def test_classes_functions_and_methods_are_read_without_an_import() -> None:
    rows = docstring_rows(["library_one", "library_two"], {"train": 1}, seed=0)["train"]
    assert [(row.label, row.module) for row in rows] == [("library_one", "a.py"), ("library_two", "a.py")]
    assert rows[1].text.startswith("[MASK] in library two, and so on")
    with pytest.raises(PEFTError) as caught:
        docstring_rows(["library_one", "library_two"], {"train": 9}, seed=0)
    assert list(caught.value.faults) == [
        "libraries: 'library_one' has 3 docstrings that serve; rows_per_library is 9",
        "libraries: 'library_two' has 1 docstrings that serve; rows_per_library is 9",
    ]


def test_wrong_libraries_are_told_at_once() -> None:
    with pytest.raises(PEFTError) as caught:
        docstring_rows(["networx", "torch", "torch", "zzqqjj"], {"train": 1}, seed=0)
    assert list(caught.value.faults) == [
        "libraries: 'torch' is named twice",
        f"libraries: there is no installed package 'networx'{suggestion('networx', installed_packages())}",
        "libraries: there is no installed package 'zzqqjj'",
    ]
    with pytest.raises(PEFTError, match=r"^libraries: name two or more; a classifier needs two classes$"):
        docstring_rows(["torch"], {"train": 1}, seed=0)


def test_data_module_gives_the_rows_as_batches(tokenizer_folder: str) -> None:
    data = DocstringData(
        ["networkx", "torchmetrics"],
        20,
        tokenizer=tokenizer_folder,
        max_length=16,
        batch_size=8,
        validation_fraction=0.2,
    )
    data.prepare_data()
    data.setup("fit")
    assert (data.class_names, data.class_counts) == (["networkx", "torchmetrics"], [12, 12])
    assert [batch["input_ids"].shape for batch in data.val_dataloader()] == [(8, 16)]
    assert [batch["labels"].tolist() for batch in data.test_dataloader()] == [[0] * 4 + [1] * 4]
    assert dict(data.hparams) == {
        "libraries": ["networkx", "torchmetrics"],
        "rows_per_library": 20,
        "tokenizer": tokenizer_folder,
        "max_length": 16,
        "batch_size": 8,
        "num_workers": 0,
        "validation_fraction": 0.2,
        "seed": 0,
    }
