"""Each command and each piece of Python in README.md: run here with small models, or told which test runs it."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from torch import nn

from lightning_peft import LoRA, inject
from lightning_peft.cli import VERBS, main
from tests.stand_ins import chats, llama

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = ("lightning-peft", "python", "pip", "pytest", "torchrun", "wandb")
QUICK = [
    *("--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1"),
    *("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.precision=32-true"),
]
RUN_HERE = ("fit", "predict", "export", "merge", "import", "inspect", "plan", "methods", "env")
"""Verbs that are carried out in this file, with what is small in place of what is on a hub."""
ELSEWHERE = {
    r"pip install .*|pytest": ".ci/run",
    r"lightning-peft fit --config configs/quickstart.yaml": "tests/test_quickstart.py",
    r"lightning-peft fit .*--trainer.logger.*": "tests/tracking/test_wandb_fit.py",
    r"lightning-peft fit .*qlora_instruct.*": "tests/test_configs.py",
    r"lightning-peft fit .*qlora_offline.*|python examples/small_decoder.py": "tests/test_examples.py",
    r"lightning-peft fit .*--trainer.devices 2.*|torchrun .*|TORCH_.* torchrun .*": "tests/strategies/test_ddp.py",
    r"lightning-peft compare .*": "tests/cli/test_compare.py",
    r"lightning-peft import wandb://.*": "tests/cli/test_wandb_import.py",
    r"lightning-peft push .*": "tests/cli/test_interchange.py",
    r"wandb (sync|sweep).*": "tests/test_sweep.py",
    r"pytest tests/.*": "the path",
    r"python (tests|examples)/(?!small).*": "the path",
}
"""By what a command looks like: where it is run, or for a path of its own, that it is there."""


def commands() -> list[str]:
    """What README.md says to type: the lines of its shell blocks, and what stands in the text."""
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    lines = [re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))
    typed = [" ".join(words.split()) for words in inline]
    found = [part.strip() for line in [*lines, *typed] for part in line.split("&&")]
    return list(dict.fromkeys(one for one in found if _is_command(one)))


def _is_command(text: str) -> bool:
    words = [word for word in text.split() if not word.startswith("TORCH_")]
    return words[:1] == ["pytest"] or (len(words) > 1 and words[0] in PROGRAMS)


def _elsewhere(command: str) -> str | None:
    places = [place for pattern, place in ELSEWHERE.items() if re.fullmatch(pattern, command)]
    return places[0] if places else None


@pytest.mark.parametrize("command", commands())
def test_a_command_is_run_by_a_test(command: str) -> None:
    words = command.split()
    if words[0] == "lightning-peft" and len(words) == 2:
        assert set(words[1].split("|")) <= set(VERBS)
    elif (place := _elsewhere(command)) is not None:
        path = next(word for word in words if "/" in word) if place == "the path" else place
        assert (ROOT / path).exists()
    else:
        assert words[1] in RUN_HERE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, datasets_cache: None) -> Path:
    """What a reader has: this repository's configurations, a model and a file of chats."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "model-of-the-hub").mkdir()
    llama(tmp_path / "model-of-the-hub")
    Path(chats(tmp_path)).rename("chats.jsonl")
    return tmp_path


@pytest.mark.slow
def test_commands(folder: Path) -> None:
    model = str(folder / "model-of-the-hub")
    for command in sorted(commands(), key=lambda command: " fit " not in command):
        words = shlex.split(command)[1:]
        if len(words) < 2 or words[0] not in RUN_HERE or _elsewhere(command) is not None:
            continue
        small = ["--data.libraries=[networkx,sympy]", "--data.rows_per_library=8"] if "quickstart" in command else []
        if "configs/" in command and not small and "path-or-hub-id" not in words:
            small = ["--model.model", model]
        # the hub's names, and an adapter that an earlier command has written
        words = [{"path-or-hub-id": model, "org/adapter": "adapter"}.get(word, word) for word in words]
        quick = {"fit": QUICK, "predict": QUICK[3:]}.get(words[0], [])
        assert main([*words, *small, *quick]) == 0, command
        if words[0] == "fit" and not Path("best.ckpt").exists() and "instruct" in command:
            (written,) = folder.glob("runs/instruct/**/*.ckpt")
            shutil.copy(written, "best.ckpt")
    assert {"adapter", "model", "imported.ckpt"} <= {path.name for path in folder.iterdir()}
    assert list(folder.rglob("predictions.jsonl"))


class MyModule(L.LightningModule):
    """Has the names that README.md uses."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.query, self.value = nn.Linear(4, 4), nn.Linear(4, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(0.1)
        self.classifier = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.classifier(self.value(self.query(x).relu()))

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.1)


def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, quantized, checkpoints, export, alone = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    rows = torch.utils.data.DataLoader(torch.randn(8, 4), 4)
    names: dict[str, Any] = {"my_existing_module": MyModule(), "datamodule": rows, "MyModule": MyModule}
    exec(first.replace("L.Trainer(", "L.Trainer(max_epochs=1, accelerator='cpu', enable_progress_bar=False, "), names)
    pytest.importorskip("bitsandbytes")
    exec(quantized, names)

    written = names["trainer"].checkpoint_callback.best_model_path
    Path("runs/…").mkdir(parents=True)
    for name in ("best", "last"):
        shutil.copy(written, f"runs/…/{name}.ckpt")
    exec(checkpoints.replace("MyModule(),", "MyModule(), datamodule,"), names)
    assert isinstance(names["module"], MyModule)

    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    names["new"] = lambda: transformers.BertForSequenceClassification(config)
    names["model"] = inject(names["new"](), LoRA(r=4))
    exec(export.replace("import_adapter(model", "model = new(); import_adapter(model"), names)
    assert transformers.AutoModel.from_pretrained("merged").config.hidden_size == 16

    names["model"] = nn.Sequential()
    names["model"].add_module("body", nn.Linear(4, 4))
    names["model"].add_module("head", nn.Linear(4, 2))
    names["x"] = torch.randn(2, 4)
    expected = names["model"](names["x"])
    exec(alone, names)
    assert torch.equal(names["model"](names["x"]), expected)


def test_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target
