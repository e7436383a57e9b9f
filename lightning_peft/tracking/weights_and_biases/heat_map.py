"""A heat map as one HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import groupby

COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""From the least to the largest value: dark to light, evenly for the eye and for the colour-blind."""
MISSING = "#cccccc"
CELLS, LEAST_COLUMNS = 8_000, 20
"""A page of about 1 MB; many rows get fewer columns, but no fewer than these."""
WIDTH, HEIGHT, MARGIN = 640, 14, 6
"""Pixels: of all cells of a row, of a row, and between the parts."""

Values = Sequence[Sequence[float | None]]


def heat_map_html(
    name: str, rows: Sequence[str], columns: Sequence[object], values: Values, whole: bool = False
) -> str:
    """A page with a cell for each value, its number in a tooltip, and a scale.

    Where there are more columns than a page holds, some are left out, evenly; the first and the last stay.

    Args:
        name: the title.
        rows: a label for each row, such as module paths.
        columns: a label for each column, such as steps.
        values: as many sequences as rows, each with as many numbers as columns; None, NaN and infinities are grey.
        whole: leave no column out, however large the page is.

    Raises:
        ValueError: the numbers of labels and values don't match.
    """
    if len(values) != len(rows) or any(len(row) != len(columns) for row in values):
        shape = f"{len(values)} rows of {', '.join(sorted({str(len(row)) for row in values})) or 'no'}"
        raise ValueError(f"{name}: {shape} values for {len(rows)} rows and {len(columns)} columns of labels")
    most = len(columns) if whole else max(LEAST_COLUMNS, CELLS // max(1, len(rows)))
    kept = _evenly(len(columns), most)
    labels = [str(columns[index]) for index in kept]
    finite = [value for row in values for index in kept if (value := _finite(row[index])) is not None]
    least, largest = (min(finite), max(finite)) if finite else (0.0, 0.0)
    left = MARGIN + 7 * max((len(row) for row in rows), default=0)
    width = WIDTH / max(1, len(kept))
    lines = []
    for place, (row, numbers) in enumerate(zip(rows, values, strict=True)):
        y = HEIGHT * place
        lines.append(f'<text x="{left - MARGIN}" y="{y + 11}" text-anchor="end">{escape(row)}</text>')
        # equal neighbours, as ranks mostly are, in one cell
        for value, run in groupby(range(len(kept)), key=lambda column: _finite(numbers[kept[column]])):
            cells = list(run)
            first, last = cells[0], cells[-1]
            span = labels[first] if first == last else f"{labels[first]} to {labels[last]}"
            shown = "none" if value is None else f"{value:.6g}"
            lines.append(
                f'<rect x="{left + width * first:.1f}" y="{y}" width="{width * (last - first + 1):.1f}" '
                f'height="{HEIGHT - 1}" fill="{_colour(value, least, largest)}">'
                f"<title>{escape(f'{row}, {span}: {shown}')}</title></rect>"
            )
    bottom = HEIGHT * len(rows)
    if labels:
        lines.append(f'<text x="{left}" y="{bottom + 12}">{escape(labels[0])}</text>')
        lines.append(f'<text x="{left + WIDTH}" y="{bottom + 12}" text-anchor="end">{escape(labels[-1])}</text>')
    stops = "".join(
        f'<stop offset="{place / (len(COLOURS) - 1)}" stop-color="rgb{colour}"/>'
        for place, colour in enumerate(COLOURS)
    )
    lines.append(f'<defs><linearGradient id="scale">{stops}</linearGradient></defs>')
    lines.append(f'<rect x="{left}" y="{bottom + 22}" width="{WIDTH / 4:.0f}" height="8" fill="url(#scale)"/>')
    lines.append(f'<text x="{left - MARGIN}" y="{bottom + 31}" text-anchor="end">{least:.4g}</text>')
    lines.append(f'<text x="{left + WIDTH / 4 + MARGIN:.0f}" y="{bottom + 31}">{largest:.4g}</text>')
    body = "\n".join(lines)
    return (
        f'<!doctype html>\n<meta charset="utf-8">\n<title>{escape(name)}</title>\n'
        '<body style="margin: 8px; background: white; font: 13px sans-serif">\n'
        f"<p>{escape(name)}</p>\n"
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + WIDTH + MARGIN}" height="{bottom + 40}" '
        f'font-family="monospace" font-size="11">\n{body}\n</svg>\n'
    )


def _evenly(number: int, most: int) -> list[int]:
    """Up to `most` of the indices below `number`, evenly, the first and the last among them."""
    if number <= most:
        return list(range(number))
    return [round(place * (number - 1) / (most - 1)) for place in range(most)]


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _colour(value: float | None, least: float, largest: float) -> str:
    if value is None:
        return MISSING
    share = (value - least) / (largest - least) if largest > least else 0.0
    place = share * (len(COLOURS) - 1)
    below = min(int(place), len(COLOURS) - 2)
    mixed = (
        round(low + (high - low) * (place - below))
        for low, high in zip(COLOURS[below], COLOURS[below + 1], strict=True)
    )
    return "#" + "".join(f"{part:02x}" for part in mixed)
