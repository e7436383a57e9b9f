"""Runs of the verbs with a small module: what they train, write and say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from lightning_peft.callback import load_from_checkpoint
from lightning_peft.state import read_checkpoint

from .conftest import Command

CHECKPOINT = "runs/lightning_logs/version_0/checkpoints/epoch=0-step=2.ckpt"


def test_fit_trains_adapters_and_says_what_came_of_it(command: Command, folder: Path) -> None:
    code, out, _ = command("fit", "--config", "lora.yaml")
    assert code == 0
    assert "trainable params: 82 || all params: 244 || trainable%: 33.61\n" in out
    cells = [
        [cell.strip() for cell in line.strip("│┃").split("│")] for line in out.splitlines() if line.startswith("│")
    ]
    assert ["val_accuracy", "0.7500", "0.2500"] in cells
    assert ["val_loss", "0.5000", ""] in cells
    size = f"{Path(CHECKPOINT).stat().st_size / 1000:.1f} kB"
    assert out.splitlines()[-6:] == [
        f"Checkpoint   {CHECKPOINT} ({size}, adapters alone)",
        f"Evaluate it  lightning-peft validate --config lora.yaml --ckpt_path {CHECKPOINT}",
        "Load it      from lightning_peft import load_from_checkpoint",
        "             from cli_toy import Toy",
        f"             model = load_from_checkpoint(Toy, '{CHECKPOINT}')",
        f"Export it    lightning-peft export {CHECKPOINT} adapter --model cli_toy.Toy",
    ]


def test_what_the_closing_says_to_do_works(command: Command, folder: Path) -> None:
    _, out, _ = command("fit", "--config", "lora.yaml")
    evaluate = next(line for line in out.splitlines() if line.startswith("Evaluate it"))
    export = next(line for line in out.splitlines() if line.startswith("Export it"))
    assert command(*export.split()[3:])[0] == 0
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    code, out, _ = command(*evaluate.split()[3:])
    assert code == 0, out
    assert re.search(r"val_accuracy\D+0\.75\b", out)
    import cli_toy

    model = load_from_checkpoint(cli_toy.Toy, CHECKPOINT)
    saved = read_checkpoint(CHECKPOINT)["state_dict"]["net.0.adapters.default.lora_B"]
    assert torch.equal(model.state_dict()["net.0.adapters.default.lora_B"], saved)
    assert saved.abs().sum() > 0


def test_the_checkpoint_is_scored_where_it_is_monitored(command: Command) -> None:
    code, out, _ = command(
        "fit", "--config", "lora.yaml", "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val_loss"
    )
    assert code == 0
    row = next(line for line in out.splitlines() if line.startswith("│ val_loss"))
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["val_loss", "0.5000", "0.5000", ""]


@pytest.mark.parametrize("words", [[], ["--config", "none.yaml"], ["--peft.method=null"]])
def test_without_peft_everything_trains(command: Command, folder: Path, words: list[str]) -> None:
    (folder / "none.yaml").write_text("peft: null\n")
    code, out, _ = command("fit", "--config", "lora.yaml" if words else "base.yaml", *words)
    assert code == 0
    assert f"model = Toy.load_from_checkpoint('{CHECKPOINT}')" in out
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    assert sum(tensor.numel() for tensor in checkpoint["state_dict"].values()) == 2 * 72 + 18
    assert "peft" not in checkpoint


@pytest.mark.parametrize("class_path", ["PEFT", "lightning_peft.PEFT"])
def test_the_callback_can_be_listed_in_the_trainer(command: Command, folder: Path, class_path: str) -> None:
    (folder / "stock.yaml").write_text(
        f"trainer:\n  callbacks: {{class_path: {class_path}, init_args: {{method: LoRA, modules_to_save: [head]}}}}\n"
    )
    code, out, _ = command("fit", "--config", "base.yaml", "--config", "stock.yaml")
    assert code == 0
    assert read_checkpoint(CHECKPOINT)["peft"]["method"]["fields"]["r"] == 8
    assert "trainable params: 274 || all params: 436" in out


def test_the_callback_can_be_appended_on_the_command_line(command: Command) -> None:
    options = ["--trainer.callbacks+=PEFT", "--trainer.callbacks.method=LoRA", "--trainer.callbacks.method.r=4"]
    code, out, _ = command("fit", "--config", "base.yaml", *options)
    assert code == 0
    # A and B for two 8x8 layers and an 8x2 one: 2·(4·8 + 8·4) + (4·8 + 2·4)
    assert "trainable params: 168 ||" in out


def test_two_callbacks_are_refused(command: Command) -> None:
    code, _, err = command(
        "fit", "--config", "lora.yaml", "--trainer.callbacks+=PEFT", "--trainer.callbacks.method=LoRA"
    )
    assert err.splitlines()[-1] == "lightning-peft: two PEFT callbacks are in one Trainer; leave one"
    assert code == 2


def test_peft_comes_before_other_callbacks(command: Command) -> None:
    code, *_ = command("fit", "--config", "lora.yaml", "--trainer.callbacks+=EMAWeightAveraging")
    assert code == 0
    assert "current_model_state" in read_checkpoint(CHECKPOINT)


def test_resuming_goes_on_from_the_checkpoint(command: Command) -> None:
    command("fit", "--config", "lora.yaml")
    code, _, _ = command("fit", "--config", "lora.yaml", "--trainer.max_epochs=2", "--ckpt_path", CHECKPOINT)
    assert code == 0
    resumed = read_checkpoint("runs/lightning_logs/version_1/checkpoints/epoch=1-step=4.ckpt")
    command("fit", "--config", "lora.yaml", "--trainer.max_epochs=2")
    whole = read_checkpoint("runs/lightning_logs/version_2/checkpoints/epoch=1-step=4.ckpt")
    assert resumed["global_step"] == 4
    assert all(torch.equal(resumed["state_dict"][name], tensor) for name, tensor in whole["state_dict"].items())


def test_the_configuration_decides_over_the_checkpoints_hyper_parameters(command: Command) -> None:
    command("fit", "--config", "lora.yaml")
    code, _, err = command("test", "--config", "lora.yaml", "--model.width=4", "--ckpt_path", CHECKPOINT)
    assert code == 2
    assert "net.0.adapters.default.lora_A is (2, 8) in the checkpoint and (2, 4) here" in err


def test_the_saved_configuration_runs_every_verb(command: Command) -> None:
    command("fit", "--config", "lora.yaml")
    saved = "runs/lightning_logs/version_0/config.yaml"
    assert yaml.safe_load(Path(saved).read_text())["peft"]["method"]["init_args"]["r"] == 2
    for verb in ("validate", "test", "inspect", "fit"):
        assert command(verb, "--config", saved)[0] == 0


def test_a_second_run_into_the_same_folder_keeps_the_first_ones_configuration(command: Command, folder: Path) -> None:
    words = ["fit", "--config", "lora.yaml", "--trainer.logger=false", "--trainer.default_root_dir=out"]
    for _ in range(2):
        assert command(*words)[0] == 0
    assert [file.name for file in Path("out").glob("config*.yaml")] == ["config.yaml"]
    first = Path("out/config.yaml").read_text()
    assert command(*words, "--peft.method.r=3")[0] == 0
    assert Path("out/config.yaml").read_text() == first
    assert yaml.safe_load(Path("out/config.1.yaml").read_text())["peft"]["method"]["init_args"]["r"] == 3


def test_print_config_gives_a_configuration_that_runs(command: Command) -> None:
    code, out, _ = command("fit", "--config", "lora.yaml", "--peft.method=DoRA", "--print_config")
    assert code == 0
    printed = yaml.safe_load(out)
    assert printed["peft"]["method"]["class_path"] == "lightning_peft.DoRA"
    assert printed["peft"]["method"]["init_args"]["r"] == 2
    Path("printed.yaml").write_text(out)
    assert command("inspect", "--config", "printed.yaml")[0] == 0


def test_help_of_a_method_explains_its_fields(command: Command) -> None:
    code, out, _ = command("fit", "--peft.method.help=LoRA")
    assert code == 0
    assert "Rank of the update, 1 or more." in " ".join(out.split())


def test_inspect_shows_every_module_and_writes_nothing(command: Command, folder: Path) -> None:
    before = sorted(folder.iterdir())
    code, out, _ = command("inspect", "--config", "lora.yaml")
    assert code == 0
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
    assert [[row[0], *row[3:5]] for row in rows] == [["net.0", "32", "72"], ["net.2", "32", "72"], ["head", "18", "18"]]
    assert out.splitlines()[-1] == "trainable params: 82 || all params: 244 || trainable%: 33.61"
    assert [path for path in sorted(folder.iterdir()) if path.name != "__pycache__"] == before


def test_inspect_checks_a_checkpoint(command: Command) -> None:
    command("fit", "--config", "lora.yaml")
    code, out, _ = command("inspect", "--config", "lora.yaml", "--ckpt_path", CHECKPOINT)
    assert (code, out.splitlines()[-1]) == (0, f"{CHECKPOINT} fits this model")
    code, _, err = command("inspect", "--config", "lora.yaml", "--peft.method=DoRA", "--ckpt_path", CHECKPOINT)
    assert code == 2
    assert "the checkpoint's method is LoRA, this run's is DoRA" in err


def test_a_truncated_checkpoint_is_told_before_the_run(command: Command) -> None:
    command("fit", "--config", "lora.yaml")
    Path("half.ckpt").write_bytes(Path(CHECKPOINT).read_bytes()[:9000])
    code, out, err = command("test", "--config", "lora.yaml", "--ckpt_path=half.ckpt")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("lightning-peft: half.ckpt: is truncated or no checkpoint (9,000 bytes; ")


def test_a_run_without_checkpoints_says_nothing_of_one(command: Command) -> None:
    code, out, _ = command("fit", "--config", "lora.yaml", "--trainer.fast_dev_run=true")
    assert code == 0
    assert "val_accuracy" in out
    assert "Checkpoint " not in out


def test_a_bug_keeps_its_traceback(command: Command) -> None:
    with pytest.raises(RuntimeError, match="a bug of the module"):
        command("fit", "--config", "lora.yaml", "--model.fails=true")
