"""Metrics of classes by name: each is updated with logits, (labels, classes), and labels, (labels,), none ignored."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import (
    BinaryF1Score,
    BinaryPrecision,
    BinaryRecall,
    BinaryStatScores,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from lightning_peft.tasks.metrics import MetricFactory


class _OfSecond(BinaryStatScores):
    """Mixed in front of a score of two classes, which is then updated with the logits of both."""

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Enter logits and labels."""
        super().update(logits.argmax(dim=-1), labels)


class SecondF1(_OfSecond, BinaryF1Score):
    """The F1 of the second of two classes."""


class SecondPrecision(_OfSecond, BinaryPrecision):
    """The precision of the second of two classes."""


class SecondRecall(_OfSecond, BinaryRecall):
    """The recall of the second of two classes."""


def _plain(binary: type[Metric], multiclass: Any, task: Any) -> Metric:
    classes = task.hparams["num_labels"]
    return binary() if classes == 2 else _averaged(multiclass, "macro", task)


def _averaged(multiclass: Any, average: str, task: Any) -> Metric:
    metric: Metric = multiclass(task.hparams["num_labels"], average=average)
    return metric


def _accuracy(top: int, task: Any) -> Metric:
    classes = task.hparams["num_labels"]
    if 1 < top >= classes:
        raise ValueError(f"the best {top} of {classes} classes are always right; leave it out")
    return MulticlassAccuracy(classes, average="micro", top_k=top)


def _confusion_matrix(task: Any) -> Metric:
    return MulticlassConfusionMatrix(task.hparams["num_labels"])


_SCORES: Mapping[str, tuple[type[Metric], type[Metric]]] = {
    "f1": (SecondF1, MulticlassF1Score),
    "precision": (SecondPrecision, MulticlassPrecision),
    "recall": (SecondRecall, MulticlassRecall),
}
_AVERAGES = {"macro": "macro", "micro": "micro", "weighted": "weighted", "per_class": "none"}

CLASS_METRICS: Mapping[str, MetricFactory] = {
    "accuracy": partial(_accuracy, 1),
    **{f"top{top}_accuracy": partial(_accuracy, top) for top in (2, 3, 5, 10)},
    **{name: partial(_plain, *classes) for name, classes in _SCORES.items()},
    **{
        f"{name}_{score}": partial(_averaged, multiclass, average)
        for score, (_, multiclass) in _SCORES.items()
        for name, average in _AVERAGES.items()
    },
    "confusion_matrix": _confusion_matrix,
    "majority": lambda task: MeanMetric(),
}
"""What makes a metric for a task with `num_labels` classes, by the name under which it is logged."""
