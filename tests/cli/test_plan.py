"""`lightning-peft plan`: the table, what fits, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_peft.cli import main
from lightning_peft.cli.plan import PlanCLI
from lightning_peft.planning.sharing import Layout
from lightning_peft.tracking.tables import format_bytes


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
        (["--json", "no/plan.json"], "json: there is no folder 'no'; make it, or name a file in another"),
        (["--json", "."], "json: '.' is a folder; name a file in it"),
        (["--trainer.callbacks", "PEFT", "--trainer.callbacks.method", "IA3"], "two PEFT callbacks are in one Trainer"),
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


def test_the_stock_form_of_the_callback(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock, numbers = tmp_path / "stock.yaml", tmp_path / "plan.json"
    own, section = config.read_text().split("peft: ")
    callback = f"callbacks: [{{class_path: PEFT, init_args: {section.strip()}}}]"
    stock.write_text(own.replace("strategy: peft_ddp", f"strategy: peft_ddp, {callback}"))
    rows, verdicts = [], []
    for file in (config, stock):
        words = ["plan", "--config", str(file), "--quantizations", "bf16", "--devices", "1", "--fit", "1.50075GB"]
        assert main([*words, "--json", str(numbers)]) == 0
        rows.append(json.loads(numbers.read_text()))
        verdicts.append(capsys.readouterr().out.splitlines()[-1])
    assert [(row["method"], row["base"]) for row in rows[0]] == [("LoRA", "none"), ("LoRA", "bf16"), ("full", "none")]
    assert [row["fits"] for row in rows[0]] == [False, True, False]
    assert rows[1] == rows[0]
    assert [verdict.partition("712.5 kB: ")[2] for verdict in verdicts] == [
        "--peft.base_dtype bfloat16 --trainer.devices 1",
        "--trainer.callbacks.base_dtype bfloat16 --trainer.devices 1",
    ]


FSDP = ["--trainer.strategy", "lightning_peft.strategies.PEFTFSDPStrategy"]


def test_what_is_configured_comes_first(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--config", str(config), "--methods", "LoRA", "--quantizations", "none", "--devices", "2,4"]
    numbers = tmp_path / "plan.json"
    words += [*FSDP, "--trainer.strategy.cpu_offload", "true", "--fit", "24GB", "--json", str(numbers)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    rows = json.loads(numbers.read_text())
    assert [(row["devices"], row["strategy"], row.get("cpu_offload", False)) for row in rows] == [
        *[(2, "peft_ddp", False), (2, "peft_fsdp", False), (2, "peft_fsdp", True)],
        *[(4, "peft_ddp", False), (4, "peft_fsdp", False), (4, "peft_fsdp", True)],
    ]
    peaks = [format_bytes(row["peak"]) for row in rows if row.get("cpu_offload")]
    assert shown.splitlines()[-2:] == [
        f"2 devices of 24GB: fits as configured, {peaks[0]} of 21.4 GB",
        f"4 devices of 24GB: the cheapest that fits takes {peaks[1]} of 21.4 GB: --trainer.devices 4",
    ]


@pytest.mark.parametrize(
    ("words", "layout"),
    [
        (["--trainer.devices", "0,1,3"], Layout("peft_ddp", 3)),
        (["--trainer.devices", "[0,1]", "--trainer.strategy", "ddp"], Layout("peft_ddp", 2)),
        (["--trainer.strategy", '{"class_path": "lightning.pytorch.strategies.DDPStrategy"}'], Layout("peft_ddp", 2)),
        (["--trainer.strategy", "peft_fsdp", "--trainer.num_nodes", "2"], Layout("peft_fsdp", 4)),
        ([*FSDP, "--trainer.strategy.replicas", "2"], Layout(devices=2)),
        (["--trainer.strategy", "auto", "--trainer.devices", "auto"], Layout()),
    ],
)
def test_devices_and_their_strategy(words: list[str], layout: Layout, config: Path) -> None:
    assert PlanCLI(["--config", str(config), *words]).planned.layout == layout
