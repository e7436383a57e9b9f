"""AdapterMonitor: what it logs, against what is known of the run by other means; and that a run is the same with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_peft import (
    PEFT,
    AdaLoRA,
    AdapterMonitor,
    PEFTError,
    UniPELT,
    trainable_parameters,
)
from lightning_peft.state import read_checkpoint
from tests.callback.toys import Decoder, Manual, Toy, data, lora, tensors, trainer
from tests.tracking.test_norms import brute

TARGETS = ["body.0", "body.4"]
LAYERS = [*TARGETS, "head"]


class Memory(Logger):
    """Keeps what it is given."""

    name, version = "memory", "0"  # type: ignore[assignment]

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails = fails
        self.rows: list[tuple[int | None, dict[str, Any]]] = []
        self.told: dict[str, Any] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if self.fails and any(name.startswith("adapter/") for name in metrics):
            raise ConnectionError("the server is gone")
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        self.told |= params

    def values(self, name: str) -> dict[int | None, float]:
        """The values of one name by step."""
        return {step: row[name] for step, row in self.rows if name in row}

    def ours(self) -> list[dict[str, float]]:
        """The rows that the monitor logged."""
        return [row for _, row in self.rows if any("/" in name for name in row)]


class Oracle(L.Callback):
    """The norms of every batch in float64, by copies of all there is; `scale` is what gradients are multiplied with."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.gradient: dict[int, dict[str, float]] = {}
        self.ratio: dict[int, float] = {}
        self.rates: dict[int, float] = {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        own = trainable_parameters(pl_module)
        self.before = {name: parameter.detach().double().clone() for name, parameter in own.items()}
        self.seen: dict[str, Tensor] = {}
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        for name, parameter in trainable_parameters(pl_module).items():
            if parameter.grad is not None:
                self.seen[name] = parameter.grad.detach().double() / self.scale

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        groups: dict[str, list[Tensor]] = {}
        for name, gradient in self.seen.items():
            groups.setdefault(name.partition(".adapters")[0], []).append(gradient)
        self.gradient[step] = {path: brute(*own) for path, own in groups.items()}
        change = [p.detach().double() - self.before[name] for name, p in trainable_parameters(pl_module).items()]
        self.ratio[step] = brute(*change) / brute(*self.before.values())
        self.rates[step] = self.rate


def run(folder: Path, *callbacks: L.Callback, module: L.LightningModule | None = None, **options: Any) -> L.Trainer:
    """Train for two epochs of eight batches, and log every third step."""
    torch.manual_seed(0)
    defaults = {"logger": Memory(), "log_every_n_steps": 3}
    trained = trainer(folder, *callbacks, **{**defaults, **options})
    trained.fit(module or Toy(), data(), data(16))
    return trained


def monitors(trained: L.Trainer) -> list[int]:
    """Their places among the callbacks."""
    return [i for i, callback in enumerate(trained.callbacks) if isinstance(callback, AdapterMonitor)]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[L.Trainer, Memory, Oracle]:
    oracle = Oracle()
    trained = run(tmp_path_factory.mktemp("seen"), oracle, gradient_clip_val=0.01)
    return trained, trained.logger, oracle  # type: ignore[return-value]


def test_norms_are_logged_with_lightning_s_own_steps(seen: Any) -> None:
    _, memory, oracle = seen
    steps = [2, 5, 8, 11, 14]
    assert list(memory.values("train_loss")) == steps
    for path in LAYERS:
        expected = {step: pytest.approx(oracle.gradient[step][path], rel=1e-9) for step in steps}
        assert memory.values(f"adapter/grad_norm/{path}") == expected
    # before clipping, which leaves 0.01
    assert memory.values("adapter/grad_norm/total") == {
        step: pytest.approx(math.hypot(*oracle.gradient[step].values())) for step in steps
    }
    assert memory.values("adapter/update_ratio/total") == {step: pytest.approx(oracle.ratio[step]) for step in steps}
    # a schedule has moved it by the end of the batch
    assert memory.values("lr/AdamW") == {step: oracle.rates[step] for step in steps}
    assert all(values > 0 for values in memory.values("speed/samples_per_second").values())
    assert memory.values("speed/tokens_per_second") == {}
    assert 0.05 < memory.values("memory/peak_gb")[2] < 100
    assert len(memory.values("adapter/weight_norm/total")) == 5


def test_the_run_is_described_at_its_start(seen: Any) -> None:
    trained, memory, _ = seen
    told = memory.told["adapter"]
    spec = read_checkpoint(trained.checkpoint_callback.best_model_path, "cpu")["peft"]
    assert told["method"] == {"name": "LoRA", "fields": lora().fields()}
    assert told["base"]["fingerprint"] == spec["base"]
    assert told["base"]["name"] == "Toy"
    assert told["dataset"] == {"name": "TensorDataset", "class": "torch.utils.data.dataset.TensorDataset", "rows": 64}
    assert (told["trainable"], told["total"]) == (163, 662)
    assert told["trainable_share"] == 163 / 662
    assert told["modules_to_save"] == ["head"]


def test_it_stands_once_behind_peft_and_before_checkpoints(seen: Any, tmp_path: Path) -> None:
    trained = seen[0]
    assert monitors(trained) == [1]
    assert isinstance(trained.callbacks[0], PEFT)
    assert isinstance(trained.callbacks[-1], ModelCheckpoint)
    calls = []

    class Own(AdapterMonitor):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            calls.append(stage)

    own = run(tmp_path, Own(every_n_steps=5), max_epochs=1)
    own.fit_loop.max_epochs = 2
    own.fit(own.lightning_module, data())
    assert monitors(own) == [1]
    assert calls == ["fit", "fit"]
    assert list(own.logger.values("adapter/grad_norm/total")) == [4, 9, 14]  # type: ignore[union-attr]
    again = run(tmp_path, max_epochs=1)
    again.fit_loop.max_epochs = 2
    again.fit(again.lightning_module, data())
    assert monitors(again) == [1]


def test_it_is_set_up_once_where_peft_adds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    monkeypatch.setattr(AdapterMonitor, "setup", lambda *_, **__: calls.append(1))
    run(tmp_path, max_epochs=1)
    assert calls == [1]


@pytest.mark.parametrize("options", [{"logger": False}, {"fast_dev_run": True}, {"barebones": True, "logger": None}])
def test_without_a_logger_or_in_a_dry_run_there_is_none(options: dict[str, Any], tmp_path: Path) -> None:
    if "barebones" in options:
        options |= {"enable_checkpointing": None, "log_every_n_steps": None}
        options |= {"enable_progress_bar": None, "enable_model_summary": None, "max_epochs": 1}
    assert monitors(run(tmp_path, **options)) == []
    # and one that is given does nothing
    run(tmp_path, AdapterMonitor(), **options)


def test_validation_test_and_prediction_get_none_and_log_nothing(seen: Any, tmp_path: Path) -> None:
    module, memory = Toy(), Memory()
    evaluated = trainer(tmp_path, logger=memory)
    evaluated.validate(module, data(), verbose=False)
    evaluated.test(module, data(), verbose=False)
    evaluated.predict(module, data())
    assert monitors(evaluated) == []
    trained, own, _ = seen
    count = len(own.ours())
    trained.validate(trained.lightning_module, data(), verbose=False)
    assert len(own.ours()) == count


@pytest.mark.parametrize("kind", [Toy, Manual])
def test_training_is_the_same_without_it_to_the_bit(kind: type[Toy], tmp_path: Path) -> None:
    """Dropout, batch statistics and shuffling among it."""
    found = []
    for own in ({"logger": Memory(), "log_every_n_steps": 1}, {"logger": False}):
        module = kind()
        trained = run(tmp_path / str(own["logger"]), module=module, accumulate_grad_batches=1, **own)
        path = trained.checkpoint_callback.best_model_path  # type: ignore[union-attr]
        found.append((module.state_dict(), read_checkpoint(path, "cpu"), torch.rand(1)))
    (with_it, with_saved, one), (without, without_saved, two) = found
    assert all(torch.equal(value, without[name]) for name, value in with_it.items())
    assert torch.equal(one, two)
    assert with_saved.keys() == without_saved.keys()
    assert with_saved["peft"]["metrics"] == without_saved["peft"]["metrics"]
    assert with_saved["callbacks"].keys() == without_saved["callbacks"].keys()
    assert all(map(torch.equal, tensors(with_saved), tensors(without_saved)))


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_those_before_scaling(fused: bool, tmp_path: Path) -> None:
    class Fused(Toy):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.05, fused=fused)

    # a fused optimizer unscales the gradients as it steps
    oracle = Oracle(scale=1024.0 if fused else 1.0)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    memory = run(tmp_path, oracle, module=Fused(), plugins=[plugin], max_epochs=1).logger
    expected = {step: pytest.approx(math.hypot(*oracle.gradient[step].values())) for step in (2, 5)}
    assert memory.values("adapter/grad_norm/total") == expected  # type: ignore[union-attr]
    assert max(memory.values("adapter/grad_norm/total").values()) < 50  # type: ignore[union-attr]


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    oracle = Oracle()
    memory = run(tmp_path, oracle, accumulate_grad_batches=4, log_every_n_steps=2).logger
    assert list(memory.values("train_loss")) == [1, 3]  # type: ignore[union-attr]
    assert memory.values("adapter/grad_norm/total") == {  # type: ignore[union-attr]
        step: pytest.approx(math.hypot(*oracle.gradient[step].values())) for step in (1, 3)
    }
    assert list(memory.values("speed/samples_per_second")) == [1, 3]  # type: ignore[union-attr]


def test_optimizers_that_step_by_hand(tmp_path: Path) -> None:
    oracle = Oracle()
    memory: Any = run(tmp_path, oracle, module=Manual()).logger
    # Lightning counts batches here, of which each has two steps
    assert memory.values("adapter/grad_norm/total") == {
        step: pytest.approx(math.hypot(*oracle.gradient[step].values())) for step in (2, 5, 8, 11, 14)
    }
    assert memory.values("adapter/update_ratio/total")[5] == pytest.approx(oracle.ratio[5])
    assert set(memory.values("lr/AdamW").values()) == set(memory.values("lr/SGD").values()) == {0.05}


class Rare(Manual):
    """Steps every fifth batch, or never by an optimizer of torch's."""

    every = 5

    def training_step(self, batch: list[Tensor], index: int) -> None:
        self.manual_backward(self.loss(batch))
        if self.every and index % self.every == self.every - 1:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()


class Never(Rare):
    every = 0


def test_a_step_by_hand_is_logged_when_it_comes(tmp_path: Path) -> None:
    rare: Any = run(tmp_path, module=Rare(), log_every_n_steps=4, max_epochs=1).logger
    assert list(rare.values("adapter/grad_norm/total")) == [4]
    assert list(rare.values("speed/samples_per_second")) == [4]
    never: Any = run(tmp_path, module=Never(), log_every_n_steps=4, max_epochs=1).logger
    assert never.values("adapter/grad_norm/total") == {}
    assert list(never.values("speed/samples_per_second")) == [6]


def test_groups_of_an_optimizer_and_a_monitor_of_rates(tmp_path: Path) -> None:
    class Two(Toy):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(
                [{"params": self.body.parameters()}, {"params": self.head.parameters(), "lr": 1}], 0.5
            )

    memory: Any = run(tmp_path, module=Two(), max_epochs=1).logger
    assert set(memory.values("lr/SGD").values()) == {0.5}
    assert set(memory.values("lr/SGD/1").values()) == {1}
    watched: Any = run(tmp_path, LearningRateMonitor(), max_epochs=1).logger
    assert not any(name.startswith("lr/") for row in watched.ours() for name in row)


def test_a_resumed_run_goes_on_with_the_steps(seen: Any, tmp_path: Path) -> None:
    path = seen[0].checkpoint_callback.best_model_path
    torch.manual_seed(0)
    memory = Memory()
    trained = trainer(tmp_path, logger=memory, log_every_n_steps=3, max_epochs=3, gradient_clip_val=0.01)
    trained.fit(Toy(), data(), data(16), ckpt_path=path)
    assert list(memory.values("adapter/grad_norm/total")) == list(memory.values("train_loss")) == [17, 20, 23]
    assert memory.told["adapter"]["base"]["fingerprint"] == seen[1].told["adapter"]["base"]["fingerprint"]


def test_full_fine_tuning_is_logged_by_modules(tmp_path: Path) -> None:
    oracle, memory = Oracle(), Memory()
    torch.manual_seed(0)
    trained = trainer(tmp_path, oracle, AdapterMonitor(), logger=memory, log_every_n_steps=3, max_epochs=1)
    del trained.callbacks[0]  # type: ignore[attr-defined]
    trained.fit(Toy(), data(), data(16))
    assert {name for row in memory.ours() for name in row if name.startswith("adapter/grad_norm/")} == {
        f"adapter/grad_norm/{path}" for path in ("body.0", "body.1", "body.4", "head", "total")
    }
    assert memory.values("adapter/update_ratio/total")[2] == pytest.approx(oracle.ratio[2])
    assert (memory.told["adapter"]["method"], memory.told["adapter"]["trainable"]) == (None, 499)


def test_what_methods_report_of_layers(tmp_path: Path) -> None:
    method = AdaLoRA(init_r=6, target_r=2, target_modules=TARGETS)
    memory: Any = run(tmp_path, method=method, max_epochs=3).logger
    ranks = [memory.values(f"adapter/rank/{path}") for path in TARGETS]
    assert list(ranks[0]) == list(ranks[1]) == [2, 5, 8, 11, 14, 17, 20, 23]
    assert [sum(own[step] for own in ranks) for step in (2, 23)] == [10, 4]
    gates: Any = run(tmp_path, method=UniPELT(), module=Decoder(), max_epochs=1).logger
    names = [f"adapter/gate_{kind}/body.layers.{layer}" for kind in ("prefix", "adapter", "lora") for layer in (0, 1)]
    assert all(0 < value < 1 for name in names for value in gates.values(name).values())
    for kind in ("prefix", "adapter", "lora"):
        assert all(0 < whole < 1 for whole in gates.values(f"gate_{kind}").values())  # what UniPELT reports of all


def test_arguments_that_mean_nothing_are_refused() -> None:
    with pytest.raises(PEFTError) as error:
        AdapterMonitor(every_n_steps=0, samples=-1)
    assert error.value.faults == (
        "AdapterMonitor.every_n_steps: 0 is no number of steps; give 1 or more, or None",
        "AdapterMonitor.samples: -1 is no number of rows; give 0 or more",
    )


def test_a_search_for_a_batch_size_is_not_logged(tmp_path: Path) -> None:
    class Sized(Toy):
        batch_size = 2

        def train_dataloader(self) -> Any:
            return data(16, self.batch_size)

        def val_dataloader(self) -> Any:
            return data(16)

    memory = Memory()
    finder = BatchSizeFinder(max_trials=1, steps_per_trial=2)
    trained = trainer(tmp_path, finder, logger=memory, log_every_n_steps=1, max_epochs=1)
    trained.fit(Sized())
    assert list(memory.values("adapter/grad_norm/total")) == list(memory.values("train_loss"))
