"""The files of a comparison."""

from __future__ import annotations

from pathlib import Path

from lightning_peft.tracking.comparison.page import page
from lightning_peft.tracking.comparison.report import write_json, write_text
from lightning_peft.tracking.comparison.reports import Comparison
from lightning_peft.tracking.comparison.tables import content, csv_text, markdown


def write_results(comparison: Comparison, folder: Path) -> None:
    """Write `results.csv` (a line a run), `results.json`, `results.md` and `results.html` into `folder`, each whole.

    The page holds plotly.js and so takes 5 MB; it needs no network.

    Raises:
        ModuleNotFoundError: plotly is not installed.
    """
    write_text(folder / "results.csv", csv_text(comparison))
    write_json(folder / "results.json", content(comparison))
    write_text(folder / "results.md", markdown(comparison))
    write_text(folder / "results.html", page(comparison))
