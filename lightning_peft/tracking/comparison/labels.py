"""Names beside the points of a plot, placed so that none lies on another or on a point, at any width of the plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

CHARACTER, LINE = 6.6, 14.0
"""A character's mean width and a line's height in 11 px, in px."""
MARKER = 7.0
"""Half of a marker's side, its rim included, in px."""
SCALES = (1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0)
"""How many times wider than at its narrowest the plot may be."""
ANCHORS = {
    "top right": (1, 1),
    "bottom right": (1, -1),
    "top left": (-1, 1),
    "bottom left": (-1, -1),
    "top center": (0, 1),
    "bottom center": (0, -1),
    "middle right": (1, 0),
    "middle left": (-1, 0),
}
"""Where a text may stand beside its point, and in which direction that is, right and up counted; those first that are
off the error bars."""
Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""


def place_labels(
    points: Mapping[str, tuple[float, float]], order: Sequence[str], width: float, height: float
) -> dict[str, str]:
    """The anchor of each label that finds a free place; a label that finds none is left out.

    Args:
        points: by label, from (0, 0) at the lower left corner of the plot to (1, 1).
        order: the labels, those first that should rather be there.
        width: of the plot at its narrowest, in px.
        height: of the plot, in px.
    """
    placed: dict[str, str] = {}
    for label in order:
        for anchor in ANCHORS:
            if all(_is_free(points, {**placed, label: anchor}, label, width * scale, height) for scale in SCALES):
                placed[label] = anchor
                break
    return placed


def label_box(label: str, anchor: str, point: tuple[float, float], width: float, height: float) -> Box:
    """Where the text of a point is drawn, in px."""
    (right, up), long = ANCHORS[anchor], CHARACTER * len(label)
    x, y = point[0] * width, point[1] * height
    left = x + (right * MARKER if right >= 0 else -MARKER - long) - (0 if right else long / 2)
    bottom = y + (up * MARKER if up >= 0 else -MARKER - LINE) - (0 if up else LINE / 2)
    return left, bottom, left + long, bottom + LINE


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes share more than a rim."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _is_free(
    points: Mapping[str, tuple[float, float]], placed: Mapping[str, str], label: str, width: float, height: float
) -> bool:
    box = label_box(label, placed[label], points[label], width, height)
    if box[0] < 0 or box[1] < 0 or box[2] > width or box[3] > height:
        return False
    others = [
        label_box(other, anchor, points[other], width, height) for other, anchor in placed.items() if other != label
    ]
    markers = [
        (x * width - MARKER, y * height - MARKER, x * width + MARKER, y * height + MARKER)
        for other, (x, y) in points.items()
        if other != label
    ]
    return not any(overlap(box, other) for other in [*others, *markers])
