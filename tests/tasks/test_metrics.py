from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassCohenKappa, MulticlassROC

from lightning_peft.methods.errors import PEFTError
from lightning_peft.tasks import CausalLM, QuestionAnswering, SequenceClassification, TokenClassification
from lightning_peft.tasks.class_metrics import CLASS_METRICS
from lightning_peft.tasks.metrics import metric_name, split_values
from lightning_peft.tasks.task import Outcome
from tests.tasks.writers import Pairs, build, trainer


class Table(torch.nn.Module):
    """The logits that each row has a number of."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        return self.logits[row]


def rows(labels: list[int], batch_size: int = 4) -> DataLoader[Any]:
    pairs = [{"row": torch.tensor(row), "labels": torch.tensor(label)} for row, label in enumerate(labels)]
    return DataLoader(pairs, batch_size=batch_size)  # type: ignore[arg-type]


def by_oracle(name: str, logits: Any, labels: Any) -> Any:
    """What scikit-learn says; classes that are neither there nor predicted are in no mean, as it has them."""
    classes, guess = logits.shape[1], logits.argmax(axis=1)
    if name.startswith("top"):
        best = np.argsort(-logits, axis=1)[:, : int(name[3:].partition("_")[0])]
        return np.mean([label in row for label, row in zip(labels, best, strict=True)])
    if name == "accuracy":
        return oracle.accuracy_score(labels, guess)
    if name == "confusion_matrix":
        return oracle.confusion_matrix(labels, guess, labels=range(classes))
    average, _, score = name.rpartition("_")
    kinds = {"": "binary" if classes == 2 else "macro", "per_class": None}
    options = {"average": kinds.get(average, average), "zero_division": 0}
    if average == "per_class":
        options["labels"] = range(classes)
    return getattr(oracle, f"{score}_score")(labels, guess, **options)


@st.composite
def predictions(draw: Any) -> tuple[Any, Any, list[int]]:
    """Logits, labels of which some are left out and some classes may not occur, and where batches end."""
    classes = draw(st.sampled_from([2, 3, 6, 12]))
    count = draw(st.integers(1, 30))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    there = draw(st.integers(1, classes))
    labels = random.integers(0, there, count)
    labels[random.random(count) < 0.3] = -100
    ends = sorted({count, *draw(st.lists(st.integers(1, count), max_size=4))})
    return random.normal(size=(count, classes)).astype(np.float32), labels, ends


@settings(max_examples=30, deadline=None)
@given(predictions())
def test_scores_of_any_batches_equal_those_of_scikit_learn(given: tuple[Any, Any, list[int]]) -> None:
    logits, labels, ends = given
    classes = logits.shape[1]
    names = [name for name in CLASS_METRICS if name != "majority"]
    names = [name for name in names if not name.startswith("top") or int(name[3:].partition("_")[0]) < classes]
    module = SequenceClassification(Table(torch.zeros(1, classes)), num_labels=classes, metrics=names)
    module.configure_model()
    metrics = {name: module.metrics["val"][name] for name in names}
    for start, end in zip([0, *ends], ends, strict=False):
        outcome = Outcome(torch.tensor(0.0), torch.tensor(0), torch.tensor(logits[start:end]))
        module.update(metrics, {"labels": torch.tensor(labels[start:end])}, outcome)
    kept = labels != -100
    assert all(metric.update_called == kept.any() for metric in metrics.values())
    for name in names if kept.any() else ():
        expected = by_oracle(name, logits[kept], labels[kept])
        assert metrics[name].compute().numpy() == pytest.approx(np.asarray(expected), abs=1e-6), name


def test_what_was_chosen_is_logged_and_nothing_else(tmp_path: Path) -> None:
    """Two classes of three occur, one row has no label, and an object of torchmetrics is among the names."""
    logits = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    labels = [0, 2, 0, 0, 2, -100, 2, 2, 0]
    chosen = ["per_class_recall", "precision", MulticlassCohenKappa(3)]
    module = SequenceClassification(Table(logits), num_labels=3, label_names=["x", "y", "z"], metrics=chosen)
    loops = trainer(tmp_path)
    (found,) = loops.test(module, rows(labels), verbose=False)
    kept = [row for row, label in enumerate(labels) if label >= 0]
    truth, guess = [labels[row] for row in kept], logits.argmax(dim=1)[kept].tolist()
    recall = oracle.recall_score(truth, guess, average=None, labels=range(3), zero_division=0)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), ignore_index=-100)
    assert found == {
        "test_loss": pytest.approx(loss.item(), rel=1e-6),
        "test_per_class_recall_x": pytest.approx(recall[0]),
        "test_per_class_recall_y": 0,
        "test_per_class_recall_z": pytest.approx(recall[2]),
        "test_precision": pytest.approx(oracle.precision_score(truth, guess, average="macro", zero_division=0)),
        "test_multiclass_cohen_kappa": pytest.approx(oracle.cohen_kappa_score(truth, guess), rel=1e-5),
    }
    assert "metrics" not in module.hparams
    # a second time with the same objects
    assert loops.test(module, rows(labels), verbose=False) == [found]
    assert loops.validate(module, rows([-100] * 9), verbose=False)[0].keys() == {"val_loss"}


def test_names_are_kept_in_a_checkpoint(tmp_path: Path) -> None:
    module = SequenceClassification(Table(torch.zeros(4, 2)), num_labels=2, metrics=["f1"])
    loops = trainer(tmp_path, max_epochs=1)
    loops.fit(module, rows([0, 1, 1, 0]))
    loops.save_checkpoint(tmp_path / "a.ckpt")
    again = SequenceClassification.load_from_checkpoint(tmp_path / "a.ckpt", model=Table(torch.zeros(4, 2)))
    assert again.hparams["metrics"] == ["f1"]
    again.configure_model()
    assert sorted(again.metrics["val"]) == ["f1", "loss"]


def test_f1_of_two_classes_is_the_seconds_and_of_more_their_mean(tmp_path: Path) -> None:
    logits = torch.eye(2)[[0, 1, 1, 1]]
    found: dict[str, float] = {}
    for classes in (2, 3):
        module = SequenceClassification(Table(logits), num_labels=2, metrics=["f1", "macro_f1"])
        if classes == 3:
            module = SequenceClassification(Table(torch.eye(3)[[0, 1, 1, 1]]), num_labels=3, metrics=["f1", "macro_f1"])
        (values,) = trainer(tmp_path).test(module, rows([0, 0, 1, 1]), verbose=False)
        found |= {f"{name}_{classes}": value for name, value in values.items() if name != "test_loss"}
    # of class 0: precision 1, recall 1/2; of class 1: precision 2/3, recall 1; class 2 is not there
    assert found == pytest.approx(
        {
            "test_f1_2": 4 / 5,
            "test_macro_f1_2": (2 / 3 + 4 / 5) / 2,
            "test_f1_3": (2 / 3 + 4 / 5) / 2,
            "test_macro_f1_3": (2 / 3 + 4 / 5) / 2,
        }
    )


def test_other_tasks_log_what_was_chosen(tmp_path: Path) -> None:
    module = CausalLM(build("Llama"), metrics=["perplexity"])
    (found,) = trainer(tmp_path).validate(module, Pairs(decoder=True), verbose=False)
    assert found == {"val_loss": found["val_loss"], "val_perplexity": pytest.approx(math.exp(found["val_loss"]))}
    answering = QuestionAnswering(torch.nn.Identity(), metrics=["f1"])
    answering.configure_model()
    assert answering.metrics["val"]["answers"].names == ("f1",)
    tagging = TokenClassification(torch.nn.Identity(), label_names=["O", "B-x"], metrics=["entities"])
    tagging.configure_model()
    assert sorted(tagging.metrics["val"]) == ["entities", "loss"]


def test_what_a_task_does_not_know_is_refused_by_its_constructor() -> None:
    def faults(make: Any) -> tuple[str, ...]:
        with pytest.raises(PEFTError) as caught:
            make()
        return caught.value.faults

    kappa = "torchmetrics.classification.MulticlassCohenKappa"
    given = ["acuracy", kappa, "xyz", "f1", "f1", MulticlassCohenKappa(2), MulticlassCohenKappa(3)]
    one, two, three, *twice = faults(lambda: SequenceClassification("model", metrics=given))
    assert one == "metrics: there is no 'acuracy'; did you mean 'accuracy' or 'top5_accuracy' or 'top3_accuracy'?"
    assert two == f"metrics: there is no '{kappa}'; a class is given as {{class_path: {kappa}}}"
    assert three == f"metrics: there is no 'xyz'; the metrics are {', '.join(CLASS_METRICS)}"
    assert twice == [
        "metrics: 'f1' is there more than once",
        "metrics: 'multiclass_cohen_kappa' is there more than once",
    ]
    assert faults(lambda: SequenceClassification("model", metrics="f1")) == ("metrics: 'f1' is no list; write [f1]",)
    assert faults(lambda: CausalLM("model", metrics=[MulticlassCohenKappa(2)])) == (
        "metrics: MulticlassCohenKappa can't be used here; the metrics are perplexity, accuracy",
    )
    assert faults(lambda: QuestionAnswering("model", max_answer_tokens=0, metrics=["f2"])) == (
        "metrics: there is no 'f2'; did you mean 'f1'?",
        "max_answer_tokens: 0 is less than 1",
    )


def test_what_can_not_be_computed_of_the_data_is_refused_before_training() -> None:
    module = TokenClassification(
        torch.nn.Identity(), label_names=["a", "b", "c"], metrics=["entities", "top5_accuracy"]
    )
    with pytest.raises(PEFTError) as caught:
        module.configure_model()
    assert caught.value.faults == (
        "metrics: entities: the labels are no tags such as B-place, I-place and O",
        "metrics: top5_accuracy: the best 5 of 3 classes are always right; leave it out",
    )


def test_values_are_numbers_by_class_or_matrices(tmp_path: Path) -> None:
    values = {"a": torch.tensor([2.0]), "b": torch.tensor([1.0, 2.0]), "c": torch.eye(2)}
    numbers, matrices = split_values(values, ["x", "y"])
    assert {name: float(value) for name, value in numbers.items()} == {"a": 2, "b_x": 1, "b_y": 2}
    assert list(matrices) == ["c"]
    assert sorted(split_values(values, ["x"])[0]) == ["a", "b_0", "b_1"]
    for value, kind in ((torch.ones(2, 3), "a tensor of shape (2, 3)"), ((torch.ones(1),), "a tuple")):
        with pytest.raises(PEFTError) as caught:
            split_values({"a": value}, None)  # type: ignore[dict-item]
        assert str(caught.value) == f"metrics: 'a' computes {kind}; a number, or one for each class, can be logged"
    module = SequenceClassification(Table(torch.zeros(4, 2)), num_labels=2, metrics=[MulticlassROC(2)])
    with pytest.raises(PEFTError, match="'multiclass_roc' computes a tuple"):
        trainer(tmp_path).validate(module, rows([0, 1, 1, 0]), verbose=False)


@pytest.mark.parametrize(("kind", "name"), [("CohenKappa", "cohen_kappa"), ("R2Score", "r2_score"), ("ROC", "roc")])
def test_name_of_an_object(kind: str, name: str) -> None:
    assert metric_name(type(kind, (MulticlassCohenKappa,), {})(2)) == name
