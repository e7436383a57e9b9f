"""Layers of files and options amount to what the parser makes of them, and keys know their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_peft.cli.app import PEFTCLI
from lightning_peft.cli.reading import COMMAND_LINE, Name, merged, read_arguments, read_config
from lightning_peft.methods import METHODS

LAYERS = {
    "scalars": (["--trainer.max_epochs=3", "--trainer.max_epochs", "4"], {"trainer": {"max_epochs": 4}}),
    "number in scientific notation": (
        ["--model.learning_rate", "1e-3"],
        {"model": {"init_args": {"learning_rate": 1e-3}}},
    ),
    "method by name, then a field": (
        ["--peft.method", "DoRA", "--peft.method.r=3"],
        {"peft": {"method": {"init_args": {"r": 3}}}},
    ),
    "method switched, fields kept": (["--peft.method=DoRA"], {"peft": {"method": {"init_args": {"r": 2}}}}),
    "callback appended, and then its field": (
        [
            "--trainer.callbacks+=EarlyStopping",
            "--trainer.callbacks.monitor=val_loss",
            "--trainer.callbacks.patience=7",
        ],
        {"trainer": {"callbacks": [{"init_args": {"monitor": "val_loss", "patience": 7}}]}},
    ),
    "another file on top": (["--config", "top.yaml"], {"peft": {"method": {"init_args": {"r": 5}}}}),
    "lists replace": (["--peft.modules_to_save=[net, head]"], {"peft": {"modules_to_save": ["net", "head"]}}),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers_amount_to_what_the_parser_makes_of_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    (folder / "top.yaml").write_text("peft: {method: {init_args: {r: 5}}}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(PEFTCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(PEFTCLI, "_run_subcommand", lambda self, subcommand: None)
    words, expected = LAYERS[case]
    words = ["--config", "lora.yaml", *words]
    tree, faults = read_arguments(words)
    assert faults == []
    assert _holds(tree, expected)
    assert _holds(PEFTCLI(["fit", *words]).config["fit"].as_dict(), expected)


def test_keys_and_text_know_their_line(folder: Path) -> None:
    (folder / "a.yaml").write_text(
        "trainer:\n  max_epochs: 1\n  callbacks:\n    - ModelCheckpoint\n    - {class_path: X}\n"
    )
    tree, faults = read_config("a.yaml")
    assert faults == []
    [trainer] = tree
    epochs, callbacks = tree[trainer]
    assert (trainer.where, epochs.where, callbacks.where) == ("a.yaml:1", "a.yaml:2", "a.yaml:3")
    text, spec = tree[trainer][callbacks]
    assert (text, text.where, next(iter(spec)).where) == ("ModelCheckpoint", "a.yaml:4", "a.yaml:5")


def test_the_last_layer_says_where_a_key_stands(folder: Path) -> None:
    (folder / "a.yaml").write_text("trainer:\n  max_epochs: 1\n")
    (folder / "b.yaml").write_text("\ntrainer: {max_epochs: 2}\n")
    tree, _ = read_arguments(["--config", "a.yaml", "--config=b.yaml"])
    [trainer] = tree
    assert trainer.where == next(iter(tree[trainer])).where == "b.yaml:2"
    tree, _ = read_arguments(["--config", "b.yaml", "--trainer.max_epochs=3"])
    assert next(iter(tree["trainer"])).where == COMMAND_LINE  # type: ignore[call-overload]


def test_what_came_with_a_class_that_was_replaced_has_no_place() -> None:
    earlier = {"class_path": "A", "init_args": {Name("a").at("x:1"): 1}}
    assert [key.where for key in merged(earlier, {"class_path": "B"})["init_args"]] == [""]
    assert [key.where for key in merged(earlier, {"class_path": "A"})["init_args"]] == ["x:1"]


SECTIONS = "a configuration is a mapping with sections such as model, data, trainer and peft"
BAD_FILES = {
    "a: {b\nc: d\n": ("x.yaml:2:2: is no valid YAML: while parsing a flow mapping expected ',' or '}', but got ':'"),
    "a:\n\tb: 1\n": (
        "x.yaml:2:1: is no valid YAML: while scanning for the next token "
        "found character '\\t' that cannot start any token"
    ),
    "- a\n": f"x.yaml: holds a list; {SECTIONS}",
    "": f"x.yaml: is empty; {SECTIONS}",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_bad_files(folder: Path, text: str) -> None:
    (folder / "x.yaml").write_text(text)
    assert read_config("x.yaml") == ({}, [BAD_FILES[text]])


def test_a_file_that_is_not_there(folder: Path) -> None:
    assert read_config("lroa.yaml") == (
        {},
        ["lroa.yaml: there is no such file; did you mean 'lora.yaml' or 'base.yaml'?"],
    )


trees = st.recursive(
    st.integers() | st.none() | st.lists(st.integers(), max_size=2),
    lambda children: st.dictionaries(st.sampled_from("abc"), children, max_size=3),
    max_leaves=8,
)


@given(trees, trees, trees)
def test_merging_is_associative_and_the_later_wins(a: Any, b: Any, c: Any) -> None:
    assert merged(a, a) == a
    assert _holds(merged(a, b), b)
    mappings = [tree for tree in (a, b, c) if isinstance(tree, dict)]
    if len(mappings) == 3:
        deep = merged(merged(a, b), c)
        assert _holds(deep, c)
        assert set(deep) == set(a) | set(b) | set(c)


def _holds(whole: Any, part: Any) -> bool:
    """Whether `part` is in `whole`: mappings by key, lists item by item."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and _holds(whole[key], part[key]) for key in part)
    if isinstance(part, list) and part and isinstance(part[0], dict):
        return len(whole) == len(part) and all(map(_holds, whole, part))
    return bool(whole == part)


class Parsed(PEFTCLI):
    """Stops once the configuration is read."""

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


@pytest.mark.parametrize(
    ("more", "rate"),
    [
        ([], METHODS["DoRA"].learning_rate),
        (["--peft.method=BitFit"], METHODS["BitFit"].learning_rate),
        (["--model.learning_rate=3e-4"], 3e-4),
        (["--peft.method=null"], None),
    ],
)
def test_a_model_without_a_learning_rate_gets_the_method_s(more: list[str], rate: float | None) -> None:
    model = ["--model=SequenceClassification", "--model.model=some/model"]
    data = ["--data=TextClassificationData", "--data.path=rows.jsonl"]
    config = Parsed(["fit", *model, *data, "--peft.method=DoRA", *more]).config
    assert config["fit"].model.init_args.learning_rate == rate
