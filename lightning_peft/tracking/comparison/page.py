"""A comparison as one HTML page that needs nothing else: its plots are drawn by plotly.js, which it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from lightning_peft.tracking.comparison import plots
from lightning_peft.tracking.comparison.reports import FULL, PROBE, Comparison, title_of
from lightning_peft.tracking.comparison.statistics import Row, rows, verdict
from lightning_peft.tracking.comparison.tables import (
    Column,
    columns,
    format_count,
    format_score,
    format_seconds,
    format_spread,
)

MARKS = {
    "circle": '<circle cx="6" cy="6" r="5"/>',
    "square": '<rect x="1.5" y="1.5" width="9" height="9"/>',
    "diamond": '<path d="M6 0.5 11.5 6 6 11.5 0.5 6z"/>',
    "triangle-up": '<path d="M6 1 11.5 10.5 0.5 10.5z"/>',
    "diamond-tall": '<path d="M6 0 10 6 6 12 2 6z"/>',
    "x": '<path d="M3.5 1 6 3.5 8.5 1 11 3.5 8.5 6 11 8.5 8.5 11 6 8.5 3.5 11 1 8.5 3.5 6 1 3.5z"/>',
}
"""Plotly's symbols, for the page's own texts."""


def page(comparison: Comparison) -> str:
    """The whole page. All texts of a run or configuration are escaped."""
    from plotly.offline import get_plotlyjs

    found = rows(comparison)
    marks = {label: _mark(style) for label, style in plots.styles(comparison.labels).items()}
    title = escape(f"{len(comparison.labels)} methods compared by {comparison.metric}")
    body = "\n".join(
        [
            f"<h1>{title}</h1>",
            f'<p class="soft">{escape(_subtitle(comparison))}</p>',
            _picks(comparison, found, marks),
            _table(comparison, found, marks),
            _chips(comparison, marks),
            _scatters(comparison, found),
            _curves(comparison),
            _heat_maps(found, marks),
            _failures(comparison),
            _reproduce(comparison),
        ]
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{title}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>\n{_own('style.css')}</style>\n<script>{get_plotlyjs()}</script>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n<script>\n{_own('script.js')}</script>\n</body>\n</html>\n"
    )


def _own(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _subtitle(comparison: Comparison) -> str:
    seeds = sorted({run.seed for run in comparison.runs})
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    better = "higher" if comparison.mode == "max" else "lower"
    facts = " on ".join(text for name, text in comparison.facts.items() if name in ("model", "data"))
    what = ", ".join(filter(None, (facts, comparison.facts.get("budget"), which)))
    return f"{what}: the same for each method. {comparison.metric}: {better} is better."


def _picks(comparison: Comparison, found: Sequence[Row], marks: Mapping[str, str]) -> str:
    picked = verdict(found, comparison.mode)
    if picked.best is None or picked.best.quality is None:
        return "<p>No run has ended well yet.</p>"
    several = picked.best.quality.count > 1
    spread = f", spread {format_spread(picked.best.quality)} over {picked.best.quality.count} seeds" if several else ""
    cards = [("Best quality", picked.best, f"{comparison.metric} {format_score(picked.best.quality)}{spread}")]
    if picked.smallest is not None:
        near = "within the spread of the best" if several else "with one seed, there is no spread to be within"
        near = "and no smaller one is within its spread" if several and picked.smallest is picked.best else near
        trained = f"{format_count(picked.smallest.trainable)} parameters train"
        why = f"{trained}, {_quality(comparison, picked.smallest)}, {near}"
        cards.append(("Smallest that is as good", picked.smallest, why))
    if picked.fastest is not None:
        timed = picked.fastest.step_seconds
        taken = f"{format_seconds(timed)} a step" if timed else f"{format_seconds(picked.fastest.seconds)} of training"
        cards.append(("Fastest", picked.fastest, f"{taken}, {_quality(comparison, picked.fastest)}"))
    made = [
        f'<div class="card pick"><div class="what">{what}</div>'
        f'<div class="who">{marks[row.label]}{escape(row.title)}</div><div class="why">{escape(why)}</div></div>'
        for what, row, why in cards
    ]
    return f'<div class="grid">{"".join(made)}</div>'


def _quality(comparison: Comparison, row: Row) -> str:
    return f"{comparison.metric} {format_score(row.quality)}"


def _table(comparison: Comparison, found: Sequence[Row], marks: Mapping[str, str]) -> str:
    shown = columns(comparison, found)
    head = "".join(f'<th title="{escape(column.meaning)}">{escape(column.title)}</th>' for column in shown)
    best = verdict(found, comparison.mode).best
    cells = (
        "".join(_cell(column, row, marks, row is best and column.title == comparison.metric) for column in shown)
        for row in found
    )
    lines = "".join(f"<tr>{line}</tr>" for line in cells)
    return (
        "<h2>Results</h2>\n"
        '<p class="note">Quality is the best of each run, mean over seeds; the spread goes from the least seed to the '
        "greatest.</p>\n"
        f'<div class="card wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _cell(column: Column, row: Row, marks: Mapping[str, str], is_best: bool) -> str:
    text = escape(column.text(row))
    if column.title == "method":
        return f"<td><span>{marks[row.label]}{text}</span></td>"
    return f'<td class="best">{text}</td>' if is_best else f"<td>{text}</td>"


def _chips(comparison: Comparison, marks: Mapping[str, str]) -> str:
    made = [
        f'<button class="chip" type="button" aria-pressed="true" data-label="{escape(label)}" '
        f'title="show or hide in all plots">{marks[label]}{escape(title_of(label))}</button>'
        for label in comparison.labels
    ]
    return f'<h2>Quality and cost</h2>\n<div class="chips">{"".join(made)}</div>'


def _scatters(comparison: Comparison, found: Sequence[Row]) -> str:
    made = {
        "Trained parameters": plots.scatter(
            found, comparison, lambda row: row.trainable, "trained parameters", log=True
        ),
        "Time": plots.scatter(found, comparison, lambda row: row.step_seconds, "ms for a step, median", factor=1e3),
        "Memory": plots.scatter(found, comparison, lambda row: row.peak_memory, "MB at the peak", factor=1e-6),
    }
    note = (
        "Ringed points are on the Pareto front: no other method is at least as good and as cheap. Bars go from the "
        "least seed to the greatest."
    )
    missing = [name.lower() for name, figure in made.items() if figure is None]
    if missing:
        note += f" There is no plot of {' and '.join(missing)}, which no run here has measured."
    return f'<p class="note">{note}</p>\n{_grid(made)}'


def _curves(comparison: Comparison) -> str:
    made = {
        f"{comparison.metric} on the validation data": plots.validation_curves(comparison),
        "Training loss": plots.training_curves(comparison),
    }
    if not any(made.values()):
        return ""
    return (
        '<h2>Learning curves</h2>\n<p class="note">Means over seeds; bands go from the least to the greatest.</p>\n'
        + _grid(made)
    )


def _heat_maps(found: Sequence[Row], marks: Mapping[str, str]) -> str:
    made = [(row, figure) for row in found if row.label not in (FULL, PROBE) and (figure := plots.heat_map(row))]
    if not made:
        return ""
    cards = [
        _card(f"{marks[row.label]} {escape(row.title)} <span class='soft'>· {_kind(row)}</span>", figure, row.title)
        for row, figure in made
    ]
    return (
        '<h2>The adapters, layer by layer</h2>\n<p class="note">At the end of training, mean over seeds: a row for '
        "each layer, a column for each kind of module.</p>\n"
        f'<div class="grid maps">{"".join(cards)}</div>'
    )


def _kind(row: Row) -> str:
    return "rank left" if row.layers_are == "rank" else "L2 norm of its tensors"


def _failures(comparison: Comparison) -> str:
    failed = comparison.failed()
    waiting = [run for run in comparison.runs if run.report is None and not run.failure]
    parts = [
        f'<div class="card"><details><summary>{escape(title_of(run.label))}, seed {run.seed}</summary>'
        f"<pre>{escape(comparison.fault(run))}</pre></details></div>"
        for run in failed
    ]
    if waiting:
        names = ", ".join(f"{title_of(run.label)} (seed {run.seed})" for run in waiting)
        parts.append(f'<div class="card">Not run yet: {escape(names)}. The command below goes on with them.</div>')
    if not parts:
        return ""
    return f"<h2>Failures</h2>\n<div class='grid'>{''.join(parts)}</div>"


def _reproduce(comparison: Comparison) -> str:
    facts = {**comparison.facts, **_from_reports(comparison)}
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return (
        f'<h2>How to get this again</h2>\n<div class="card"><pre>{escape(comparison.command)}</pre>'
        f"<dl>{listed}</dl></div>\n"
        '<p class="note" style="margin-top:10px">Beside this page: results.csv and results.json with every number, '
        "results.md, and in runs/ each run's configuration, log and report.</p>"
    )


def _from_reports(comparison: Comparison) -> dict[str, str]:
    reports = [run.report for run in comparison.runs if run.report]
    devices = ", ".join(dict.fromkeys(report["device"] for report in reports))
    versions = dict.fromkeys(
        ", ".join(f"{name} {number}" for name, number in report["versions"].items()) for report in reports
    )
    return {name: text for name, text in (("device", devices), ("versions", "; ".join(versions))) if text}


def _grid(made: Mapping[str, Any]) -> str:
    cards = [_card(escape(title), figure, title) for title, figure in made.items() if figure is not None]
    return f'<div class="grid">{"".join(cards)}</div>'


def _card(title: str, figure: Any, name: str) -> str:
    # `<` is written otherwise, so that no text in it can end the element
    data = figure.to_json().replace("<", "\\u003c")
    return (
        f'<figure class="card"><h3>{title}</h3><div class="plot" role="img" aria-label="{escape(name)}" '
        f'style="height:{figure.layout.height}px"></div><script type="application/json">{data}</script></figure>'
    )


def _mark(style: Mapping[str, str]) -> str:
    shape = MARKS[style["symbol"]]
    return f'<svg class="mark" viewBox="0 0 12 12" aria-hidden="true" fill="{style["color"]}">{shape}</svg>'
