"""What is compared: runs of several methods over several seeds, each with its report or with why there is none."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_peft.tracking.comparison.report import FORMAT

FULL, PROBE = "full", "probe"
TITLES = {FULL: "full fine-tuning", PROBE: "linear probe"}
"""The baselines by their labels, and what they are called in tables."""
LOWER_IS_BETTER = {"perplexity", "ppl", "nll", "bpb", "bpc", "error", "err", "mae", "mse", "rmse", "mape", "wer", "cer"}
"""Words in the names of metrics, beside those that end in `loss`."""


@dataclass(frozen=True)
class Run:
    """One run of a method with a seed."""

    label: str
    """The method's name, `full`, `probe`, or that of the file which describes a variant."""
    seed: int
    report: Mapping[str, Any] | None
    """What `RunReport` wrote; None where the run did not end well."""
    failure: str = ""
    """What a failed run said last; empty where it did not fail, or has not run yet."""

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """`(optimizer step, value)` of each validation that gave a finite value."""
        return [(step, value) for step, value in self._values(metric) if value is not None]

    def last(self, metric: str) -> float | None:
        """The value of the last validation that gave one; None where it was not finite."""
        values = self._values(metric)
        return values[-1][1] if values else None

    def _values(self, metric: str) -> list[tuple[int, float | None]]:
        points = self.report["validation"] if self.report else []
        values = [(point["step"], point["metrics"][metric]) for point in points if metric in point["metrics"]]
        return [(step, value if value is not None and math.isfinite(value) else None) for step, value in values]


@dataclass(frozen=True)
class Comparison:
    """The runs of one comparison, and what they are compared by."""

    runs: list[Run]
    metric: str
    """A validation metric's name."""
    mode: str
    """`max` or `min`: which of its values is the better one."""
    command: str
    """The command that gives it again."""
    labels: list[str] = field(default_factory=list)
    """The methods in the order in which they were asked for."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What else is worth knowing of it, by name: model, data, budget."""

    def of(self, label: str) -> list[Run]:
        """The runs of a method."""
        return [run for run in self.runs if run.label == label]

    def best(self, run: Run) -> float | None:
        """The best value of a run; None where it has none."""
        values = [value for _, value in run.curve(self.metric)]
        return (max if self.mode == "max" else min)(values, default=None)

    def failed(self) -> list[Run]:
        """The runs that have ended without a report, or whose report lacks the metric."""
        return [run for run in self.runs if self.fault(run)]

    def fault(self, run: Run) -> str:
        """Why a run has no value of the metric; empty where it has one, or has not run yet."""
        if run.report is None or run.curve(self.metric):
            return run.failure
        logged = sorted({name for point in run.report["validation"] for name in point["metrics"]})
        if self.metric in logged:
            return f"{self.metric} was never a finite number"
        return (
            f"{self.metric} was not logged; there {'is' if len(logged) == 1 else 'are'} {', '.join(logged) or 'none'}"
        )


def read_report(path: Path) -> dict[str, Any] | None:
    """The report at `path`; None where there is none, or none that this version reads."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(content, dict) and content.get("format") == FORMAT
    return content if known else None


def title_of(label: str) -> str:
    """What a label is called in tables and plots."""
    return TITLES.get(label, label)


def guessed_mode(metric: str) -> str:
    """`min` for what is known to be the better the lower it is, by a word of its name; else `max`."""
    words = re.split(r"[^a-z0-9]+", metric.lower())
    return "min" if any(word in LOWER_IS_BETTER or word.endswith("loss") for word in words) else "max"


def summary_of(failure: str) -> str:
    """The line of a failure that says what it was: an exception's, or else the last one."""
    lines = [line.strip() for line in failure.strip().splitlines()]
    told = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception|Interrupt)\b|lightning-peft: ", line)]
    return [*lines, *told][-1] if lines else ""
