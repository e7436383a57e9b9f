"""Semantic segmentation: a class for each pixel of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_peft.tasks.class_metrics import CLASS_METRICS
from lightning_peft.tasks.classification import Classification
from lightning_peft.tasks.metrics import MetricFactory
from lightning_peft.tasks.task import IGNORED, Batch, Outcome


def _mean_iou(task: Any) -> Metric:
    return MulticlassJaccardIndex(task.hparams["num_labels"], average="macro")


def _per_class_iou(task: Any) -> Metric:
    return MulticlassJaccardIndex(task.hparams["num_labels"], average="none")


_OF_LOGITS = ("f1", "precision", "recall", "top2_accuracy", "top3_accuracy", "top5_accuracy", "top10_accuracy")


class SemanticSegmentation(Classification):
    """A pretrained vision model with a new head that gives a class to each pixel, such as SegFormer.

    A batch has `labels`, int64 of shape (batch, height, width), where -100 marks what to leave out, and what the model
    is called with, as keywords. Logits are scaled up to the labels' size, bilinearly. The loss is the mean
    cross-entropy over the pixels that count; an auxiliary head, such as UperNet's, has no part in it.

    Beside it, `val_mean_iou` is the mean over classes of intersection over union, where all images are counted
    together and classes that are neither there nor predicted are left out, and `val_accuracy` the part of right pixels.
    Other `metrics` are `per_class_iou`, and those of `Classification` that need no more than the predicted class. A
    metric that is an object is given predicted classes and labels, both int64 of shape (pixels,).

    Args:
        model: see `Classification`; a given module's logits are of shape (batch, classes, h, w).
        **options: see `Classification`. A checkpoint with a head for another number of classes gets a new one.
    """

    auto_class: ClassVar[str] = "AutoModelForSemanticSegmentation"
    known_metrics: ClassVar[Mapping[str, MetricFactory]] = {
        "mean_iou": _mean_iou,
        "per_class_iou": _per_class_iou,
        **{name: factory for name, factory in CLASS_METRICS.items() if name not in _OF_LOGITS},
    }

    def model_arguments(self) -> dict[str, Any]:
        """The classes, and that a head of another size is replaced."""
        return {**super().model_arguments(), "ignore_mismatched_sizes": True}

    def default_metrics(self) -> Sequence[str]:
        """Mean intersection over union, and the pixels' accuracy."""
        return ("mean_iou", "accuracy")

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Logits of shape (batch, classes, h, w), in the model's dtype and at its own size, such as a quarter."""
        return super().forward(**inputs)

    def outcome(self, batch: Batch) -> Outcome:
        """The mean cross-entropy over the pixels that count, and logits in float32 at the labels' size."""
        labels = batch["labels"]
        logits = _scaled(self._logits(batch), labels.shape[-2:])
        total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        count = (labels != IGNORED).sum()
        return Outcome(total / count.clamp(min=1), count, logits)

    def update(self, metrics: Mapping[str, Any], batch: Batch, outcome: Outcome) -> None:
        """Enter the predicted classes of the pixels that count into the metrics."""
        super().update(metrics, batch, Outcome(outcome.loss, outcome.count, outcome.output.argmax(dim=1)))

    def predict_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """The class of each pixel of the model's inputs, int64 of shape (batch, height, width)."""
        return _scaled(self._logits(batch), batch["pixel_values"].shape[-2:]).argmax(dim=1)


def _scaled(logits: torch.Tensor, size: torch.Size) -> torch.Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
