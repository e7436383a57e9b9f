"""Small LightningModules, each built and trained in another of the ways that Lightning allows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import METHODS, PEFT, BitFit, LoRA, Method, PEFTError, inject

FEATURES, CLASSES = 8, 3


def body(seed: int = 0) -> nn.Sequential:
    """A backbone with dropout and batch statistics, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 16), nn.Tanh()
        )


class Toy(L.LightningModule):
    """Built in __init__, optimized by Lightning."""

    built_in_init = True

    def __init__(self, seed: int = 0, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        if self.built_in_init:
            self.build()

    def build(self) -> None:
        self.body = body(self.hparams["seed"])
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], _: int) -> Tensor | None:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]))

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class BuiltInSetup(Toy):
    built_in_init = False

    def setup(self, stage: str) -> None:
        if not hasattr(self, "body"):
            self.build()


class BuiltInConfigureModel(Toy):
    built_in_init = False

    def configure_model(self) -> None:
        if not hasattr(self, "body"):
            self.build()


class Manual(Toy):
    """Two optimizers, stepped by hand."""

    def __init__(self, seed: int = 0, lr: float = 0.05) -> None:
        super().__init__(seed, lr)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], _: int) -> None:
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.AdamW(self.body.parameters(), lr=0.05),
            torch.optim.SGD(self.head.parameters(), lr=0.05, momentum=0.9),
        ]


class Clipped(Manual):
    """Clips by hand, to less than any gradient has."""

    def training_step(self, batch: list[Tensor], _: int) -> None:
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            self.clip_gradients(optimizer, 1e-3, "norm")
            optimizer.step()
            optimizer.zero_grad()


class Raw(Manual):
    """Steps after two backward passes, and past the strategy."""

    def training_step(self, batch: list[Tensor], index: int) -> None:
        self.manual_backward(self.loss(batch) / 2)
        if index % 2:
            for optimizer in self.optimizers(use_pl_optimizer=False):
                optimizer.step()
                optimizer.zero_grad()


class Decoder(Toy):
    """A transformer, for methods that stand on nothing else."""

    def build(self) -> None:
        from transformers import LlamaConfig, LlamaModel

        sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        with torch.random.fork_rng():
            torch.manual_seed(self.hparams["seed"])
            self.body = LlamaModel(LlamaConfig(vocab_size=24, num_key_value_heads=2, **sizes))
            self.head = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        ids = (4 * x + 12).long().clamp(0, 23)
        return self.head(self.body(input_ids=ids).last_hidden_state.mean(1))


def made(name: str) -> Method:
    """The method with its defaults; one that has none for a field gets something that is trained."""
    given: dict[str, dict[str, Any]] = {
        "Hybrid": {"methods": [LoRA(r=2), BitFit()]},
        "HFPeft": {"config": {"peft_type": "LOHA", "r": 2, "target_modules": ["body.0", "body.4"]}},
    }
    return METHODS[name](**given.get(name, {}))


def standing_on(method: Method) -> type[Toy]:
    """The toy that `method` stands on, with its own defaults."""
    try:
        inject(Toy(), method, modules_to_save=["head"])
    except PEFTError:
        return Decoder
    return Toy


def data(rows: int = 64, batch_size: int = 8) -> DataLoader[Any]:
    """Rows whose class is the largest of three sums of their features."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, FEATURES, generator=generator)
    return DataLoader(TensorDataset(x, (x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(1)), batch_size)


def lora(**fields: Any) -> LoRA:
    return LoRA(**{"r": 2, "dropout": 0.1, **fields})


def trainer(
    folder: Path | str, *callbacks: L.Callback, method: Method | None = None, peft: PEFT | None = None, **options: Any
) -> L.Trainer:
    """A quiet Trainer with the callback first and `callbacks` after it."""
    first = peft or PEFT(method or lora(), modules_to_save=["head"])
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return L.Trainer(callbacks=[first, *callbacks], **{**defaults, **options})


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a nesting of dicts and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
