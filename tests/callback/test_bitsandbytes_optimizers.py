"""The 8-bit and paged optimizers of bitsandbytes under the callback: what they hold, what is saved of them, and that a
resumed run is the unbroken one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_peft import LoRA, trainable_parameters
from tests.callback.toys import Toy, data, tensors, trainer

optim = pytest.importorskip("bitsandbytes").optim
NAMES = ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW", "Lion8bit", "AdEMAMix8bit"]

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


class Eight(Toy):
    """Toy with an optimizer of bitsandbytes over all its parameters, the frozen ones included."""

    def __init__(self, name: str, seed: int = 0, lr: float = 0.05) -> None:
        super().__init__(seed, lr)
        self.save_hyperparameters()

    def configure_optimizers(self) -> Any:
        kind = getattr(optim, self.hparams["name"])
        # 4,096 numbers by default, below which states are kept in 32 bits
        small = {} if self.hparams["name"] == "PagedAdamW" else {"min_8bit_size": 16}
        optimizer = kind(self.parameters(), lr=self.hparams["lr"] / (10 if "Lion" in kind.__name__ else 1), **small)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(folder: Path, name: str, epochs: int, seed: int = 5, path: str | None = None) -> tuple[Eight, L.Trainer]:
    L.seed_everything(seed, verbose=False)
    module, run = Eight(name), trainer(folder / f"{epochs}-{seed}", max_epochs=epochs)
    run.fit(module, data(), data(), ckpt_path=path)
    return module, run


@pytest.mark.parametrize("name", NAMES)
def test_resumed_is_unbroken(name: str, tmp_path: Path) -> None:
    module, run = fit(tmp_path, name, 2)
    path = run.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    saved = torch.load(path, weights_only=True)
    states = [tensor.dtype for tensor in tensors(saved["optimizer_states"])]
    assert (torch.uint8 in states) == (name != "PagedAdamW")
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in run.optimizers[0].state} == {id(p) for p in trainable_parameters(module).values()}
    assert saved["optimizer_states"][0]["state"].keys() == set(range(6))

    whole, run = fit(tmp_path, name, 3)
    resumed, _ = fit(tmp_path, name, 3, seed=6, path=path)
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    assert float(run.callback_metrics["val_loss"]) < 0.8


def test_32_bits_are_torchs_adamw(tmp_path: Path) -> None:
    class Plain(Eight):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.01)

    class Paged(Eight):
        def configure_optimizers(self) -> Any:
            return optim.PagedAdamW(self.parameters(), lr=0.05, weight_decay=0.01)

    states = []
    for kind in (Plain, Paged):
        L.seed_everything(1, verbose=False)
        module = kind("PagedAdamW")
        trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(module, data())
        states.append(module.state_dict())
    for key, value in states[0].items():
        assert torch.allclose(states[1][key], value, atol=1e-4), key


def test_lora_plus_gives_B_a_rate_of_its_own(tmp_path: Path) -> None:
    module = Eight("PagedAdamW8bit", lr=0.01)
    run = trainer(tmp_path, method=LoRA(r=2, lora_plus=16.0), max_epochs=1, enable_checkpointing=False)
    run.fit(module, data(8))
    rates = {
        name: group["initial_lr"]
        for group in run.optimizers[0].param_groups
        for name, parameter in module.named_parameters()
        if any(parameter is other for other in group["params"])
    }
    assert {name: rate for name, rate in rates.items() if "lora_A" in name} == {
        f"body.{layer}.adapters.default.lora_A": 0.01 for layer in (0, 4)
    }
    assert {name: rate for name, rate in rates.items() if "lora_B" in name} == {
        f"body.{layer}.adapters.default.lora_B": pytest.approx(0.16) for layer in (0, 4)
    }


def test_a_parameter_may_keep_its_state_in_32_bits(tmp_path: Path) -> None:
    """Overrides are by a module's parameter, and found where the frozen ones have gone."""

    class Overridden(Eight):
        def configure_optimizers(self) -> Any:
            adapter = self.body[4].adapters["default"]
            optim.GlobalOptimManager.get_instance().register_module_override(adapter, "lora_B", {"optim_bits": 32})
            return super().configure_optimizers()

    manager = optim.GlobalOptimManager.get_instance()
    module = Overridden("AdamW8bit")
    run = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    try:
        run.fit(module, data())
    finally:
        manager.initialize()
    state = run.optimizers[0].state
    dtypes = {name: state[p]["state1"].dtype for name, p in trainable_parameters(module).items() if "lora_" in name}
    assert dtypes == {
        "body.0.adapters.default.lora_A": torch.uint8,
        "body.0.adapters.default.lora_B": torch.uint8,
        "body.4.adapters.default.lora_A": torch.uint8,
        "body.4.adapters.default.lora_B": torch.float32,
    }
