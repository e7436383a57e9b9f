"""Metrics chosen in YAML: names, objects of torchmetrics, and what is told of mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import stand_ins

from .conftest import Command

CONFIG = """\
seed_everything: 0
model:
  class_path: SequenceClassification
  init_args:
    model: model
    metrics:
      - accuracy
      - confusion_matrix
      - class_path: torchmetrics.classification.MulticlassCohenKappa
        init_args: {num_classes: 2}
data: {class_path: TextClassificationData, init_args: {path: a.jsonl, validation_path: a.jsonl}}
trainer:
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  logger: {class_path: CSVLogger, init_args: {save_dir: runs}}
"""


@pytest.mark.usefixtures("datasets_cache")
def test_names_and_objects_in_a_configuration(command: Command, folder: Path) -> None:
    (folder / "model").mkdir()
    stand_ins.distilbert(folder / "model")
    stand_ins.reviews(folder)
    (folder / "a.yaml").write_text(CONFIG)
    code, out, err = command("validate", "--config", "a.yaml")
    assert code == 0, err
    assert "val_multiclass_cohen_kappa" in out
    assert "val_macro_f1" not in out
    assert "actual / predicted" in out
    (file,) = folder.rglob("val_confusion_matrix.csv")
    table = file.read_text().splitlines()
    assert table[0] == "actual / predicted,bad,good"
    cells = [[int(cell) for cell in line.split(",")[1:]] for line in table[1:]]
    assert [sum(row) for row in cells] == [10, 10]


def test_faults_of_metrics_are_told_with_all_others(command: Command, folder: Path) -> None:
    items = [
        "acuracy",
        {"class_path": "MulticlassCohenKapa", "init_args": {"num_classes": 3}},
        {"class_path": "torchmetrics.classification.MulticlassMatthewsCorrCoef", "init_args": {"num_clases": 3}},
        {"class_path": "torchmetrics.classification.MulticlassConfusionMatrix"},
        "f1",
    ]
    model = {"class_path": "SequenceClassification", "init_args": {"model": "x", "metrics": items, "learning_rat": 1}}
    (folder / "a.yaml").write_text(json.dumps({"model": model}))
    code, out, err = command("fit", "--config", "a.yaml")
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert lines[0] == "lightning-peft: 4 faults"
    assert lines[1].startswith(
        "  a.yaml:1: model.init_args.metrics[1]: there is no Metric called 'MulticlassCohenKapa'; did you mean "
        "'MulticlassCohenKappa'"
    )
    assert lines[2:] == [
        "  a.yaml:1: model.init_args.metrics[2].init_args.num_clases: MulticlassMatthewsCorrCoef has no 'num_clases'; "
        "did you mean 'num_classes'?",
        "  a.yaml:1: model.init_args.metrics[3].init_args.num_classes: is missing; MulticlassConfusionMatrix needs it",
        "  a.yaml:1: model.init_args.learning_rat: SequenceClassification has no 'learning_rat'; did you mean "
        "'learning_rate' or 'warmup_ratio'?",
    ]
    # what the constructors say, once the parser is content
    items[1:4] = [{"class_path": "MulticlassCohenKappa", "init_args": {"num_classes": 3}}, "f1"]
    del model["init_args"]["learning_rat"]  # type: ignore[attr-defined]
    data = {"class_path": "TextClassificationData", "init_args": {"path": "y", "batch_size": 0}}
    (folder / "a.yaml").write_text(json.dumps({"model": model, "data": data}))
    code, out, err = command("fit", "--config", "a.yaml")
    assert (code, out) == (2, "")
    assert err.splitlines()[-4:] == [
        "lightning-peft: 3 faults",
        "  metrics: there is no 'acuracy'; did you mean 'accuracy' or 'top5_accuracy' or 'top3_accuracy'?",
        "  metrics: 'f1' is there more than once",
        "  batch_size: 0 is less than 1",
    ]
