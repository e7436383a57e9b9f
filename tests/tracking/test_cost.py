"""What a run costs, against counts by hand; and that measuring it leaves no trace."""

from __future__ import annotations

import csv
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_peft import PEFT, Houlsby, LoRA, disable_adapters, trainable_parameters
from lightning_peft.state import adapter_tensors, rng_state
from lightning_peft.tracking.cost.memory import peak_memory
from lightning_peft.tracking.cost.meter import FIRST_STEPS, Cost, CostMeter, StepClock, checkpoint_bytes
from lightning_peft.tracking.cost.overhead import Recording, inference_overhead
from lightning_peft.tracking.cost.unchanged import unchanged
from tests.callback.toys import Decoder, Manual, Toy, data, lora, trainer

BATCH, RANK = 8, 2
LAYERS = {"body.0": (8, 16), "body.4": (16, 16)}
HEAD = 2 * BATCH * 16 * 3


def products(inputs: int, outputs: int) -> int:
    """FLOPs of a batch through a matrix."""
    return 2 * BATCH * inputs * outputs


def flops_with_lora() -> int:
    """The head and its two gradients, the base's forward and the gradient of its input, and of A and B likewise; xA is
    computed again in the backward pass. The first layer's input has no gradient."""
    total = 3 * HEAD
    for path, (inputs, outputs) in LAYERS.items():
        is_first = path == "body.0"
        total += products(inputs, outputs) * (1 if is_first else 2)
        total += products(inputs, RANK) * (3 if is_first else 4) + products(RANK, outputs) * 3
    return total


class Run:
    """A run of two epochs of eight batches, and what was measured."""

    def __init__(self, folder: Path, module: L.LightningModule, *callbacks: L.Callback, **options: Any) -> None:
        torch.manual_seed(0)
        self.module = module
        self.meter = CostMeter()
        first = options.pop("callbacks", None)
        self.trainer = trainer(folder, self.meter, *callbacks, **options)
        if first is not None:
            self.trainer.callbacks[:1] = first  # type: ignore[attr-defined]
        self.trainer.fit(module, data(), data(16))
        self.cost = self.meter.cost(self.trainer, module)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("cost")
    return Run(folder, Toy(), method=lora(dropout=0.0, target_modules=[*LAYERS]), logger=CSVLogger(folder))


def test_parameters_flops_and_bytes(adapted: Run) -> None:
    cost = adapted.cost
    # A and B of both layers, and the head's 51; the base has 144 + 32 + 272 + 51
    assert (cost.trainable, cost.total) == (48 + 64 + 51, 48 + 64 + 51 + 499)
    assert cost.trainable_share == (48 + 64 + 51) / 662
    assert cost.step_flops == flops_with_lora()
    path = Path(adapted.trainer.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
    assert cost.checkpoint_bytes == path.stat().st_size
    assert 0 < cost.step_seconds < 1  # type: ignore[operator]
    assert cost.peak_memory == pytest.approx(peak_memory(torch.device("cpu")), rel=0.5)
    assert cost.overhead_unmerged > 0  # type: ignore[operator]
    assert cost.overhead_merged > 0  # type: ignore[operator]


def test_inference_is_timed_before_lightning_takes_the_module_from_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    def timed(*_: Any) -> tuple[float, float]:
        happened.append("timed")
        return 1.5, 1.25

    class Told(Toy):
        def cpu(self) -> Any:
            happened.append("taken")
            return super().cpu()

    monkeypatch.setattr("lightning_peft.tracking.cost.meter.inference_overhead", timed)
    cost = Run(tmp_path, Told(), method=lora(target_modules=[*LAYERS])).cost
    assert happened == ["timed", "taken"]
    assert (cost.overhead_unmerged, cost.overhead_merged) == (1.5, 1.25)


def test_the_cost_is_logged_when_the_run_ends(adapted: Run) -> None:
    with Path(adapted.trainer.log_dir, "metrics.csv").open() as file:  # type: ignore[arg-type]
        last = [*csv.DictReader(file)][-1]
    assert {name: float(value) for name, value in last.items() if name.startswith("cost/")} == {
        "cost/trainable_share": adapted.cost.trainable_share,
        **{f"cost/{name}": value for name, value in asdict(adapted.cost).items()},
    }
    assert int(last["step"]) == adapted.trainer.global_step == 16


def test_measuring_leaves_no_trace_in_training(adapted: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Toy()
    trainer(tmp_path, method=lora(dropout=0.0, target_modules=[*LAYERS])).fit(plain, data(), data(16))
    assert plain.state_dict().keys() == adapted.module.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, adapted.module.state_dict()[name]), name
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in adapted.module.modules())


def test_full_fine_tuning_by_hand_and_without_a_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path, Manual(), callbacks=[], enable_checkpointing=False)
    cost = run.cost
    assert (cost.trainable, cost.total) == (499, 499)
    # all gradients but that of the first layer's input
    assert cost.step_flops == 2 * products(8, 16) + 3 * products(16, 16) + 3 * HEAD
    # two means, variances and counts of batch normalization are saved too
    assert cost.checkpoint_bytes == 4 * (499 + 32) + 8
    assert cost.overhead_unmerged is None
    assert cost.overhead_merged is None


def test_checkpoint_bytes_without_a_file_are_those_of_the_adapter(adapted: Run, tmp_path: Path) -> None:
    absent = trainer(tmp_path, enable_checkpointing=False)
    tensors = adapter_tensors(adapted.module, "default").values()
    assert checkpoint_bytes(absent, adapted.module) == sum(tensor.nbytes for tensor in tensors) == 4 * 163


class Counting(Decoder):
    """With a metric, and frozen parts in another mode."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        self.mean.update(x)
        torch.rand(1), np.random.rand(), random.random()
        return super().forward(x)


def test_timing_inference_changes_nothing_and_a_bottleneck_is_not_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = Run(tmp_path, Counting(), peft=PEFT(Houlsby(), modules_to_save=["head"]), max_epochs=1)
    assert run.cost.overhead_merged is None
    assert run.cost.overhead_unmerged > 0  # type: ignore[operator]
    module = run.module
    recording = Recording()
    recording.start(module)
    (x, _), *_ = data(8)
    expected = module(x)
    recording.stop()
    # the outermost call alone
    assert [(called, args[0].shape) for called, args, _ in recording.calls] == [(module, (8, 8))]
    module.body.layers[0].train()
    expected.sum().backward()
    before = {
        "state": {name: value.clone() for name, value in module.state_dict().items()},
        "modes": [part.training for part in module.modules()],
        "gradients": {name: parameter.grad for name, parameter in module.named_parameters()},
        "rng": rng_state(),
        "mean": float(module.mean.compute()),
    }
    assert inference_overhead(module, recording)[1] is None
    with disable_adapters(module):
        pass
    assert all(torch.equal(value, before["state"][name]) for name, value in module.state_dict().items())
    assert [part.training for part in module.modules()] == before["modes"]
    assert all(parameter.grad is before["gradients"][name] for name, parameter in module.named_parameters())
    assert float(module.mean.compute()) == before["mean"]
    for name, states in rng_state().items():
        same = [torch.equal(*pair) if isinstance(pair[0], Tensor) else pair[0] == pair[1]
                for pair in zip(states, before["rng"][name], strict=True)]  # fmt: skip
        assert all(same), name


def test_overhead_is_the_ratio_of_what_the_calls_take(adapted: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, now = adapted.module, torch.randn(8, 8), 0.0
    with disable_adapters(module), torch.no_grad():
        frozen = module.eval().body(x)
    weight = module.body[0].weight.clone()

    def clock(_: nn.Module, __: Any, output: Tensor) -> None:
        nonlocal now
        # by what the call computes: the base alone, merged weights, or adapters beside them
        now += 4.0 if output.equal(frozen) else 6.0 if module.body[0].weight.equal(weight) else 5.0

    monkeypatch.setattr("time.perf_counter", lambda: now)
    recording = Recording()
    recording.start(module.body)
    module.body(x)
    recording.stop()
    handle = module.body.register_forward_hook(clock)
    assert inference_overhead(module.body, recording) == (1.5, 1.25)
    handle.remove()


def test_merging_for_it_is_undone_to_the_bit(adapted: Run) -> None:
    module = adapted.module
    recording = Recording()
    recording.start(module)
    module.head(module.body(torch.randn(8, 8)))
    recording.stop()
    # a module that is not called as a whole: each of the outermost parts that hold adapters
    assert [called for called, _, _ in recording.calls] == [module.body, module.head]
    before = {name: (value, value.clone()) for name, value in module.named_parameters()}
    statistics = [buffer.clone() for buffer in module.buffers()]
    unmerged, merged = inference_overhead(module, recording)
    assert unmerged is not None
    assert merged is not None
    for name, parameter in module.named_parameters():
        assert parameter is before[name][0], name
        assert torch.equal(parameter, before[name][1]), name
    assert all(map(torch.equal, statistics, module.buffers()))
    assert len(trainable_parameters(module)) == 6


def test_a_module_that_fails_in_eval_mode_keeps_its_run(tmp_path: Path) -> None:
    class Fragile(Toy):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise ValueError("no inference here")
            return super().forward(x)

        validation_step = None  # type: ignore[assignment]

    with pytest.warns(UserWarning, match=r"CostMeter: inference was not timed \(ValueError: no inference here\)"):
        cost = Run(tmp_path, Fragile(), max_epochs=1).cost
    assert (cost.overhead_unmerged, cost.overhead_merged) == (None, None)
    assert cost.step_flops is not None


def test_recomputed_activations_count_and_their_calls_are_not_recorded(tmp_path: Path) -> None:
    peft = PEFT(LoRA(r=RANK, target_modules=["q_proj"]), gradient_checkpointing=True)
    once = Run(tmp_path, Decoder(), peft=PEFT(LoRA(r=RANK, target_modules=["q_proj"])), max_epochs=1)
    twice = Run(tmp_path, Decoder(), peft=peft, max_epochs=1)
    assert once.cost.step_flops * 1.2 < twice.cost.step_flops < once.cost.step_flops * 1.5  # type: ignore[operator]
    assert len(twice.meter._run.recording.calls) == 1


def test_the_first_steps_are_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert StepClock(torch.device("cpu")).median() is None

    class Slow(Toy):
        def training_step(self, batch: Any, index: int) -> Any:
            time.sleep(0.2 if index < FIRST_STEPS else 0.02)
            return super().training_step(batch, index)

    run = Run(tmp_path, Slow(), max_epochs=1)
    assert 0.02 < run.cost.step_seconds < 0.15  # type: ignore[operator]
    short = Run(tmp_path, Toy(), max_epochs=1, limit_train_batches=FIRST_STEPS)
    assert short.cost.step_seconds is None


def test_a_compiled_module_is_not_counted(tmp_path: Path) -> None:
    class Compiled(Toy):
        def training_step(self, batch: Any, index: int) -> Any:
            return self.loss(batch)

    module = Compiled()
    module.body.compile(backend="eager")
    assert Run(tmp_path, module, callbacks=[], max_epochs=1, limit_train_batches=2).cost.step_flops is None


def test_a_cost_of_nothing() -> None:
    assert Cost(0, 0).trainable_share == 0


def test_unchanged_puts_back_what_it_looks_after_even_after_a_fault() -> None:
    module = nn.ModuleDict({"layer": nn.Linear(2, 2), "metric": MeanMetric()})
    module["layer"].eval()
    state, metric = rng_state(), module["metric"]

    def fail() -> None:
        with unchanged(module):
            module.train()
            module["metric"].update(1.0)
            torch.rand(2)
            raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        fail()
    assert [part.training for part in module.modules()] == [True, False, True]
    assert module["metric"] is metric
    assert not metric.update_called
    assert torch.equal(rng_state()["torch"], state["torch"])
