"""Runs of several methods side by side: their statistics, tables and plots."""

from lightning_peft.tracking.comparison.reports import (
    FULL,
    PROBE,
    Comparison,
    Run,
    guessed_mode,
    read_report,
    summary_of,
    title_of,
)
from lightning_peft.tracking.comparison.results import write_results
from lightning_peft.tracking.comparison.tables import terminal_table, verdict_lines

__all__ = [
    "FULL",
    "PROBE",
    "Comparison",
    "Run",
    "guessed_mode",
    "read_report",
    "summary_of",
    "terminal_table",
    "title_of",
    "verdict_lines",
    "write_results",
]
