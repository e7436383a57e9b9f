"""The plots of a comparison, by plotly."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from lightning_peft.tracking.comparison.labels import place_labels
from lightning_peft.tracking.comparison.reports import FULL, PROBE, Comparison, title_of
from lightning_peft.tracking.comparison.statistics import Row, Score, band, pareto

COLORS = (
    "#4c78d8", "#e8763a", "#2fa36b", "#c95bbf", "#d9a514", "#19a7b8", "#e0526a", "#8a6fe0", "#7fa32b", "#a9764f",
)  # fmt: skip
"""Of the methods in turn; they can be told from a white ground and from a dark one."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up")
"""One for each round through the colours."""
GREY = "#8b93a1"
"""Of the baselines."""
HEIGHT = 340
MARGINS = {"l": 58, "r": 14, "t": 14, "b": 50}
NARROWEST = 210
"""The inner width of a scatter plot on a small phone, in px."""
Value = Callable[[Row], "Score | float | None"]


def styles(labels: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour and symbol of each method, the same in all plots."""
    methods = [label for label in labels if label not in (FULL, PROBE)]
    made = {
        label: {"color": COLORS[index % len(COLORS)], "symbol": SYMBOLS[index // len(COLORS) % len(SYMBOLS)]}
        for index, label in enumerate(methods)
    }
    return made | {FULL: {"color": GREY, "symbol": "diamond-tall"}, PROBE: {"color": GREY, "symbol": "x"}}


def scatter(
    found: Sequence[Row], comparison: Comparison, value: Value, title: str, *, factor: float = 1.0, log: bool = False
) -> Any:
    """The quality of each method against what it costs, with the range over its seeds and the Pareto front; None where
    no row has both.

    Args:
        found: the rows.
        comparison: what is compared.
        value: a row's cost.
        title: of the cost's axis, with its unit.
        factor: by which costs are multiplied for that unit.
        log: whether costs are drawn on a logarithmic axis.
    """
    import plotly.graph_objects as go

    both = {
        row.label: (cost.scaled(factor), row.quality)
        for row in found
        if row.quality and (cost := _as_score(value(row))) is not None and (cost.low > 0 or not log)
    }
    if not both:
        return None
    style = styles(comparison.labels)
    x_range = _range([edge for cost, _ in both.values() for edge in (cost.low, cost.high)], log)
    y_range = _range([edge for _, quality in both.values() for edge in (quality.low, quality.high)], False)

    def inner(cost: float, quality: float) -> tuple[float, float]:
        across = math.log10(cost) if log else cost
        return (across - x_range[0]) / (x_range[1] - x_range[0]), (quality - y_range[0]) / (y_range[1] - y_range[0])

    front = pareto({label: (cost.mean, quality.mean) for label, (cost, quality) in both.items()}, comparison.mode)
    titles = {label: title_of(label) for label in both}
    places = {titles[label]: inner(cost.mean, quality.mean) for label, (cost, quality) in both.items()}
    order = [titles[label] for label in [*front, *both]]
    anchors = place_labels(places, list(dict.fromkeys(order)), NARROWEST, HEIGHT - MARGINS["t"] - MARGINS["b"])
    figure = go.Figure()
    figure.add_scatter(
        x=[both[label][0].mean for label in front],
        y=[both[label][1].mean for label in front],
        mode="lines",
        line={"color": GREY, "width": 1.5, "dash": "dot", "shape": "hv"},
        name="Pareto front",
        meta="front",
        hoverinfo="skip",
    )
    for label, (cost, quality) in both.items():
        name = escape(titles[label])
        shown = titles[label] in anchors
        figure.add_scatter(
            x=[cost.mean],
            y=[quality.mean],
            mode="markers+text" if shown else "markers",
            text=[name],
            textposition=anchors.get(titles[label], "top center"),
            textfont={"size": 11},
            marker={**style[label], "size": 11, "line": {"width": 2 if label in front else 0, "color": "#111"}},
            error_x=_bars(cost, style[label]["color"]),
            error_y=_bars(quality, style[label]["color"]),
            name=name,
            meta=label,
            cliponaxis=False,
            hovertemplate=f"<b>{name}</b><br>{escape(comparison.metric)} %{{y:.4f}}<br>{escape(title)} %{{x:,.4~s}}"
            f"{'<br>on the Pareto front' if label in front else ''}<extra></extra>",
        )
    _lay_out(figure, title, comparison.metric)
    figure.update_xaxes(range=x_range, type="log" if log else "linear", exponentformat="SI")
    if log:
        # one tick at each power of ten; 2 and 5 between them where there are few
        figure.update_xaxes(dtick=1 if x_range[1] - x_range[0] > 1.5 else "D2")
    figure.update_yaxes(range=y_range)
    return figure


def validation_curves(comparison: Comparison) -> Any:
    """The metric over optimizer steps: each method's mean, and from the least to the greatest of its seeds."""
    curves = {label: [run.curve(comparison.metric) for run in comparison.of(label)] for label in comparison.labels}
    return _curves(comparison, curves, comparison.metric, markers=True)


def training_curves(comparison: Comparison) -> Any:
    """The training loss over optimizer steps, smoothed; None where no run has one."""
    curves = {
        label: [
            _smooth([(point["step"], point["loss"]) for point in run.report["train"] if point["loss"] is not None])
            for run in comparison.of(label)
            if run.report
        ]
        for label in comparison.labels
    }
    return _curves(comparison, curves, "training loss, smoothed", markers=False)


def _curves(
    comparison: Comparison, curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]], title: str, markers: bool
) -> Any:
    import plotly.graph_objects as go

    bands = {label: points for label, own in curves.items() if (points := band(own))}
    if not bands:
        return None
    style, figure = styles(comparison.labels), go.Figure()
    for label, points in bands.items():
        steps = [step for step, _ in points]
        if any(value.spread for _, value in points):
            figure.add_scatter(
                x=[*steps, *reversed(steps)],
                y=[*(value.high for _, value in points), *(value.low for _, value in reversed(points))],
                fill="toself",
                fillcolor=_faint(style[label]["color"]),
                line={"width": 0},
                mode="lines",
                meta=label,
                hoverinfo="skip",
            )
    for label, points in bands.items():
        name = escape(title_of(label))
        figure.add_scatter(
            x=[step for step, _ in points],
            y=[value.mean for _, value in points],
            mode="lines+markers" if markers else "lines",
            line={"color": style[label]["color"], "width": 2, "dash": "dash" if label in (FULL, PROBE) else "solid"},
            marker={**style[label], "size": 7},
            name=name,
            meta=label,
            hovertemplate=f"<b>{name}</b><br>step %{{x}}: %{{y:.4f}}<extra></extra>",
        )
    _lay_out(figure, "optimizer steps", title)
    figure.update_xaxes(rangemode="tozero")
    return figure


def heat_map(row: Row) -> Any:
    """The norms or ranks of a method's adapters, layer by layer; None where there is but one adapter."""
    import plotly.graph_objects as go

    if len(row.layers) < 2:
        return None
    down, across, values = layer_grid(row.layers)
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=[escape(name) for name in across],
            y=[escape(name) for name in down],
            colorscale="Viridis",
            xgap=2,
            ygap=2,
            colorbar={"thickness": 10, "outlinewidth": 0, "tickfont": {"size": 10}, "nticks": 5},
            hovertemplate=f"layer %{{y}}, %{{x}}<br>{row.layers_are} %{{z:.4g}}<extra></extra>",
            hoverongaps=False,
        )
    )
    longest = max(map(len, across))
    tilted = longest * 6 * len(across) > NARROWEST
    below = 24 + round(longest * (4.4 if tilted else 0))
    tall = min(22.0, max(9.0, 500 / len(down)))
    figure.update_layout(
        height=40 + below + max(90, round(tall * len(down))),
        margin={"l": 12 + 7 * max(map(len, down)), "r": 8, "t": 12, "b": below},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_xaxes(type="category", tickangle=45 if tilted else 0, tickfont={"size": 10}, showgrid=False)
    figure.update_yaxes(
        type="category", autorange="reversed", tickfont={"size": 10}, showgrid=False, dtick=math.ceil(12 / tall)
    )
    return figure


def layer_grid(layers: Mapping[str, float]) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Values by path as a grid: a row for each layer, a column for each kind of module; None where there is none.

    A path's first number is its layer's; what is in front of it is told only where it differs, and kinds by as much of
    their ends as tells them apart. Paths without a number have a row of their own.
    """
    parsed = {path: _split(path) for path in layers}
    fronts = list(dict.fromkeys(front for front, number, _ in parsed.values() if number))
    kinds = list(dict.fromkeys(kind for _, _, kind in parsed.values()))
    short = dict(zip(kinds, _told_apart(kinds), strict=True))
    fronts_short = dict(zip(fronts, _told_apart(fronts), strict=True))

    def row_of(front: str, number: str) -> str:
        return (f"{fronts_short[front]} {number}" if len(fronts) > 1 else number) if number else "–"

    numbered = sorted((fronts.index(front), int(number), front) for front, number, _ in parsed.values() if number)
    down = list(dict.fromkeys(row_of(front, str(number)) for _, number, front in numbered))
    down += [] if all(number for _, number, _ in parsed.values()) else [row_of("", "")]
    across = [short[kind] for kind in kinds]
    cells = {(row_of(front, number), short[kind]): layers[path] for path, (front, number, kind) in parsed.items()}
    return down, across, [[cells.get((row, column)) for column in across] for row in down]


def _split(path: str) -> tuple[str, str, str]:
    """What is in front of a path's first number, the number, and what is behind it."""
    found = re.fullmatch(r"(?:(.*?)\.)?(\d+)(?:\.(.*))?", path)
    if found is None:
        return "", "", path
    return found[1] or "", found[2], found[3] or "layer"


def _told_apart(paths: Sequence[str]) -> list[str]:
    """The ends of paths, each as short as tells it from all others."""

    def end(path: str) -> str:
        parts = path.split(".")
        ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        others = [f".{other}" for other in paths if other != path]
        return next((end for end in ends if not any(other.endswith(f".{end}") for other in others)), path)

    return [end(path) for path in paths]


def _as_score(value: Score | float | None) -> Score | None:
    return Score(value, value, value, 1) if isinstance(value, (int, float)) else value


def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
    """The ends of an axis, with some room: in powers of ten on a logarithmic one."""
    known = [math.log10(value) for value in values] if log else list(values)
    low, high = min(known), max(known)
    room = 0.12 * (high - low) or (0.5 if log else 0.1 * abs(high) or 1.0)
    return low - room, high + room


def _bars(value: Score, color: str) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [value.high - value.mean],
        "arrayminus": [value.mean - value.low],
        "visible": value.count > 1,
        "color": color,
        "thickness": 1.2,
        "width": 3,
    }


def _smooth(points: Sequence[tuple[int, float]], weight: float = 0.7) -> list[tuple[int, float]]:
    """An exponential average that is not drawn to 0 at its start."""
    made, total, mass = [], 0.0, 0.0
    for step, value in points:
        total, mass = weight * total + value, weight * mass + 1
        made.append((step, total / mass))
    return made


def _faint(color: str) -> str:
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.14)"


def _lay_out(figure: Any, across: str, up: str) -> None:
    figure.update_layout(
        height=HEIGHT,
        margin=MARGINS,
        showlegend=False,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hovermode="closest",
    )
    figure.update_xaxes(title={"text": escape(across), "standoff": 8}, zeroline=False)
    figure.update_yaxes(title={"text": escape(up), "standoff": 4}, zeroline=False)
