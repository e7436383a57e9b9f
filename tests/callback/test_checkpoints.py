"""What a checkpoint holds, and that a run resumed from one is the unbroken run to the bit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import METHODS, PEFT, LoRA, Method, PEFTError, inject, load_from_checkpoint
from lightning_peft.state import adapter_tensors, base_keys
from tests.callback.toys import BuiltInConfigureModel, Manual, Toy, data, lora, made, standing_on, tensors, trainer

NOTICE = (
    "lightning_peft: this checkpoint holds adapters alone; load it with lightning_peft.load_from_checkpoint(MyModule, "
    "path), or give the Trainer the PEFT callback"
)


def save_in_every_way(module: Toy, folder: Path) -> dict[str, Path]:
    weights_only = ModelCheckpoint(folder / "weights", save_weights_only=True, every_n_epochs=1)
    every = ModelCheckpoint(folder / "every", save_last=True, every_n_train_steps=4)
    run = trainer(folder, weights_only, every, max_epochs=1)
    run.fit(module, data())
    run.save_checkpoint(folder / "after.ckpt")
    run.save_checkpoint(folder / "after_weights.ckpt", weights_only=True)
    return {
        "weights_only": Path(weights_only.best_model_path),
        "every": Path(every.best_model_path),
        "last": folder / "every" / "last.ckpt",
        "after": folder / "after.ckpt",
        "after_weights": folder / "after_weights.ckpt",
    }


def test_every_way_of_saving_leaves_the_base_out(tmp_path: Path) -> None:
    module = Toy()
    paths = save_in_every_way(module, tmp_path)
    ours = set(adapter_tensors(module, "default"))
    frozen_shapes = {module.body[0].weight.shape, module.body[4].weight.shape}
    assert len(ours) == 6
    for way, path in paths.items():
        checkpoint = torch.load(path, weights_only=True)
        assert set(checkpoint["state_dict"]) == ours | {NOTICE}, way
        assert not any(tensor.shape in frozen_shapes for tensor in tensors(checkpoint)), way
        assert checkpoint["peft"]["method"]["fields"]["r"] == 2


def test_file_size_follows_the_adapter_and_not_the_base(tmp_path: Path) -> None:
    class Big(Toy):
        def build(self) -> None:
            super().build()
            self.body[0] = nn.Sequential(nn.Linear(8, 2000), nn.Linear(2000, 1000), nn.Linear(1000, 16))

    module = Big()
    peft = PEFT(LoRA(r=1, target_modules=["body.4"]), modules_to_save=["head"])
    run = trainer(tmp_path, peft=peft, max_epochs=1, enable_checkpointing=False)
    run.fit(module, data())
    run.save_checkpoint(tmp_path / "small.ckpt")
    assert sum(parameter.numel() for parameter in module.parameters()) * 4 > 8_000_000
    assert (tmp_path / "small.ckpt").stat().st_size < 40_000


@pytest.mark.parametrize(
    ("name", "module_class"),
    [*((name, None) for name in sorted(METHODS)), ("LoRA", BuiltInConfigureModel), ("LoRA", Manual)],
)
def test_resume_is_exact(name: str, module_class: type[Toy] | None, tmp_path: Path) -> None:
    module_class = module_class or standing_on(made(name))

    class StopAfter(L.Callback):
        """Ends a run of three epochs early; a run of two would have other schedules."""

        def __init__(self, epochs: int) -> None:
            self.epochs = epochs

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch + 1 == self.epochs

    def run(epochs: int, seed: int, path: str | None = None) -> tuple[dict[str, Any], Path, L.Trainer]:
        L.seed_everything(seed, verbose=False)
        module = module_class()
        folder = tmp_path / f"{epochs}-{seed}"
        fit = trainer(folder, StopAfter(epochs), method=made(name), max_epochs=3)
        # shuffled, with dropout in the module: the random numbers have to go on as well
        fit.fit(module, DataLoader(data().dataset, 8, shuffle=True), data(), ckpt_path=path)
        return module.state_dict(), Path(fit.checkpoint_callback.best_model_path), fit  # type: ignore[union-attr]

    whole, _, whole_run = run(3, seed=5)
    _, path, _ = run(2, seed=5)
    resumed, _, resumed_run = run(3, seed=6, path=str(path))
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key
    for ours, theirs in zip(whole_run.optimizers, resumed_run.optimizers, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(tensors(ours.state_dict()), tensors(theirs.state_dict()), strict=True)
        )


def test_buffers_that_training_moves_are_saved(tmp_path: Path) -> None:
    class Centred(Toy):
        def build(self) -> None:
            super().build()
            self.register_buffer("center", torch.zeros(16))
            self.register_buffer("constant", torch.ones(5))

        def training_step(self, batch: Any, index: int) -> Any:
            self.center.mul_(0.9).add_(self.body(batch[0]).detach().mean(0))
            return super().training_step(batch, index)

    def run(epochs: int, path: str | None = None) -> tuple[Centred, str]:
        L.seed_everything(5, verbose=False)
        module = Centred()
        fit = trainer(tmp_path / str(epochs), max_epochs=epochs)
        fit.fit(module, data(), ckpt_path=path)
        return module, fit.checkpoint_callback.best_model_path  # type: ignore[union-attr]

    whole, _ = run(2)
    _, path = run(1)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert "center" in saved
    assert "constant" not in saved
    assert "body.1.running_mean" not in saved
    resumed, resumed_path = run(2, path)
    assert torch.equal(resumed.center, whole.center)
    assert "center" in torch.load(resumed_path, weights_only=True)["state_dict"]
    assert torch.equal(load_from_checkpoint(Centred, resumed_path).center, whole.center)


def test_load_from_checkpoint_gives_back_the_adapted_module(tmp_path: Path) -> None:
    module = Toy(seed=4)
    paths = save_in_every_way(module, tmp_path)
    (x, _), *_ = data()
    expected = module.eval()(x)
    for way, path in paths.items():
        loaded = load_from_checkpoint(Toy, path)
        assert type(loaded).__name__ == "Toy"
        assert loaded.hparams["seed"] == 4
        assert torch.equal(loaded.eval()(x), expected), way
    with pytest.raises(RuntimeError) as error:
        Toy.load_from_checkpoint(paths["every"])
    assert NOTICE in str(error.value)
    again = trainer(tmp_path, max_epochs=1)
    (result,) = again.validate(load_from_checkpoint(Toy, paths["every"]), data(), verbose=False)
    assert result == again.validate(module, data(), verbose=False)[0]


def test_arguments_that_are_modules_are_given_again(tmp_path: Path) -> None:
    class Wraps(Toy):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.body = backbone

    def backbone() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU())

    module = Wraps(backbone())
    run = trainer(tmp_path, method=LoRA(r=2), max_epochs=1, enable_checkpointing=False)
    run.fit(module, data())
    with pytest.warns(UserWarning, match=r"hyper-parameters backbone \(Sequential\) are no plain values and are not"):
        run.save_checkpoint(tmp_path / "w.ckpt")
    assert set(torch.load(tmp_path / "w.ckpt", weights_only=True)["hyper_parameters"]) == {"seed", "lr"}
    loaded = load_from_checkpoint(Wraps, tmp_path / "w.ckpt", backbone=backbone())
    (x, _), *_ = data()
    assert torch.equal(loaded(x), module(x))


def test_objects_among_the_arguments_are_left_out_and_missed(tmp_path: Path) -> None:
    class Made(Toy):
        def __init__(self, activation: type[nn.Module] = nn.ReLU, where: Path | None = None, width: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.body[2] = activation()

    class Rows(L.LightningDataModule):
        def __init__(self, folder: Path) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return data()

    module, path = Made(nn.Tanh, tmp_path, width=5), tmp_path / "made.ckpt"
    run = trainer(tmp_path, method=LoRA(r=2), max_epochs=1, enable_checkpointing=False)
    run.fit(module, datamodule=Rows(tmp_path))
    kinds = rf"activation \(type\), where \({type(tmp_path).__name__}\)"
    with pytest.warns(UserWarning, match=f"hyper-parameters {kinds} are no plain values and are not saved; use save_"):
        run.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert saved["hyper_parameters"] == {"seed": 0, "lr": 0.05, "width": 5}
    assert saved["datamodule_hyper_parameters"] == {}
    (x, _), *_ = data()
    loaded = load_from_checkpoint(Made, path, activation=nn.Tanh, where=None)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    told = "the hyper-parameters activation, where were not saved, and Made takes its defaults; give those of the run: "
    call = "load_from_checkpoint(Made, path, activation=…, where=…)"
    with pytest.warns(UserWarning, match=f"^{re.escape(f'{path}: {told}{call}')}$"):
        assert not torch.equal(load_from_checkpoint(Made, path).eval()(x), module(x))


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    module = Toy()
    run = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    run.fit(module, data())
    run.save_checkpoint("~/runs/a.ckpt")
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.ckpt")] == ["home/runs/a.ckpt"]
    (x, _), *_ = data()
    assert torch.equal(load_from_checkpoint(Toy, "~/runs/a.ckpt").eval()(x), module.eval()(x))
    absent = f"{tmp_path}/home/runs/b.ckpt: there is no such checkpoint file; in {tmp_path}/home/runs there is a.ckpt"
    with pytest.raises(PEFTError, match=f"^{re.escape(absent)}$"):
        trainer(tmp_path).validate(module, data(), ckpt_path="~/runs/b.ckpt", verbose=False)


def test_a_module_injected_by_hand_is_taken_as_it_is(tmp_path: Path) -> None:
    module, method = Toy(), lora()
    inject(module, method, modules_to_save=["head"])
    nn.init.ones_(module.body[0].adapters["default"].lora_B)
    before = module.body[0].adapters["default"]
    trainer(tmp_path, method=method, max_epochs=1).fit(module, data())
    assert module.body[0].adapters["default"] is before


def test_what_is_frozen_is_told_by_identity_and_not_by_name(tmp_path: Path) -> None:
    class Misnamed(Toy):
        def build(self) -> None:
            super().build()
            self.lora_head = nn.Linear(16, 3)
            self.adapters_of_mine = nn.Linear(16, 3)

    module = Misnamed()
    run = trainer(tmp_path, peft=PEFT(LoRA(r=2, target_modules=["body.0"])), max_epochs=1)
    run.fit(module, data())
    assert not module.lora_head.weight.requires_grad
    saved = torch.load(run.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]  # type: ignore[union-attr]
    assert {"lora_head.weight", "adapters_of_mine.weight"} <= base_keys(module)
    assert set(saved) == {"body.0.adapters.default.lora_A", "body.0.adapters.default.lora_B", NOTICE}


def test_method_class_of_ones_own_is_found_by_its_name(tmp_path: Path) -> None:
    class MyLoRA(LoRA):
        """LoRA under another name, defined outside of the package."""

    module = Toy()
    run = trainer(tmp_path, method=MyLoRA(r=2), max_epochs=1)
    run.fit(module, data())
    path = run.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    (x, _), *_ = data()
    assert torch.equal(load_from_checkpoint(Toy, path).eval()(x), module.eval()(x))


def test_not_a_method_is_refused() -> None:
    with pytest.raises(
        PEFTError, match=r"PEFT.method: 'LoRA' is no method; give one of lightning_peft's, for example LoRA\(r=8\)"
    ):
        PEFT("LoRA")  # type: ignore[arg-type]
    assert issubclass(METHODS["LoRA"], Method)
