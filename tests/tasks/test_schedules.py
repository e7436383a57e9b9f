from __future__ import annotations

import math

import pytest
import torch

from lightning_peft.tasks.schedules import warmup_cosine


def rates(total: float, warmup_ratio: float, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warmup_cosine(optimizer, total, warmup_ratio)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_rate_rises_in_a_line_and_falls_along_a_cosine() -> None:
    found = rates(10, 0.4, 11)
    assert found[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert found[4:] == pytest.approx([1 + math.cos(math.pi * step / 6) for step in range(7)])


def test_no_warm_up_starts_at_the_top() -> None:
    assert rates(4, 0.0, 5) == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0])


def test_without_an_end_the_rate_stays() -> None:
    assert rates(math.inf, 0.1, 3) == [2.0, 2.0, 2.0]
