"""Prefixes that the names in a file have, or lack, against those of a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_peft import PEFTError
from lightning_peft.quantization.naming import Prefixes, find_prefixes

part = st.sampled_from(["model", "layers", "0", "1", "weight", "bias", "net", "encoder", "h"])
name = st.lists(part, min_size=1, max_size=4).map(".".join)
prefix = st.lists(st.sampled_from(["net", "model", "body", "x"]), max_size=3).map(
    lambda parts: "".join(f"{p}." for p in parts)
)
BLOCK = ["embed.weight", *(f"layers.{n}.{part}.weight" for n in range(3) for part in ("q", "k"))]


def numbered(names: list[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


@given(names=st.lists(name, min_size=1, unique=True))
def test_equal_names_need_no_prefix(names: list[str]) -> None:
    assert find_prefixes(names, numbered(names)) == Prefixes()


@given(lost=prefix, gained=prefix, extra=st.lists(name.map(lambda text: f"other.{text}"), max_size=2, unique=True))
def test_names_that_differ_in_front_are_brought_together(lost: str, gained: str, extra: list[str]) -> None:
    keys = [lost + name for name in BLOCK]
    names = [gained + name for name in BLOCK]
    found = find_prefixes([*keys, *extra], numbered([*names, "score.weight"]))
    assert [found.name(key) for key in keys] == names


@given(keys=st.lists(name, min_size=1, unique=True), names=st.lists(name, unique=True))
def test_no_prefix_is_taken_where_it_fits_less_than_none(keys: list[str], names: list[str]) -> None:
    model = numbered(names)
    try:
        found = find_prefixes(keys, model)
    except PEFTError:
        return
    plain = sum(key in model for key in keys)
    assert len({found.name(key) for key in keys} & set(names)) >= plain


def test_a_key_without_the_common_prefix_keeps_its_name() -> None:
    found = find_prefixes([*(f"model.{name}" for name in BLOCK), "lm_head.weight"], numbered(BLOCK))
    assert found == Prefixes("model.", "")
    assert found.name("lm_head.weight") == "lm_head.weight"


def test_parts_that_are_alike_are_an_error_unless_they_are_the_same_tensors() -> None:
    keys = ["q.weight", "k.weight"]
    names = [f"layers.{n}.{key}" for n in range(2) for key in keys]
    with pytest.raises(
        PEFTError, match=r"fit several parts of the model equally well: layers\.0, layers\.1; load each"
    ):
        find_prefixes(keys, numbered(names))
    shared = {name: int("k" in name) for name in names}
    assert find_prefixes(keys, shared) == Prefixes("", "layers.0.")


def test_a_file_of_another_model_is_not_searched_for_long() -> None:
    keys = [f"a.{n}.weight" for n in range(5000)]
    names = numbered([f"b.x{n}.weight" for n in range(5000)])
    assert find_prefixes(keys, names) == Prefixes()
