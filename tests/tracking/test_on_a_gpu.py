"""What is measured on a GPU: the same numbers, and no step waits for them."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_peft import AdapterMonitor
from lightning_peft.tracking.cost.meter import CostMeter, StepClock
from lightning_peft.tracking.monitor.norms import StepNorms, trained_groups
from tests.callback.toys import Toy, data, lora, trainer
from tests.tracking.test_cost import LAYERS, flops_with_lora
from tests.tracking.test_monitor import Memory, Oracle
from tests.tracking.test_norms import adapted, brute, parameters_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture
def waits() -> Any:
    """The times so far that the host has waited for the device, as torch tells them."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        yield lambda: len([warning for warning in told if "synchronizing" in str(warning.message)])
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_s_norms_wait_once(waits: Any) -> None:
    model = adapted().cuda()
    groups = trained_groups(model)
    optimizer = torch.optim.SGD([parameter for own in groups.values() for parameter in own], lr=0.1)
    model["head"](model["b"]["q"](model["a"](torch.ones(3, 8, device="cuda")))).square().sum().backward()
    before = [parameter.detach().clone() for parameter in parameters_of(optimizer)]
    start = waits()
    measured = StepNorms(groups)
    measured.before(parameters_of(optimizer))
    assert waits() == start
    optimizer.step()
    result = measured.after()
    assert waits() == start + 1
    change = [after.detach() - value for after, value in zip(parameters_of(optimizer), before, strict=True)]
    assert result.totals()["update_ratio"] == pytest.approx(brute(*change) / brute(*before), rel=1e-5)


def test_training_and_what_is_measured_of_it(tmp_path: Path, waits: Any) -> None:
    class Watched(Toy):
        """Counts the waits between two batches, in which callbacks have their turns."""

        seen: list[int]

        def on_train_batch_start(self, batch: Any, index: int) -> None:
            self.seen = [*getattr(self, "seen", []), waits()]

    def run(*callbacks: Any, **options: Any) -> tuple[Watched, Any]:
        torch.manual_seed(0)
        module, method = Watched(), lora(dropout=0.0, target_modules=[*LAYERS])
        fitting = trainer(tmp_path, *callbacks, accelerator="gpu", devices=1, method=method, **options)
        fitting.fit(module, data(), data(16))
        return module, fitting

    plain, _ = run()
    memory, meter, oracle = Memory(), CostMeter(), Oracle()
    measured, fitting = run(AdapterMonitor(every_n_steps=5), meter, logger=memory, log_every_n_steps=1000)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, measured.state_dict()[name]), name
    # batch 5 is logged after it, and none of 2, 3 and 4 waits more than without
    gaps, usual = (
        [after - before for before, after in itertools.pairwise(seen)] for seen in (measured.seen, plain.seen)
    )
    assert gaps[1:4] == usual[1:4]
    assert 0 < gaps[4] - usual[4] <= 8
    cost = meter.cost(fitting, measured)
    assert cost.step_flops == flops_with_lora()
    assert 0 < cost.step_seconds < 1  # type: ignore[operator]
    assert 0 < cost.peak_memory < 10**9  # type: ignore[operator]
    assert cost.overhead_unmerged > 0  # type: ignore[operator]
    assert cost.overhead_merged > 0  # type: ignore[operator]
    run(oracle, AdapterMonitor(every_n_steps=5), logger=(seen := Memory()))
    assert seen.values("adapter/update_ratio/total") == {
        step: pytest.approx(oracle.ratio[step], rel=1e-6) for step in (4, 9, 14)
    }


def test_events_time_the_device_and_not_the_host() -> None:
    matrix = torch.randn(4096, 4096, device="cuda")

    def work() -> Tensor:
        product = matrix
        for _ in range(20):
            product = product @ matrix
        return product

    work()
    torch.cuda.synchronize()
    clock = StepClock(matrix.device)
    for _ in range(5):
        clock.start()
        work()
        clock.stop()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    assert clock.median() == pytest.approx(begin.elapsed_time(end) / 1000, rel=0.3)
