"""Optimizers that a configuration names: in the section `optimizer`, and as a task's argument."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lightning_peft.cli.compare_plan import ReadingCLI
from lightning_peft.state import read_checkpoint

from .conftest import Command

CHECKPOINT = "runs/lightning_logs/version_0/checkpoints/epoch=0-step=2.ckpt"
SECTION = """
optimizer: {class_path: %s, init_args: {lr: 0.2%s}}
lr_scheduler: {class_path: StepLR, init_args: {step_size: 1, gamma: 0.5}}
"""


@pytest.mark.parametrize(
    ("name", "more"), [("torch.optim.Adam", ""), ("bitsandbytes.optim.PagedAdamW8bit", ", min_8bit_size: 8")]
)
@pytest.mark.parametrize("base", ["base", "lora"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_the_section_is_carried_out_over_what_trains(
    command: Command, folder: Path, base: str, name: str, more: str
) -> None:
    if "bitsandbytes" in name:
        pytest.importorskip("bitsandbytes")
    (folder / "more.yaml").write_text(SECTION % (name, more))
    code, _, err = command("fit", "--config", f"{base}.yaml", "--config", "more.yaml")
    assert code == 0, err
    saved = torch.load(CHECKPOINT, weights_only=True)
    (optimizer,) = saved["optimizer_states"]
    names = [key for key in saved["state_dict"] if "lightning_peft" not in key]
    (group,) = optimizer["param_groups"]
    assert len(group["params"]) == len(names) == 6
    assert (group["initial_lr"], group["lr"]) == (0.2, 0.1)
    assert set(optimizer["state"]) == set(range(6))


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        (["--model.learning_rate=2e-4"], 2e-4),
        (["--peft.method=IA3"], 3e-2),
        (["--peft.method=IA3", "--model.learning_rate=2e-4"], 2e-4),
        (["--model.learning_rate=2e-4", "--model.optimizer.lr=0.5"], 0.5),
        (["--peft.method=IA3", "--config=own.yaml"], 0.25),
        ([], 1e-3),  # torch's
    ],
)
def test_a_models_optimizer_gets_the_models_rate_unless_it_has_its_own(
    words: list[str], rate: float, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    (folder / "task.yaml").write_text(
        "model: {class_path: SequenceClassification, init_args: {model: somewhere, optimizer: torch.optim.SGD}}\n"
        "data: {class_path: cli_toy.ToyData}\n"
    )
    (folder / "own.yaml").write_text("model: {init_args: {optimizer: {init_args: {lr: 0.25}}}}\n")
    arguments = ReadingCLI(["fit", "--config", "task.yaml", *words]).section()["model"]["init_args"]
    assert arguments["optimizer"]["init_args"]["lr"] == rate


def test_the_section_before_a_model_that_is_built_late(command: Command, folder: Path) -> None:
    (folder / "cli_toy_late.py").write_text(
        "import cli_toy\nfrom torch import nn\n\n\nclass Late(cli_toy.Toy):\n"
        "    def configure_model(self):\n        self.net, self.head = nn.Linear(8, 8), nn.Linear(8, 2)\n"
    )
    code, _, err = command("fit", "--config", "lora.yaml", "--model=cli_toy_late.Late", "--optimizer=torch.optim.SGD")
    assert code == 0, err
    assert "net.adapters.default.lora_A" in read_checkpoint(CHECKPOINT)["state_dict"]


@pytest.mark.parametrize(
    "words", [["--optimizer=bitsandbytes.optim.AdamW8bit"], ["--model=CausalLM", "--model.model=x"]]
)
def test_missing_bitsandbytes_is_told_with_its_extra(
    command: Command, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    path = "optimizer"
    if "--model=CausalLM" in words:
        words, path = [*words, "--model.optimizer=bitsandbytes.optim.AdamW8bit"], "model.init_args.optimizer"
    code, _, err = command("fit", "--config", "lora.yaml", *words)
    fault = f"command line: {path}: bitsandbytes is not installed; pip install 'lightning-peft[quantization]'"
    assert err.splitlines()[-1].removeprefix("lightning-peft:").strip() == fault
    assert code == 2
