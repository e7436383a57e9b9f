from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.processes import run_ranks
from tests.stand_ins import save_spoken, save_squares, segformer, yolos
from tests.tasks.devices import CASES, logged
from tests.tasks.test_question_answering import written


@pytest.mark.xdist_group("devices")
@pytest.mark.slow
def test_two_devices_log_what_one_does(tiny_bert: str, reviews: str, tmp_path: Path) -> None:
    from transformers import Wav2Vec2FeatureExtractor

    shutil.copytree(tiny_bert, tmp_path / "bert")
    lines = Path(reviews).read_text().splitlines(keepends=True)
    (tmp_path / "odd.jsonl").write_text("".join(lines[:41]))
    written(tmp_path / "questions.jsonl", 21, 21, 0.3)
    save_spoken(tmp_path / "spoken", ["ab cad", "dab", "a b c d", "cab", "b"])
    Wav2Vec2FeatureExtractor(sampling_rate=8000, return_attention_mask=True).save_pretrained(tmp_path / "extractor")

    save_squares(tmp_path / "squares", 5)
    for model in (segformer, yolos):
        (tmp_path / model.__name__).mkdir()
        model(tmp_path / model.__name__)

    one = {name: logged(tmp_path, name) for name in CASES}
    matrices = {file: file.read_text() for file in tmp_path.rglob("test_confusion_matrix.csv")}
    assert {file.parts[-3] for file in matrices} == {"classification", "empty"}
    for file in matrices:
        file.unlink()
    run_ranks(tmp_path / "ranks", ["-m", "tests.tasks.devices", tmp_path])
    two = json.loads((tmp_path / "two.json").read_text())
    for name in CASES:
        assert two[name] == pytest.approx(one[name], rel=1e-5, nan_ok=True), name
    assert {file: file.read_text() for file in matrices} == matrices

    assert one["classification"]["test_majority"] == pytest.approx(21 / 41)
    assert sorted(one["answers"]) == ["test_exact_match", "test_f1", "test_loss"]
    assert one["texts"]["test_chrf"] > 0
    assert 0 < one["speech"]["test_cer"] != one["speech"]["test_wer"]
    assert one["empty"]["test_accuracy"] > 0
