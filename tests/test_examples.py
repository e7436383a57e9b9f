"""The programs in examples/ that have no test of their own, shortened, as their first lines say to run them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_peft.cli import main

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("datasets_cache")]


def test_a_small_decoder_is_pretrained_and_then_tuned_over_4_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(ROOT / "examples" / "small_decoder.py"), "--rows-per-library", "40", "--steps", "5"]
    done = subprocess.run(
        [sys.executable, *words], env=os.environ, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "lightning-peft fit --config configs/qlora_offline.yaml" in done.stdout
    rows = [json.loads(line) for line in Path("runs/small_decoder/rows/train.jsonl").read_text().splitlines()]
    assert len(rows) == 8 * 35
    assert {row["response"] for row in rows} >= {"numpy", "torch"}

    config = ["--config", str(ROOT / "configs" / "qlora_offline.yaml"), "--trainer.max_epochs=1"]
    short = ["--trainer.limit_train_batches=6", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"]
    assert main(["fit", *config, *short, "--trainer.enable_progress_bar=false"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"base: nf4-dq, 21 layers, \d", printed)
    assert "val_exact_match" in printed
    (path,) = tmp_path.glob("runs/qlora_offline/**/*.ckpt")
    assert path.stat().st_size < 3 * 4 * 117_120 + 100_000
