"""A comparison as CSV, JSON and Markdown, and as a table for a terminal."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_peft.tracking.comparison.reports import Comparison, summary_of, title_of
from lightning_peft.tracking.comparison.statistics import Row, Score, rows, verdict
from lightning_peft.tracking.tables import format_bytes

RUN_COLUMNS = ("method", "seed", "state", "best", "last", "learning_rate", "steps", "seconds")
COST_COLUMNS = (
    "trainable",
    "total",
    "step_flops",
    "step_seconds",
    "peak_memory",
    "checkpoint_bytes",
    "overhead_unmerged",
    "overhead_merged",
)

FIRST_LEFT_OUT = (
    "last", "inference", "when merged", "share", "checkpoint", "learning rate", "training", "peak memory", "spread",
)  # fmt: skip
"""Columns that a narrow terminal does without, the first first."""


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of the table of methods."""

    title: str
    text: Callable[[Row], str]
    meaning: str
    """For whoever points at the title."""


def columns(comparison: Comparison, found: Sequence[Row]) -> list[Column]:
    """The columns that any row has something for."""
    made = [
        Column(
            "method", lambda row: row.title, "the method with its defaults, or with the fields of the configuration"
        ),
        Column(comparison.metric, lambda row: format_score(row.quality), "the best of each run; mean over seeds"),
        Column("spread", lambda row: format_spread(row.quality), "from the least to the greatest of the seeds"),
        Column("last", lambda row: format_number(row.last), "at the end of training; mean over seeds"),
        Column("trained", lambda row: format_count(row.trainable), "parameters that train"),
        Column("share", _share, "of all parameters"),
        Column("learning rate", lambda row: format_rate(row.learning_rate), "of the optimizer, at its highest"),
        Column("time a step", lambda row: format_seconds(row.step_seconds), "the median step; mean over seeds"),
        Column("training", lambda row: format_seconds(row.seconds), "with its validations; mean over seeds"),
        Column("peak memory", lambda row: _bytes(row.peak_memory), "while training; mean over seeds"),
        Column("checkpoint", lambda row: _bytes(row.checkpoint_bytes), "its file"),
        Column(
            "inference", lambda row: _slower(row.overhead_unmerged), "its time with adapters, beside the bare base's"
        ),
        Column("when merged", lambda row: _slower(row.overhead_merged), "the same once the adapters are merged"),
        Column("runs", lambda row: f"{row.quality.count if row.quality else 0}/{row.asked}", "that ended well"),
    ]
    return [column for column in made if any(column.text(row) for row in found)]


def terminal_table(comparison: Comparison, width: int) -> Table:
    """The table of methods, the best first, with as many columns as `width` characters have room for."""
    found = rows(comparison)
    shown = columns(comparison, found)
    console = Console(width=1000)
    for left_out in (None, *FIRST_LEFT_OUT):
        shown = [column for column in shown if column.title != left_out]
        table = _terminal_table(comparison, shown, found)
        if console.measure(table).maximum <= width:
            break
    return table


def _terminal_table(comparison: Comparison, shown: Sequence[Column], found: Sequence[Row]) -> Table:
    better = "higher" if comparison.mode == "max" else "lower"
    # without a title, whose length would count as the table's
    table = Table(caption=escape(f"{comparison.metric}: {better} is better"), caption_justify="left")
    for index, column in enumerate(shown):
        table.add_column(escape(column.title), justify="left" if index == 0 else "right")
    for row in found:
        table.add_row(*(escape(column.text(row)) for column in shown))
    return table


def csv_text(comparison: Comparison) -> str:
    """A line for each run, the failed ones too; numbers in full, in seconds and bytes."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [*RUN_COLUMNS, *COST_COLUMNS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(run_records(comparison))
    return file.getvalue()


def run_records(comparison: Comparison) -> list[dict[str, Any]]:
    """What is known of each run; None where nothing is."""
    made = []
    for run in comparison.runs:
        report = run.report or {}
        state = "failed" if comparison.fault(run) else "finished" if report else "not run"
        record: dict[str, Any] = {"method": run.label, "seed": run.seed, "state": state}
        record["best"] = comparison.best(run)
        record["last"] = run.last(comparison.metric)
        record |= {name: report.get(name) for name in ("learning_rate", "steps", "seconds")}
        made.append(record | {name: report.get("cost", {}).get(name) for name in COST_COLUMNS})
    return made


def content(comparison: Comparison) -> dict[str, Any]:
    """All of it, for JSON: what was compared, a record for each method and each run, and why runs failed."""
    found = rows(comparison)
    picked = verdict(found, comparison.mode)
    picks = {field.name: getattr(picked, field.name) for field in dataclasses.fields(picked)}
    return {
        "metric": comparison.metric,
        "mode": comparison.mode,
        "command": comparison.command,
        "methods": [dataclasses.asdict(row) for row in found],
        "picks": {name: row.label if row else None for name, row in picks.items()},
        "runs": run_records(comparison),
        "failures": [
            {"method": run.label, "seed": run.seed, "why": comparison.fault(run)} for run in comparison.failed()
        ],
    }


def markdown(comparison: Comparison) -> str:
    """The verdict, the table of methods, and what failed."""
    found = rows(comparison)
    shown = columns(comparison, found)
    lines = [*(f"- {line}" for line in verdict_lines(comparison)), ""]
    lines.append("| " + " | ".join(column.title for column in shown) + " |")
    lines.append("|---|" + "---:|" * (len(shown) - 1))
    lines += ["| " + " | ".join(column.text(row).replace("|", "\\|") for column in shown) + " |" for row in found]
    for run in comparison.failed():
        lines += ["", f"{title_of(run.label)}, seed {run.seed}, failed: {summary_of(comparison.fault(run))}"]
    return "\n".join([*lines, "", f"    {comparison.command}", ""])


def verdict_lines(comparison: Comparison) -> list[str]:
    """The verdict in plain words: a sentence for each thing that may be asked for."""
    picked = verdict(rows(comparison), comparison.mode)
    if picked.best is None or picked.best.quality is None:
        return ["No run has ended well yet."]
    quality = picked.best.quality
    seeds = f"mean of {quality.count} seeds, spread {format_spread(quality)}" if quality.count > 1 else "one seed"
    lines = [f"Best {comparison.metric}: {picked.best.title} with {format_score(quality)} ({seeds})."]
    if picked.smallest is not None:
        where = "within the spread of the best" if quality.count > 1 else "one seed gives no spread to compare within"
        where = "no smaller one is within its spread" if quality.count > 1 and picked.smallest is picked.best else where
        trained = format_count(picked.smallest.trainable)
        lines.append(f"Smallest as good: {picked.smallest.title} with {trained} parameters ({where}).")
    if picked.fastest is not None:
        taken = picked.fastest.step_seconds or picked.fastest.seconds
        what = "a step" if picked.fastest.step_seconds else "training"
        lines.append(
            f"Fastest: {picked.fastest.title} with {format_seconds(taken)} for {what} "
            f"({comparison.metric} {format_score(picked.fastest.quality)})."
        )
    return lines


def format_number(value: Score | None) -> str:
    """`0.703`, `12.4`, `1.2e-05`: four digits, of which three behind the point."""
    if value is None:
        return ""
    return f"{value.mean:.3f}" if 0.01 <= abs(value.mean) < 10 or value.mean == 0 else f"{value.mean:.4g}"


def format_score(value: Score | None) -> str:
    """As `format_number`; a dash where there is none."""
    return format_number(value) or "–"


def format_spread(value: Score | None) -> str:
    """The spread over more than one seed."""
    if value is None or value.count < 2:
        return ""
    return f"{value.spread:.3f}" if 0.001 <= value.spread < 10 or value.spread == 0 else f"{value.spread:.2g}"


def format_rate(rate: float | None) -> str:
    """`1e-3`, `2.5e-4`."""
    if not rate:
        return ""
    mantissa, _, exponent = f"{rate:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def format_seconds(value: Score | None) -> str:
    """`85 ms`, `12.3 s`, `4 min 10 s`, `2 h 5 min`."""
    if value is None:
        return ""
    seconds = value.mean
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def format_count(number: float | None) -> str:
    """`147,456`."""
    return "" if number is None else f"{number:,.0f}"


def _share(row: Row) -> str:
    if row.trainable is None or not row.total:
        return ""
    return f"{100 * row.trainable / row.total:.3g} %"


def _bytes(value: Score | float | None) -> str:
    number = value.mean if isinstance(value, Score) else value
    return "" if number is None else format_bytes(number)


def _slower(value: Score | None) -> str:
    return "" if value is None else f"× {value.mean:.2f}"
