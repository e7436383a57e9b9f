"""AdapterMonitor on two ranks, with adapters whole on each and with all of a model in parts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import run_ranks

pytestmark = [pytest.mark.xdist_group("devices"), pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(folder, ["-m", "tests.tracking.ranks", folder], timeout=200)
    one, two = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    return one, two


def values(run: Any, name: str) -> list[float]:
    return [row[name] for _, row in run["rows"]]


@pytest.mark.parametrize("strategy", ["peft_ddp", "peft_fsdp"])
def test_the_first_rank_logs_the_mean_gradient_s_norm(found: Any, strategy: str) -> None:
    one, two = found[0][strategy], found[1][strategy]
    assert [step for step, _ in one["rows"]] == [1, 3]
    assert two["rows"] == []
    for step, row in one["rows"]:
        assert row["adapter/grad_norm/total"] == pytest.approx(math.hypot(*one["gradients"][step].values()))
        # it is the same on each rank
        assert row["adapter/grad_norm/total"] == pytest.approx(math.hypot(*two["gradients"][step].values()))
    for name in ("grad_norm/body.0", "weight_norm/total", "update_ratio/head"):
        ddp, fsdp = (values(found[0][kind], f"adapter/{name}") for kind in ("peft_ddp", "peft_fsdp"))
        assert ddp == pytest.approx(fsdp, rel=1e-5)
    assert one["trainable"] == two["trainable"] == 163


def test_of_a_model_in_parts_the_norms_are_those_of_the_whole(found: Any, tmp_path: Path) -> None:
    from tests.tracking.ranks import Sharded, run

    whole, parts = run(tmp_path, Sharded(), "auto", devices=1), found[0]["full"]
    assert found[1]["full"]["rows"] == []
    assert parts["trainable"] == found[1]["full"]["trainable"] == whole["trainable"] == 467
    names = [f"adapter/{name}/{path}" for name in ("grad_norm", "weight_norm") for path in ("body.0", "head", "total")]
    for name in [*names, "adapter/update_ratio/total"]:
        assert values(parts, name) == pytest.approx(values(whole, name), rel=1e-4), name
