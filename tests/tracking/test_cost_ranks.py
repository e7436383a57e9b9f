"""CostMeter under the strategies of several devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft.tracking.cost.overhead import BLOCKS
from tests.processes import run_ranks

pytestmark = [pytest.mark.xdist_group("devices"), pytest.mark.slow, pytest.mark.timeout(200)]


def measured(folder: Path, strategy: str, count: int) -> list[Any]:
    run_ranks(folder, ["-m", "tests.tracking.cost_ranks", folder, strategy], count, timeout=60)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


@pytest.mark.parametrize("strategy", ["ddp", "peft_ddp"])
def test_the_module_that_ddp_wraps_is_timed_and_not_the_step(strategy: str, tmp_path: Path) -> None:
    [found] = measured(tmp_path, strategy, 1)
    assert found["recorded"] == [("Uneven", (8, 8))]
    # pauses are most of the time, with and without adapters
    assert found["unmerged"] == pytest.approx(1, abs=0.5)
    assert found["merged"] == pytest.approx(1, abs=0.5)


def test_ranks_that_hold_parts_run_equally_often(tmp_path: Path) -> None:
    one, two = measured(tmp_path, "peft_fsdp", 2)
    assert one["inferences"] == two["inferences"]
    # two before the turns; in a turn, one that isn't counted and at least two that are
    assert (one["inferences"] - 2) % (2 * BLOCKS) == 0
    assert one["inferences"] >= 2 + 2 * BLOCKS * 3
    for found in (one, two):
        assert found["unmerged"] > 0
        assert found["merged"] is None
