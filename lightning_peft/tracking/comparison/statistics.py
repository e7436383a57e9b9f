"""Means, spreads and fronts over the runs of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_peft.tracking.comparison.reports import Comparison, Run, title_of


@dataclass(frozen=True)
class Score:
    """A number over seeds: its mean, least and greatest value."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def spread(self) -> float:
        """From the least to the greatest value."""
        return self.high - self.low

    def scaled(self, factor: float) -> Score:
        """In another unit."""
        return Score(factor * self.mean, factor * self.low, factor * self.high, self.count)


@dataclass(frozen=True)
class Row:
    """One method over its seeds; a number that no run has is None."""

    label: str
    asked: int
    """Runs that were asked for."""
    quality: Score | None
    """The compared metric's best value of each run."""
    last: Score | None
    """The same at the end of each run, where it was finite there."""
    trainable: float | None
    total: float | None
    learning_rate: float | None
    seconds: Score | None
    """Training as a whole, validation included."""
    step_seconds: Score | None
    """The median step of each run."""
    peak_memory: Score | None
    """Bytes."""
    checkpoint_bytes: float | None
    step_flops: float | None
    overhead_unmerged: Score | None
    """Inference beside that of the bare base: 1 is as long."""
    overhead_merged: Score | None
    layers: Mapping[str, float] = field(default_factory=dict)
    """By an adapted module's path: the mean of its ranks where the method changes them, else of its norms."""
    layers_are: str = "norm"

    @property
    def title(self) -> str:
        """What the method is called."""
        return title_of(self.label)


def score(values: Sequence[float | None]) -> Score | None:
    """Over those of `values` that are known; None where none is."""
    known = [float(value) for value in values if value is not None]
    return Score(statistics.fmean(known), min(known), max(known), len(known)) if known else None


def rows(comparison: Comparison) -> list[Row]:
    """A row for each method, the best quality first, and those without any last."""
    made = [_row(comparison, label) for label in comparison.labels]
    sign = -1 if comparison.mode == "max" else 1
    return sorted(made, key=lambda row: (row.quality is None, sign * row.quality.mean if row.quality else 0.0))


def _row(comparison: Comparison, label: str) -> Row:
    runs = comparison.of(label)
    good = [run for run in runs if run.curve(comparison.metric)]

    def cost(name: str) -> Score | None:
        return score([_report(run)["cost"].get(name) for run in good])

    def same(found: Score | None) -> float | None:
        return found.mean if found else None

    ranked = any(_report(run)["ranks"] for run in good)
    layers = _mean_by_key([_report(run)["ranks" if ranked else "norms"] for run in good])
    return Row(
        label=label,
        asked=len(runs),
        quality=score([comparison.best(run) for run in good]),
        last=score([run.last(comparison.metric) for run in good]),
        trainable=same(cost("trainable")),
        total=same(cost("total")),
        learning_rate=same(score([_report(run)["learning_rate"] for run in good])),
        seconds=score([_report(run)["seconds"] for run in good]),
        step_seconds=cost("step_seconds"),
        peak_memory=cost("peak_memory"),
        checkpoint_bytes=same(cost("checkpoint_bytes")),
        step_flops=same(cost("step_flops")),
        overhead_unmerged=cost("overhead_unmerged"),
        overhead_merged=cost("overhead_merged"),
        layers=layers,
        layers_are="rank" if ranked else "norm",
    )


def _report(run: Run) -> Mapping[str, Any]:
    assert run.report is not None
    return run.report


def _mean_by_key(parts: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    # a weight that has become NaN is null in a report
    keys = dict.fromkeys(key for part in parts for key in part)
    means = {key: score([part.get(key) for part in parts]) for key in keys}
    return {key: found.mean for key, found in means.items() if found is not None}


def pareto(points: Mapping[str, tuple[float, float]], mode: str) -> list[str]:
    """The front of the points `(cost, quality)`: those that no other is at least as good as in both, and better in
    one; the least cost first. Of points that are the same all are kept.

    Args:
        points: by label.
        mode: `max` or `min`: which quality is the better one; the lower cost is always.
    """
    sign = 1 if mode == "max" else -1
    signed = {label: (cost, sign * quality) for label, (cost, quality) in points.items()}

    def beaten(point: tuple[float, float]) -> bool:
        return any(o != point and o[0] <= point[0] and o[1] >= point[1] for o in signed.values())

    return sorted((label for label, point in signed.items() if not beaten(point)), key=lambda label: signed[label])


def band(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, Score]]:
    """The mean of several curves, with their least and greatest values, at each step that any of them has."""
    steps = sorted({step for curve in curves for step, _ in curve})
    at: list[dict[int, float]] = [dict(curve) for curve in curves]
    found = ((step, score([curve.get(step) for curve in at])) for step in steps)
    return [(step, value) for step, value in found if value is not None]


@dataclass(frozen=True)
class Verdict:
    """Which method to take, by what is asked for; each is None where nothing tells."""

    best: Row | None
    smallest: Row | None
    """The fewest trained parameters of those whose mean is within the best one's spread of it."""
    fastest: Row | None
    """The shortest median step, or the shortest training where no step was measured."""


def verdict(found: Sequence[Row], mode: str) -> Verdict:
    """What the rows of a comparison come to.

    Args:
        found: the rows, the best first, as `rows` gives them.
        mode: `max` or `min`: which quality is the better one.
    """
    scored = [row for row in found if row.quality]
    if not scored:
        return Verdict(None, None, None)
    top = scored[0].quality
    assert top is not None
    sign = 1 if mode == "max" else -1
    near = [row for row in scored if row.quality and sign * (top.mean - row.quality.mean) <= top.spread]
    smallest = _least(near, lambda row: row.trainable)
    timed = _least(scored, lambda row: row.step_seconds.mean if row.step_seconds else None)
    fastest = timed or _least(scored, lambda row: row.seconds.mean if row.seconds else None)
    return Verdict(scored[0], smallest, fastest)


def _least(found: Sequence[Row], key: Callable[[Row], float | None]) -> Row | None:
    known = [(value, index, row) for index, row in enumerate(found) if (value := key(row)) is not None]
    return min(known)[2] if known else None
