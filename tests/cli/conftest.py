"""A folder with a small LightningModule in a file, as a user has one, and configurations beside it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_peft.cli import main

TOY = '''
import time

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Toy(L.LightningModule):
    """A small classifier."""

    def __init__(self, width: int = 8, learning_rate: float = 0.1, fails: bool = False, pause: float = 0.0):
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(0)  # as if pretrained; the head is new
            self.net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.head = nn.Linear(width, 2)

    def forward(self, batch):
        return self.head(self.net(batch[0]))

    def training_step(self, batch, batch_idx):
        if self.hparams.fails:
            raise RuntimeError("a bug of the module")
        time.sleep(self.hparams.pause)
        return nn.functional.cross_entropy(self(batch), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log_dict({"val_loss": 0.5, "val_accuracy": 0.75, "val_majority": 0.25})

    def test_step(self, batch, batch_idx):
        self.log("test_width", float(self.hparams.width))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate)


class ToyData(L.LightningDataModule):
    """Noise."""

    def __init__(self, width: int = 8, rows: int = 16):
        super().__init__()
        self.width, self.rows = width, rows

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(self.rows, self.width, generator=generator)
        return DataLoader(TensorDataset(inputs, torch.arange(self.rows) % 2), batch_size=8)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader
'''
BASE = """\
seed_everything: 1
model: {class_path: cli_toy.Toy}
data: {class_path: cli_toy.ToyData}
trainer:
  max_epochs: 1
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  logger: {class_path: CSVLogger, init_args: {save_dir: runs}}
"""
PEFT = """\
peft:
  method: {class_path: LoRA, init_args: {r: 2}}
  modules_to_save: [head]
"""

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, holding cli_toy.py, base.yaml (full fine-tuning) and lora.yaml (the same with adapters)."""
    (tmp_path / "cli_toy.py").write_text(TOY)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "lora.yaml").write_text(BASE + PEFT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    monkeypatch.setenv("COLUMNS", "120")
    for name in [name for name in sys.modules if name.startswith("cli_toy")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


@pytest.fixture
def command(folder: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `lightning-peft` in `folder`: the exit code, and what it printed on standard output and error."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
