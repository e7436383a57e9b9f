"""`peft.quantization` and its neighbours from the command line: what they do, and every fault of theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from lightning_peft.state import read_checkpoint

from .conftest import Command

CHECKPOINT = "runs/lightning_logs/version_0/checkpoints/epoch=0-step=2.ckpt"
LONG = "peft:\n  quantization: {type: nf4, double_quantization: true, skip_modules: [net.2]}\n"
NAMES = "nf4, nf4-dq, fp4, fp4-dq, int8"


def test_inspect_shows_what_would_be_quantized_and_its_bytes(command: Command) -> None:
    code, out, _ = command("inspect", "--config", "lora.yaml", "--peft.quantization=nf4-dq")
    assert code == 0
    # 64 weights in 32 bytes of codes, one byte and one float of scales; a bias of 8 floats; 32 floats that train
    size = 32 + 1 + 4 + 4 * 8 + 4 * 32
    [row] = [line for line in out.splitlines() if line.startswith("│ net.0 ")]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["net.0", "Linear4bit", "LinearLoRA", "32", "72", "nf4-dq, float32", f"{size} B"]
    assert out.count("Linear4bit") == 2
    assert out.endswith(
        "trainable params: 82 || all params: 244 || trainable%: 33.61\n"
        "base: nf4-dq, 2 layers, 74 B (256 B in 16 bits)\n"
    )


@pytest.mark.parametrize(
    "section",
    [
        "{type: nf4, double_quantization: true, skip_modules: [net.2]}",
        "{class_path: lightning_peft.quantization.Quantization, init_args: {double_quantization: true, skip_modules: "
        "[net.2]}}",
        "{class_path: Quantization, init_args: {double_quantization: true, skip_modules: [net.2]}}",
    ],
)
def test_fit_takes_the_long_form_and_a_checkpoint_keeps_it(command: Command, folder: Path, section: str) -> None:
    (folder / "long.yaml").write_text(f"peft:\n  quantization: {section}\n  base_dtype: bfloat16\n")
    code, out, err = command("fit", "--config", "lora.yaml", "--config", "long.yaml")
    assert code == 0, err
    assert "\nbase: nf4-dq, 1 layer, 37 B (128 B in 16 bits)\n" in out
    spec = read_checkpoint(CHECKPOINT)["peft"]
    assert spec["quantization"]["skip_modules"] == ["net.2"]
    assert (spec["stored"], spec["base_dtype"]) == ("nf4-dq", "bfloat16")
    kept = yaml.safe_load((folder / "runs/lightning_logs/version_0/config.yaml").read_text())["peft"]
    assert kept["base_dtype"] == "bfloat16"
    # the configuration that is written beside the checkpoint gives the same run
    code, out, err = command(
        "validate", "--config", "runs/lightning_logs/version_0/config.yaml", "--ckpt_path", CHECKPOINT
    )
    assert code == 0, err
    code, out, err = command("inspect", "--config", "lora.yaml", "--ckpt_path", CHECKPOINT)
    assert code == 2
    assert "it was quantized to nf4-dq there and is not quantized here; pass quantization='nf4-dq'" in err


def test_the_callback_in_the_trainer_takes_it_too(command: Command) -> None:
    words = ["--peft.method=null", "--trainer.callbacks+=PEFT", "--trainer.callbacks.method=LoRA"]
    code, out, err = command("inspect", "--config", "base.yaml", *words, "--trainer.callbacks.quantization=int8")
    assert code == 0, err
    assert out.endswith("base: int8, 3 layers, 216 B (288 B in 16 bits)\n")
    code, _, err = command("inspect", "--config", "base.yaml", *words, "--trainer.callbacks.quantization=int4")
    assert code == 2
    assert err.endswith(f"PEFT.quantization: 'int4' is none of {NAMES}; did you mean 'int8' or 'nf4'?\n")


def test_its_faults_are_told_with_all_others(command: Command, folder: Path) -> None:
    (folder / "bad.yaml").write_text(
        "model: cli_toy.Toy\n"
        "trainer: {max_epochs: three}\n"
        "peft:\n"
        "  method: {class_path: LoRA, init_args: {r: 0}}\n"
        "  quantization: nf5\n"
        "  base_dtype: bf16\n"
        "  base_weights: nowhere\n"
    )
    code, _, err = command("inspect", "--config", "bad.yaml")
    assert code == 2
    assert err.splitlines() == [
        "lightning-peft: 5 faults",
        "  bad.yaml:2: trainer.max_epochs: 'three' is not int or None",
        "  bad.yaml:4: LoRA.r: 0 is not a rank; it must be 1 or more",
        f"  bad.yaml:5: peft.quantization: 'nf5' is none of {NAMES}; did you mean 'nf4'?",
        "  bad.yaml:6: peft.base_dtype: 'bf16' is none of bfloat16, float16, float32; did you mean 'bfloat16' or "
        "'float16'?",
        "  bad.yaml:7: peft.base_weights: there is no file or folder 'nowhere'",
    ]


@pytest.mark.parametrize(
    ("section", "faults"),
    [
        (
            "{type: int8, double_quantization: true, compute_dtype: bfloat16}",
            [
                "Quantization.double_quantization: int8 has one scale a row, too few to be quantized; leave it out",
                "Quantization.compute_dtype: int8 can't do 'bfloat16', it multiplies in the dtype of its input; leave "
                "it out, and set the Trainer's precision or base_dtype",
            ],
        ),
        (
            "{storage_dtype: float32}",
            [
                "Quantization.storage_dtype: 'float32' is none of uint8, bfloat16, float16; FSDP would cast it to its "
                "mixed precision's dtype, which destroys packed bits"
            ],
        ),
        (
            "{typ: nf4, double_quantization: maybe}",
            [
                "peft.quantization.typ: Quantization has no 'typ'; did you mean 'type' or 'compute_dtype' or "
                "'storage_dtype'?",
                "peft.quantization.double_quantization: 'maybe' is not bool",
            ],
        ),
        (
            "{class_path: Quantisation}",
            ["peft.quantization: there is no Quantization called 'Quantisation'; did you mean 'Quantization'?"],
        ),
    ],
)
def test_fields_of_the_long_form_are_told_with_their_place(
    command: Command, folder: Path, section: str, faults: list[str]
) -> None:
    head = "model: cli_toy.Toy\ntrainer: {max_epochs: three}\npeft:\n  method: LoRA\n  quantization: "
    (folder / "bad.yaml").write_text(head + section + "\n")
    code, _, err = command("inspect", "--config", "bad.yaml")
    assert code == 2
    told = [line.strip() for line in err.splitlines()[1:]]
    assert told == [
        "bad.yaml:2: trainer.max_epochs: 'three' is not int or None",
        *(f"bad.yaml:5: {fault}" for fault in faults),
    ]
    # and where the parser has nothing against them
    (folder / "bad.yaml").write_text(f"peft:\n  quantization: {section}\n")
    code, _, err = command("inspect", "--config", "lora.yaml", "--config", "bad.yaml")
    assert code == 2
    assert all(fault in err for fault in faults)


def test_values_are_refused_before_a_model_is_made(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = command(
        "fit", "--config", "lora.yaml", "--peft.quantization=nf5", "--peft.base_dtype=half", "--peft.method.r=0",
        "--model.width=-1",
    )  # fmt: skip
    assert (code, out) == (2, "")
    assert [line.split(":")[0].strip() for line in err.splitlines()[-3:]] == [
        "LoRA.r", "peft.quantization", "peft.base_dtype"
    ]  # fmt: skip
    monkeypatch.setattr("lightning_peft.quantization.config.find_spec", lambda name: None)
    code, _, err = command("fit", "--config", "lora.yaml", "--peft.quantization=nf4", "--model.width=-1")
    assert code == 2
    message = 'quantization: nf4 needs bitsandbytes; pip install "lightning-peft[quantization]"'
    assert err.splitlines()[-1] == f"lightning-peft: peft.{message}"


@pytest.mark.parametrize(
    ("option", "name"),
    [("quantization=nf4", "quantization"), ("base_dtype=bfloat16", "base_dtype"), ("gradient_checkpointing=true",) * 2],
)
def test_full_fine_tuning_does_not_pass_over_it(command: Command, option: str, name: str) -> None:
    name = name.partition("=")[0]
    code, _, err = command("fit", "--config", "lora.yaml", "--peft.method=null", f"--peft.{option}")
    assert code == 2
    assert err.splitlines()[-1] == (
        f"lightning-peft: peft.{name}: is of no use without a method, and method is null; name one, or leave {name} out"
    )


def test_an_adapter_over_a_quantized_base_is_exported(command: Command, folder: Path) -> None:
    assert command("fit", "--config", "lora.yaml", "--peft.quantization=nf4")[0] == 0
    code, _, err = command("export", CHECKPOINT, "adapter", "--model", "cli_toy.Toy")
    assert code == 0, err
    assert "| base quantized to | nf4 |" in (folder / "adapter" / "README.md").read_text()
    assert "| trained parameters | 82 of 244 (33.61%) |" in (folder / "adapter" / "README.md").read_text()
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_env_names_bitsandbytes(command: Command) -> None:
    import bitsandbytes

    _, out, _ = command("env")
    line = next(line for line in out.splitlines() if line.strip().startswith("bitsandbytes"))
    assert line.split() == ["bitsandbytes", bitsandbytes.__version__]
