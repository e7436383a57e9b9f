"""The callback beside every way of building a module, running it, and training it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn

from lightning_peft import (
    PEFT,
    AdaLoRA,
    DiffPruning,
    Hybrid,
    LoRA,
    Method,
    PEFTError,
    disable_adapters,
    remove,
    trainable_parameters,
)
from lightning_peft.callback.training import TrainedModule
from tests.callback.toys import BuiltInConfigureModel, BuiltInSetup, Manual, Toy, body, data, lora, trainer

MODULES = [Toy, BuiltInSetup, BuiltInConfigureModel, Manual]
EXPECTED = {
    "body.0.adapters.default.lora_A",
    "body.0.adapters.default.lora_B",
    "body.4.adapters.default.lora_A",
    "body.4.adapters.default.lora_B",
    "head.adapters.default.weight",
    "head.adapters.default.bias",
}


@pytest.mark.parametrize("module_class", MODULES)
def test_trains_adapters_and_head_alone(module_class: type[Toy], tmp_path: Path) -> None:
    module, start = module_class(), body().state_dict()
    trainer(tmp_path, max_epochs=6).fit(module, data(), data())
    assert set(trainable_parameters(module)) == EXPECTED
    for name, value in start.items():
        assert torch.equal(module.body.state_dict()[name], value), name
    module.eval()
    (x, y), *_ = data(64, 64)
    adapted = nn.functional.cross_entropy(module(x), y)
    with disable_adapters(module):
        assert adapted < nn.functional.cross_entropy(module(x), y) - 0.1


@pytest.mark.parametrize("module_class", MODULES)
def test_optimizers_hold_what_trains(module_class: type[Toy], tmp_path: Path) -> None:
    module, run = module_class(), trainer(tmp_path, max_epochs=1)
    run.fit(module, data())
    held = {id(p) for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]}
    with_state = {id(p) for optimizer in run.optimizers for p in optimizer.state}
    expected = {id(parameter) for parameter in trainable_parameters(module).values()}
    assert held == with_state == expected
    assert len(expected) == 6


def test_optimizer_from_before_the_adapters_is_detected(tmp_path: Path) -> None:
    class Stale(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.optimizer

    with pytest.raises(PEFTError) as error:
        trainer(tmp_path).fit(Stale(), data())
    assert str(error.value) == (
        "configure_optimizers: 6 of 6 trainable parameters are in no optimizer (body.0.adapters.default.lora_A, …). It "
        "seems to have been built before the adapters were attached, or over a part of the model: build it in "
        "configure_optimizers, over self.parameters()"
    )


@pytest.mark.parametrize("module_class", MODULES)
def test_all_stages_with_and_without_a_checkpoint(module_class: type[Toy], tmp_path: Path) -> None:
    run, module = trainer(tmp_path), module_class()
    run.fit(module, data(), data())
    best = run.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    expected = torch.cat(run.predict(module, data()))  # type: ignore[arg-type]
    for path in (None, best):
        (tested,) = run.test(module, data(), ckpt_path=path, verbose=False)
        (validated,) = run.validate(module, data(), ckpt_path=path, verbose=False)
        assert tested["val_loss"] == validated["val_loss"]
    fresh = trainer(tmp_path)
    assert torch.equal(torch.cat(fresh.predict(module_class(), data(), ckpt_path=best)), expected)  # type: ignore[arg-type]
    (validated_fresh,) = trainer(tmp_path).validate(module_class(), data(), ckpt_path=best, verbose=False)
    assert validated_fresh["val_loss"] == validated["val_loss"]


def test_a_model_left_in_eval_mode_is_woken_and_a_teacher_is_not(tmp_path: Path) -> None:
    class Distilled(Toy):
        def build(self) -> None:
            super().build()
            self.body.eval()
            self.teacher = body(1).eval()

        def training_step(self, batch: Any, index: int) -> Any:
            self.modes = [self.body[3].training, self.teacher[3].training, self.body[1].training]
            return super().training_step(batch, index)

    module = Distilled()
    peft = PEFT(LoRA(r=2, target_modules=["body.0", "body.4"]), modules_to_save=["head"])
    trainer(tmp_path, peft=peft, max_epochs=1).fit(module, data(), data())
    # the backbone's dropout, the teacher's, and the backbone's frozen batch statistics
    assert module.modes == [True, False, False]


def test_accumulation_and_clipping(tmp_path: Path) -> None:
    class Norms(L.Callback):
        largest = 0.0

        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, _: Any) -> None:
            # clipping comes after this hook, so the step sees at most the limit
            pl_module.configure_gradient_clipping(trainer.optimizers[0], 0.01, "norm")
            norms = [p.grad.norm() for p in trainable_parameters(pl_module).values() if p.grad is not None]
            self.largest = max(self.largest, float(torch.stack(norms).norm()))

    norms, module = Norms(), Toy()
    run = trainer(tmp_path, norms, accumulate_grad_batches=4, gradient_clip_val=0.01, max_epochs=2)
    run.fit(module, data())
    assert run.global_step == 4
    assert 0.0099 < norms.largest < 0.0101


def test_companions(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2, save_last=True)
    module = Toy()
    run = trainer(tmp_path, EarlyStopping("val_loss", patience=1, min_delta=10.0), checkpoints, max_epochs=9)
    run.fit(module, data(), data())
    assert run.current_epoch == 2
    assert len(list(tmp_path.glob("*.ckpt"))) == 3
    assert not list(tmp_path.glob(".*.part"))


def test_learning_rate_finder(tmp_path: Path) -> None:
    class LR(Toy):
        @property
        def lr(self) -> float:
            return self.hparams["lr"]

        @lr.setter
        def lr(self, value: float) -> None:
            self.hparams["lr"] = value

    module = LR()
    trainer(tmp_path, LearningRateFinder(num_training_steps=20), max_epochs=1).fit(module, data(256), data())
    assert 1e-8 < module.lr < 1
    assert module.lr != 0.05
    assert set(trainable_parameters(module)) == EXPECTED


def test_batch_size_finder(tmp_path: Path) -> None:
    class Loads(L.LightningDataModule):
        batch_size = 2

        def train_dataloader(self) -> Any:
            return data(64, self.batch_size)

        def val_dataloader(self) -> Any:
            return data(64, self.batch_size)

    loads, module = Loads(), Toy()
    trainer(tmp_path, BatchSizeFinder(steps_per_trial=1, max_trials=3), max_epochs=1).fit(module, datamodule=loads)
    assert loads.batch_size == 8
    assert set(trainable_parameters(module)) == EXPECTED


def test_moving_average_of_the_adapters(tmp_path: Path) -> None:
    def fit(epochs: int, seed: int, path: str | None = None) -> tuple[Toy, str]:
        L.seed_everything(seed, verbose=False)
        module, folder = Toy(), tmp_path / f"{epochs}-{seed}"
        run = trainer(folder, EMAWeightAveraging(decay=0.5), max_epochs=epochs)
        run.fit(module, data(), data(), ckpt_path=path)
        return module, run.checkpoint_callback.best_model_path  # type: ignore[union-attr]

    module, path = fit(2, seed=5)
    checkpoint = torch.load(path, weights_only=True)
    averaged = {key for key in checkpoint["state_dict"] if key in module.state_dict()}
    assert averaged == set(checkpoint["current_model_state"]) == EXPECTED
    (whole, _), (resumed, _) = fit(3, seed=5), fit(3, seed=6, path=path)
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("companions", "options", "message"),
    [
        (
            [StochasticWeightAveraging(1e-2)],
            {},
            "StochasticWeightAveraging copies the model before adapters are attached; use WeightAveraging, listed "
            "after PEFT",
        ),
        (
            [],
            {"sync_batchnorm": True, "strategy": "ddp", "devices": 1},
            "sync_batchnorm=True replaces normalization layers after adapters are attached; in configure_model, "
            "convert the model with torch.nn.SyncBatchNorm.convert_sync_batchnorm instead",
        ),
        ([PEFT(LoRA())], {}, "two PEFT callbacks are in one Trainer; leave one"),
    ],
)
def test_refused_companions(companions: list[Any], options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PEFTError) as error:
        trainer(tmp_path, *companions, **options).fit(Toy(), data())
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    assert str(error.value) == message


def test_average_listed_first_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.callbacks.insert(0, EMAWeightAveraging())  # type: ignore[attr-defined]
    with pytest.raises(
        PEFTError, match="WeightAveraging is listed before PEFT and would copy the model without adapters"
    ):
        run.fit(Toy(), data())


@pytest.mark.parametrize(
    "method",
    [AdaLoRA(target_modules=["body.0"]), DiffPruning(target=0.05), Hybrid(methods=[lora(), DiffPruning(target=0.05)])],
    ids=lambda method: type(method).__name__,
)
def test_an_average_over_pruning_is_refused(method: Method, tmp_path: Path) -> None:
    with pytest.raises(PEFTError) as error:
        trainer(tmp_path, EMAWeightAveraging(), method=method).fit(Toy(), data())
    assert error.value.faults == (
        f"WeightAveraging would average weights that {type(method).__name__} prunes with those from before, and so "
        "bring back what was cut; leave it out",
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_child_processes_are_refused(strategy: str, tmp_path: Path) -> None:
    with pytest.raises(
        Exception, match="trains in child processes, and the adapters would be lost with them; use strategy='ddp'"
    ):
        trainer(tmp_path, strategy=strategy, devices=2).fit(Toy(), data())


def test_fit_again_continues_and_another_method_is_refused(tmp_path: Path) -> None:
    module = Toy()
    trainer(tmp_path, max_epochs=1).fit(module, data())
    first = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(tmp_path, max_epochs=1).fit(module, data())
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, first[name])}
    assert moved == EXPECTED
    with pytest.raises(
        PEFTError, match=r"the module already carries LoRA\(r=2,.* call lightning_peft.remove\(module\) first"
    ):
        trainer(tmp_path, method=LoRA(r=4)).fit(module, data())
    remove(module)
    assert type(module) is Toy
    assert set(module.state_dict()) == set(Toy().state_dict())
    trainer(tmp_path, method=LoRA(r=4), max_epochs=1).fit(module, data())
    assert module.body[0].adapters["default"].lora_A.shape == (4, 8)


def test_copies_and_pickles_of_a_fitted_module(tmp_path: Path) -> None:
    module = Toy()
    trainer(tmp_path, max_epochs=1).fit(module, data())
    (x, _), *_ = data()
    module.eval()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert isinstance(twin, Toy)
        assert type(twin).__name__ == "Toy"
        assert torch.equal(twin(x), module(x))
        nn.init.ones_(twin.body[0].adapters["default"].lora_B)
        assert not torch.equal(twin(x), module(x))


def test_hooks_set_on_the_instance_still_run(tmp_path: Path) -> None:
    # LightningCLI sets configure_optimizers so
    module = Toy()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.25)  # type: ignore[method-assign]
    run = trainer(tmp_path, method=lora(lora_plus=4.0), max_epochs=1)
    run.fit(module, data())
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [0.25, 1.0]
    assert [len(group["params"]) for group in run.optimizers[0].param_groups] == [4, 2]


@pytest.mark.parametrize("options", [{"barebones": True}, {"fast_dev_run": 2}, {"overfit_batches": 2}])
def test_everyday_switches(options: dict[str, Any], tmp_path: Path) -> None:
    module = Toy()
    if "barebones" in options:
        run = L.Trainer(barebones=True, max_epochs=1, accelerator="cpu", callbacks=[PEFT(lora())])
    else:
        run = trainer(tmp_path, max_epochs=1, **options)
    run.fit(module, data())
    assert module.body[0].adapters["default"].lora_B.abs().max() > 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
def test_precisions_resume_and_load(precision: str, tmp_path: Path) -> None:
    run, module = trainer(tmp_path, precision=precision, max_epochs=1), Toy()
    run.fit(module, data(), data())
    path = run.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    resumed = Toy()
    trainer(tmp_path, precision=precision, max_epochs=2).fit(resumed, data(), data(), ckpt_path=path)
    moved = [n for n, v in trainable_parameters(resumed).items() if not torch.equal(v, trainable_parameters(module)[n])]
    assert set(moved) == EXPECTED
    expected = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert {parameter.dtype for parameter in resumed.parameters()} == {expected}


def test_a_compiled_module_trains(tmp_path: Path) -> None:
    class Silent(Toy):
        def training_step(self, batch: Any, index: int) -> Any:
            return self.loss(batch)  # torch.compile can't trace Lightning's log

    eager, compiled = Silent(), Silent()
    for runs in (eager, torch.compile(compiled, backend="aot_eager")):
        L.seed_everything(1, verbose=False)
        trainer(tmp_path, method=LoRA(r=2), max_epochs=1).fit(runs, data())
    for name, value in trainable_parameters(eager).items():
        assert torch.allclose(trainable_parameters(compiled)[name], value, atol=1e-5), name


def test_no_method_of_the_module_is_hidden_by_a_private_one() -> None:
    ours = {name for cls in TrainedModule.__mro__ if cls.__module__.startswith("lightning_peft") for name in vars(cls)}
    own = {name for name in ours if not hasattr(L.LightningModule, name) and not name.startswith("_peft")}
    assert own == {"check_checkpoint", "take_off"}
