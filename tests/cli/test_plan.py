"""`lightning-peft plan`: the table, what fits, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_peft.cli import main


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of a decoder of which there is a configuration alone, on data of which there is nothing."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
    LlamaConfig(vocab_size=100, architectures=["LlamaForCausalLM"], **sizes).save_pretrained(tmp_path / "model")
    file = tmp_path / "run.yaml"
    file.write_text(
        f"""\
model: {{class_path: CausalLM, init_args: {{model: {tmp_path / "model"}}}}}
data: {{class_path: InstructionData, init_args: {{path: rows.jsonl, max_length: 32, batch_size: 2}}}}
trainer: {{precision: bf16-mixed, accelerator: gpu, devices: 2, strategy: peft_ddp}}
peft: {{method: {{class_path: LoRA, init_args: {{r: 4, target_modules: [q_proj]}}}}}}
"""
    )
    return file


def test_a_configuration_alone_is_enough(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--config", str(config), "--methods", "LoRA,DiffPruning", "--quantizations", "nf4-dq"]
    numbers = tmp_path / "plan.json"
    assert main([*words, "--fit", "24GB", "--json", str(numbers), "--peft.method.r", "8"]) == 0
    shown = capsys.readouterr().out
    rows = json.loads(numbers.read_text())
    assert [(row["method"], row["base"], row["strategy"]) for row in rows[:4]] == [
        ("LoRA", "none", "peft_ddp"),
        ("LoRA", "none", "peft_fsdp"),
        ("LoRA", "nf4-dq", "peft_ddp"),
        ("LoRA", "nf4-dq", "peft_fsdp"),
    ]
    of_lora, sharded, packed, _ = rows[:4]
    assert of_lora["trainable"] == 6 * 8 * (32 + 32)
    assert of_lora["adapter_bytes"] == 4 * of_lora["trainable"]
    assert of_lora["checkpoint_bytes"] == pytest.approx(12 * of_lora["trainable"], abs=100)
    for row in rows[:4]:
        assert row["peak"] == row["weights"] + row["gradients"] + row["optimizer"] + row["activations"]
        assert row["fits"] is True
    assert packed["weights"] < of_lora["weights"]
    assert sharded["weights"] < of_lora["weights"]
    assert "fault" in rows[-1]
    assert "DiffPruning over nf4-dq: DiffPruning.target_modules: " in shown
    assert "2 devices of 24GB: fits as configured, " in shown
    assert "fits 24.0 GB" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fit", "big"], "fit: 'big' is no size; give the GPU's memory, such as 24GB or 80GB"),
        (["--fit", "1.5 GB"], "fit: '1.5 GB' is all taken by CUDA, NCCL and libraries, 1.5 GB; give more"),
        (["--batch", "2x"], "batch: '2x' is neither rows nor rows and length; give 8, or 2x2048"),
        (["--devices", "two"], "devices: 'two' is no list of numbers; give 1, or 1,2,8"),
        (["--methods", "LoRa"], "methods: there is no 'LoRa'; did you mean 'LoRA'?"),
    ],
)
def test_mistakes(words: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(config), *words]) == 2
    assert message in capsys.readouterr().err


def test_without_bitsandbytes_what_is_dense_is_planned(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_peft.quantization.config.find_spec", lambda name: None)
    needed = 'needs bitsandbytes; pip install "lightning-peft[quantization]"'
    words = ["plan", "--config", str(config), "--devices", "1", "--fit"]
    assert main([*words, "1.50001GB"]) == 0
    shown = capsys.readouterr().out
    assert [line.split("│")[2].strip() for line in shown.splitlines() if line.startswith("│ LoRA")] == ["none", "bf16"]
    assert f"int8, nf4-dq: not planned, as it {needed}\n" in shown
    assert "nothing fits 9.5 kB, not with checkpointing and offloading; use a smaller batch" in shown
    assert main([*words, "24GB", "--quantizations", "bf16,int8"]) == 2
    assert capsys.readouterr().err == f"lightning-peft: quantization: int8 {needed}\n"
