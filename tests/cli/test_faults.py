"""All faults at once, with the names that were meant; and no fault where the parser has none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_peft.cli.faults import find_faults

from .conftest import Command


def test_four_faults_in_four_sections(command: Command, folder: Path) -> None:
    (folder / "bad.yaml").write_text(
        "peft: {method: {class_path: LORA, init_args: {rr: 4}}}\n"
        "trainer: {max_epoch: 3}\n"
        "model: {class_path: SequenceClassification, init_args: {modle: x}}\n"
    )
    code, out, err = command("fit", "--config", "bad.yaml")
    assert (code, out) == (2, "")
    assert err == (
        "lightning-peft: 4 faults\n"
        "  bad.yaml:1: peft.method: there is no Method called 'LORA'; did you mean 'LoRA'?\n"
        "  bad.yaml:1: peft.method.init_args.rr: LoRA has no 'rr'; did you mean 'r' or 'rslora'?\n"
        "  bad.yaml:2: trainer.max_epoch: Trainer has no 'max_epoch'; did you mean 'max_epochs' or 'min_epochs' or "
        "'max_steps'?\n"
        "  bad.yaml:3: model.init_args.modle: SequenceClassification has no 'modle'; did you mean 'model'?\n"
    )


FIT = ["fit", "--config", "lora.yaml"]
FAULTS = {
    "no verb": (
        ["fti"],
        "there is no verb 'fti'; did you mean 'fit'? The verbs: fit, validate, test, predict, inspect, plan, compare, "
        "methods, env, export, import, merge, push",
    ),
    "no file": (
        ["fit", "--config", "loar.yaml"],
        "loar.yaml: there is no such file; did you mean 'lora.yaml' or 'base.yaml'?",
    ),
    "not an option": (
        ["fit", "lora.yaml"],
        "command line: 'lora.yaml' is not an option; a configuration is given as --config lora.yaml",
    ),
    "no model": (
        ["fit", "--trainer.max_epochs=1"],
        "command line: there is no model; name a LightningModule in a file (--config FILE) or by --model CLASS",
    ),
    "section": (
        [*FIT, "--trainr.max_epochs=1"],
        "command line: trainr: fit has no section or option 'trainr'; did you mean 'trainer'?",
    ),
    "method": (
        [*FIT, "--peft.method", "Dora_"],
        "command line: peft.method: there is no Method called 'Dora_'; did you mean 'DoRA' or 'LoRA' or 'AdaLoRA'?",
    ),
    "method's field": (
        [*FIT, "--peft.method.alhpa=3"],
        "command line: peft.method.init_args.alhpa: LoRA has no 'alhpa'; did you mean 'alpha' or 'alpha_pattern'?",
    ),
    "callback's field": (
        [*FIT, "--peft.module_to_save=[a]"],
        "command line: peft.module_to_save: PEFT has no 'module_to_save'; did you mean 'modules_to_save'?",
    ),
    "peft null": ([*FIT, "--peft=null"], "command line: peft: null is for files; here, write --peft.method=null"),
    "peft without method": (
        ["fit", "--config", "base.yaml", "--peft.modules_to_save=[head]"],
        "command line: peft.method: is missing; name one, such as LoRA, or null for full fine-tuning",
    ),
    "type": (
        [*FIT, "--trainer.max_epochs=many"],
        "command line: trainer.max_epochs: 'many' is not int or None",
    ),
    "literal": (
        [*FIT, "--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.save_last=lnk"],
        "command line: trainer.callbacks.init_args.save_last: 'lnk' is not bool, 'link' or None",
    ),
    "own class": (
        [*FIT, "--model=cli_toy.Tyo"],
        "command line: model: cli_toy has no 'Tyo'; did you mean 'Toy'?",
    ),
    "own module": (
        [*FIT, "--model=cli_toi.Toy"],
        "command line: model: there is no module 'cli_toi'; did you mean 'cli_toy'?",
    ),
    "class of another kind": (
        [*FIT, "--model=cli_toy.ToyData"],
        "command line: model: cli_toy.ToyData is no LightningModule",
    ),
    "missing argument": (
        [*FIT, "--model=SequenceClassification"],
        "command line: model.init_args.model: is missing; SequenceClassification needs it",
    ),
    "optimizer": (
        [*FIT, "--optimizer=LBFGSS"],
        "command line: optimizer: there is no Optimizer called 'LBFGSS'; did you mean 'LBFGS'?",
    ),
    "trainer's refusal": (
        [*FIT, "--trainer.limit_train_batches=-3.5"],
        "trainer: You have passed invalid value -3.5 for limit_train_batches, it has to be in [0.0, 1.0] or an int.",
    ),
    "checkpoint": (
        ["test", "--config", "lora.yaml", "--ckpt_path=x.ckpt"],
        "x.ckpt: there is no such checkpoint file",
    ),
    "target": (
        [*FIT, "--peft.modules_to_save=[haed]"],
        "modules_to_save: 'haed' matches nothing; did you mean 'head'?",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_told_in_one_line(command: Command, case: str) -> None:
    words, expected = FAULTS[case]
    code, _, err = command(*words)
    assert err.splitlines()[-1] == f"lightning-peft: {expected}"
    assert code == 2


def test_a_class_that_is_like_no_other(command: Command) -> None:
    code, _, err = command(*FIT, "--data=Qqq")
    assert code == 2
    assert err.startswith(
        "lightning-peft: command line: data: there is no LightningDataModule called 'Qqq'; there are "
    )
    assert "DocstringData" in err
    assert "TextClassificationData, TokenClassificationData" in err
    assert err.endswith("; any other is given by its whole path, such as my_file.Qqq\n")


def test_a_section_in_a_file_of_its_own(command: Command, folder: Path) -> None:
    (folder / "method.yaml").write_text("class_path: LoRA\ninit_args: {r: 4, alpa: 3}\n")
    (folder / "trainer.yaml").write_text("max_epoch: 3\n")
    code, _, err = command(*FIT, "--peft.method=method.yaml", "--trainer=trainer.yaml", "--data=dat.yaml")
    assert code == 2
    assert err.splitlines()[1:] == [
        "  method.yaml:2: peft.method.init_args.alpa: LoRA has no 'alpa'; did you mean 'alpha'?",
        "  trainer.yaml:1: trainer.max_epoch: Trainer has no 'max_epoch'; did you mean 'max_epochs' or 'min_epochs' or "
        "'max_steps'?",
        "  dat.yaml: there is no such file; did you mean 'lora.yaml' or 'base.yaml' or 'method.yaml'?",
    ]


def test_names_types_and_values_in_one_answer(command: Command, folder: Path) -> None:
    (folder / "bad.yaml").write_text(
        "trainer:\n"
        "  max_epochs: three\n"
        "  callbacks:\n"
        "    - {class_path: ModelCheckpoint, init_args: {monitr: val_loss}}\n"
        "    - LearningRateMonitro\n"
        "model: cli_toy.Toy\n"
        "peft:\n"
        "  method: {class_path: LoRA, init_args: {r: 0, dropout: 2.0}}\n"
    )
    code, _, err = command("inspect", "--config", "bad.yaml")
    assert code == 2
    assert err.splitlines() == [
        "lightning-peft: 5 faults",
        "  bad.yaml:2: trainer.max_epochs: 'three' is not int or None",
        "  bad.yaml:4: trainer.callbacks[0].init_args.monitr: ModelCheckpoint has no 'monitr'; did you mean 'monitor'?",
        "  bad.yaml:5: trainer.callbacks[1]: there is no Callback called 'LearningRateMonitro'; did you mean "
        "'LearningRateMonitor' or 'LearningRateFinder' or 'AdapterMonitor'?",
        "  bad.yaml:8: LoRA.r: 0 is not a rank; it must be 1 or more",
        "  bad.yaml:8: LoRA.dropout: 2.0 is not a probability below 1; it must be in [0, 1)",
    ]


def test_values_of_several_sections_are_refused_together_before_any_work(command: Command) -> None:
    code, out, err = command(
        "fit", "--config", "lora.yaml", "--peft.method.r=0", "--peft.method.alpha=0",
        "--data=TextClassificationData", "--data.path=x.csv", "--data.max_length=0",
    )  # fmt: skip
    assert (code, out) == (2, "")
    assert err.splitlines()[-4] == "lightning-peft: 3 faults"
    assert sorted(line.split(":")[0] for line in err.splitlines()[-3:]) == ["  LoRA.alpha", "  LoRA.r", "  max_length"]


def test_a_module_that_fails_to_import_says_where(command: Command, folder: Path) -> None:
    (folder / "cli_toy_broken.py").write_text("import lightning\n\nx = 1 / 0\n")
    code, _, err = command("fit", "--config", "base.yaml", "--model=cli_toy_broken.Toy")
    assert code == 2
    assert err == (
        "lightning-peft: command line: model: cli_toy_broken.Toy: importing cli_toy_broken fails: ZeroDivisionError: "
        f"division by zero ({folder / 'cli_toy_broken.py'}, line 3)\n"
    )


VALID = {
    "as it is": "",
    "method and fields": "--peft.method=DoRA --peft.method.r=4 --peft.method.target_modules=[net.0]",
    "callbacks": "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val_loss",
    "optimizer and schedule": "--optimizer=AdamW --optimizer.lr=1e-3 --lr_scheduler=StepLR --lr_scheduler.step_size=1",
    "trainer": "--trainer.precision=bf16-mixed --trainer.strategy=ddp --trainer.devices=2 --trainer.profiler=simple",
    "logger off": "--trainer.logger=false",
    "task": "--model=SequenceClassification --model.model=x --model.optimizer=AdamW --model.optimizer.lr=1e-4",
    "data": "--data=TextClassificationData --data.path=x.csv --data.text_column=[a,b]",
    "no adapters": "--peft.method=null",
    "checkpoint": "--ckpt_path=last --seed_everything=4",
    "callback in the Trainer": (
        "--peft.method=null --trainer.callbacks+=PEFT --trainer.callbacks.method=LoRA --trainer.callbacks.method.r=4"
    ),
}
TOP_LEVEL = ["config", "seed_everything", "ckpt_path", "weights_only"]


@pytest.mark.parametrize("case", VALID)
def test_valid_configurations_have_no_faults(folder: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.syspath_prepend(folder)
    assert find_faults("fit", ["--config", "lora.yaml", *VALID[case].split()], TOP_LEVEL) == []


def test_layers_in_files_have_no_faults(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    (folder / "top.yaml").write_text("peft: {method: {init_args: {r: 5}}}\ntrainer: {callbacks: null}\n")
    (folder / "model.yaml").write_text("class_path: cli_toy.Toy\ninit_args: {width: 4}\n")
    (folder / "none.yaml").write_text("peft: null\n")
    words = ["--config", "lora.yaml", "--config", "top.yaml", "--model", "model.yaml", "--config", "none.yaml"]
    assert find_faults("fit", words, TOP_LEVEL) == []


@pytest.mark.parametrize(("module", "extra"), [("wandb", "wandb"), ("datasets", "data")])
def test_a_missing_extra_is_named(
    command: Command, monkeypatch: pytest.MonkeyPatch, folder: Path, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (folder / "cli_toy_extra.py").write_text(
        f"from cli_toy import ToyData\n\n\nclass Needy(ToyData):\n    def __init__(self):\n        import {module}\n"
    )
    code, _, err = command("fit", "--config", "lora.yaml", "--data=cli_toy_extra.Needy")
    assert err.splitlines()[-1] == f"lightning-peft: {module} is not installed; pip install 'lightning-peft[{extra}]'"
    assert code == 2


def test_what_a_constructor_refuses_is_told(command: Command, folder: Path) -> None:
    (folder / "cli_toy_strict.py").write_text(
        "from cli_toy import ToyData\nfrom lightning_peft import PEFTError\n\n\nclass Strict(ToyData):\n"
        "    def __init__(self, rows: int = 4):\n        raise PEFTError([f'rows: {rows} is odd', 'rows: too few'])\n"
    )
    code, _, err = command("fit", "--config", "lora.yaml", "--data=cli_toy_strict.Strict", "--data.rows=3")
    assert err.endswith("lightning-peft: 2 faults\n  rows: 3 is odd\n  rows: too few\n")
    assert code == 2
