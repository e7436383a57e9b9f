"""configs/sweep.yaml: W&B's own validator takes it; tests/tracking/test_wandb_fit.py runs the command that its agent
builds of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

CONFIGS = Path(__file__).parents[1] / "configs"
TEXT = (CONFIGS / "sweep.yaml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sweeps() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its classes are of pydantic's first version
        return pytest.importorskip("sweeps")


@pytest.fixture
def sweep() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(TEXT)
    return content


def test_it_is_short_and_says_how_to_launch_it() -> None:
    assert "wandb sweep configs/sweep.yaml" in TEXT.split("name:")[0]
    assert len(TEXT.splitlines()) <= 50


def test_the_schema_of_wandb_takes_it(sweeps: Any, sweep: dict[str, Any]) -> None:
    assert sweeps.schema_violations_from_proposed_config(sweep) == []
    assert sweeps.schema_violations_from_proposed_config({**sweep, "goal": 1}) != []


def test_what_it_optimizes_is_what_the_configuration_saves_by(sweep: dict[str, Any]) -> None:
    base = sweep["command"][sweep["command"].index("--config") + 1]
    [saver] = yaml.safe_load((CONFIGS.parent / base).read_text())["trainer"]["callbacks"]
    assert saver["init_args"]["monitor"] == sweep["metric"]["name"]
    assert sweep["metric"]["goal"].startswith(saver["init_args"]["mode"])


def test_a_run_that_is_behind_is_stopped_before_its_last_epoch(sweeps: Any, sweep: dict[str, Any]) -> None:
    runs = [
        sweeps.SweepRun(name=str(rank), state="running", sampledHistory=[{"val_accuracy": 0.1 * rank}] * 2, config={})
        for rank in range(6)
    ]
    stopped = sweeps.stop_runs(sweeps.SweepConfig(sweep), runs)
    assert {run.name for run in stopped} >= {"0", "1"}
    assert "5" not in {run.name for run in stopped}
