"""The heat map as a page: parsed as what a browser gets."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from lightning_peft.tracking.weights_and_biases.heat_map import (
    CELLS,
    COLOURS,
    LEAST_COLUMNS,
    MISSING,
    WIDTH,
    heat_map_html,
)

SVG = "{http://www.w3.org/2000/svg}"


def parsed(page: str) -> tuple[dict[str, ElementTree.Element], list[str]]:
    """The cells by their tooltips, and the texts."""
    match = re.search(r"<svg.*</svg>", page, re.DOTALL)
    assert match is not None
    svg = ElementTree.fromstring(match[0])
    cells = {str(rect.findtext(f"{SVG}title")): rect for rect in svg.iter(f"{SVG}rect") if len(rect)}
    return cells, [str(text.text) for text in svg.iter(f"{SVG}text")]


def hexadecimal(colour: tuple[int, ...]) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)


def test_a_cell_has_its_place_its_number_and_a_colour_from_the_least_to_the_largest() -> None:
    cells, texts = parsed(heat_map_html("rank", ["a", "b"], [10, 20, 30], [[0, 4, 1], [2, 3, 8]]))
    assert list(cells) == ["a, 10: 0", "a, 20: 4", "a, 30: 1", "b, 10: 2", "b, 20: 3", "b, 30: 8"]
    colours = {title: cell.get("fill") for title, cell in cells.items()}
    assert colours["a, 10: 0"] == hexadecimal(COLOURS[0])
    assert colours["b, 10: 2"] == hexadecimal(COLOURS[1])
    assert colours["a, 20: 4"] == hexadecimal(COLOURS[2])
    assert colours["b, 30: 8"] == hexadecimal(COLOURS[4])
    middle = [round((low + high) / 2) for low, high in zip(COLOURS[0], COLOURS[1], strict=True)]
    assert colours["a, 30: 1"] == hexadecimal(tuple(middle))
    assert texts == ["a", "b", "10", "30", "0", "8"]
    left = [float(str(cells[f"a, {step}: {value}"].get("x"))) for step, value in ((10, 0), (20, 4), (30, 1))]
    assert [place - left[0] for place in left] == pytest.approx([0, WIDTH / 3, 2 * WIDTH / 3], abs=0.1)
    assert cells["a, 10: 0"].get("y") != cells["b, 10: 2"].get("y")


def test_equal_neighbours_are_one_cell() -> None:
    cells, _ = parsed(heat_map_html("rank", ["a"], [1, 2, 3, 4], [[8, 8, 8, 2]]))
    assert {title: float(str(cell.get("width"))) for title, cell in cells.items()} == {
        "a, 1 to 3: 8": pytest.approx(WIDTH * 3 / 4),
        "a, 4: 2": pytest.approx(WIDTH / 4),
    }


def test_what_is_no_number_is_grey_and_does_not_stretch_the_scale() -> None:
    nan, inf = float("nan"), float("inf")
    cells, texts = parsed(heat_map_html("norm", ["a"], [1, 2, 3, 4, 5], [[1.5, None, nan, inf, 2.5]]))
    assert cells["a, 2 to 4: none"].get("fill") == MISSING
    assert texts[-2:] == ["1.5", "2.5"]
    cells, texts = parsed(heat_map_html("norm", ["a"], [1], [[None]]))
    assert cells["a, 1: none"].get("fill") == MISSING


def test_names_are_text_and_no_markup() -> None:
    page = heat_map_html("<script>", ["<a> & 'b'"], ["<s>"], [[1]])
    assert "<script>" not in page
    cells, texts = parsed(page)
    assert list(cells) == ["<a> & 'b', <s>: 1"]
    assert texts[0] == "<a> & 'b'"


@pytest.mark.parametrize("rows", [4, 600])
def test_a_page_stays_small_and_keeps_the_first_and_the_last_column(rows: int) -> None:
    steps = 5_000
    page = heat_map_html(
        "n", [f"l{n}" for n in range(rows)], range(steps), [[n + s for s in range(steps)] for n in range(rows)]
    )
    cells, texts = parsed(page)
    assert len(page) < 2_000_000
    assert len(cells) == rows * max(LEAST_COLUMNS, CELLS // rows)
    assert {"l0, 0: 0", f"l0, {steps - 1}: {steps - 1}"} <= set(cells)
    assert texts[-4:-2] == ["0", str(steps - 1)]


def test_an_empty_one_is_a_page() -> None:
    assert parsed(heat_map_html("rank", [], [], [])) == ({}, ["0", "0"])
    assert parsed(heat_map_html("rank", ["a"], [], [[]]))[1] == ["a", "0", "0"]


def test_labels_have_to_match() -> None:
    with pytest.raises(ValueError, match=r"^rank: 1 rows of 2 values for 1 rows and 3 columns of labels$"):
        heat_map_html("rank", ["a"], [1, 2, 3], [[1, 2]])
    with pytest.raises(ValueError, match=r"^rank: 0 rows of no values for 1 rows and 1 columns of labels$"):
        heat_map_html("rank", ["a"], [1], [])
