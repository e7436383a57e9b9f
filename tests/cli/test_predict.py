"""The verb predict: where it writes, and what it says."""

from __future__ import annotations

import json
from pathlib import Path

from .conftest import Command

WRITTEN = Path("runs/lightning_logs/version_0/predictions.jsonl")


def test_predictions_are_in_a_file_beside_the_configuration(command: Command, folder: Path) -> None:
    code, out, _ = command("predict", "--config", "lora.yaml", "--data.rows=11")
    assert code == 0
    assert out.splitlines()[-1] == f"Predictions  {WRITTEN} (11 rows)"
    lines = [json.loads(line) for line in WRITTEN.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(11))
    assert all(len(line["prediction"]) == 2 for line in lines)
    assert WRITTEN.with_name("config.yaml").exists()


def test_a_checkpoint_predicts_as_the_model_that_it_holds(command: Command, folder: Path) -> None:
    command("fit", "--config", "lora.yaml")
    checkpoint = "runs/lightning_logs/version_0/checkpoints/epoch=0-step=2.ckpt"
    code, _, _ = command("predict", "--config", "lora.yaml", "--ckpt_path", checkpoint)
    assert code == 0
    import cli_toy
    import torch

    from lightning_peft import load_from_checkpoint

    model = load_from_checkpoint(cli_toy.Toy, checkpoint)
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in cli_toy.ToyData().predict_dataloader()])
    lines = Path("runs/lightning_logs/version_1/predictions.jsonl").read_text().splitlines()
    found = torch.tensor([json.loads(line)["prediction"] for line in lines])
    torch.testing.assert_close(found, logits, atol=1e-6, rtol=0)


def test_the_file_of_a_callback_in_the_configuration_is_the_only_one(command: Command, folder: Path) -> None:
    more = ["--trainer.callbacks+=PredictionFile", "--trainer.callbacks.path=out/mine.jsonl"]
    code, out, _ = command("predict", "--config", "lora.yaml", *more)
    assert code == 0
    assert out.splitlines()[-1] == "Predictions  out/mine.jsonl (16 rows)"
    assert not list(folder.rglob("predictions.jsonl"))
