"""Classification: one label for a whole row, or for each of its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_peft.methods.errors import PEFTError
from lightning_peft.tasks.task import IGNORED, Batch, Outcome, Task


class Classification(Task):
    """A pretrained model with a new classification head, or any module that gives logits.

    A batch is a mapping: `labels`, int64 of shape (batch,) or (batch, tokens), where -100 marks what to leave out, and
    what the model is called with, as keywords. Beside the loss it logs `val_accuracy`, `val_macro_f1` and, where the
    datamodule has `class_counts`, `val_majority`: the accuracy of always naming the most frequent training class.

    Args:
        model: a hub id, a folder, `package:NAME/folder`, or a module whose output is logits of shape (batch, …,
            classes) or has them as `.logits`.
        num_labels: the number of classes; by default the datamodule's `num_labels`, kept in the hyper-parameters.
        label_names: the classes' names, which the model's configuration keeps; by default the datamodule's
            `class_names`.
        **options: see `Task`.

    Raises:
        PEFTError: by `configure_model`, there is no such model, or the number of classes is unknown or too small.
    """

    def __init__(
        self,
        model: str | torch.nn.Module,
        num_labels: int | None = None,
        label_names: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)

    def model_arguments(self) -> dict[str, Any]:
        """The number of classes, and their names where they are known."""
        names = list(self.hparams["label_names"] or getattr(self.data, "class_names", None) or [])
        known: int = getattr(self.data, "num_labels", 0)
        given: int = self.hparams["num_labels"] or known or len(names)
        faults = []
        if not given:
            faults.append("num_labels: give the number of classes, or use a datamodule that has `num_labels`")
        if known > given:
            faults.append(f"num_labels: {given} is less than the data's {known} classes")
        if self.hparams["label_names"] and len(names) != given:
            faults.append(f"label_names: {len(names)} names are given for {given} classes")
        if faults:
            raise PEFTError(faults)
        self.hparams.update(num_labels=given, label_names=names if len(names) == given else None)
        if len(names) != given:
            return {"num_labels": given}
        return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}

    def make_metrics(self) -> dict[str, Metric]:
        """Accuracy, macro-F1 and the majority's accuracy."""
        classes = self.hparams["num_labels"]
        return {
            "accuracy": MulticlassAccuracy(classes, average="micro", ignore_index=IGNORED),
            "macro_f1": MulticlassF1Score(classes, average="macro", ignore_index=IGNORED),
            "majority": MeanMetric(),
        }

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Logits of shape (batch, …, classes) in the model's dtype."""
        output = self.model(**inputs)
        logits: torch.Tensor = getattr(output, "logits", output)
        return logits

    def outcome(self, batch: Batch) -> Outcome:
        """The mean cross-entropy over the labels that count, and logits in float32."""
        logits, labels = self._logits(batch), batch["labels"]
        total = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        count = (labels != IGNORED).sum()
        return Outcome(total / count.clamp(min=1), count, logits)

    def update(self, metrics: Mapping[str, Any], batch: Batch, outcome: Outcome) -> None:
        """Enter a batch into the metrics."""
        labels = batch["labels"]
        for name in ("accuracy", "macro_f1"):
            metrics[name].update(outcome.output.argmax(dim=-1).flatten(), labels.flatten())
        if counts := getattr(self.data, "class_counts", None):
            most = max(range(len(counts)), key=counts.__getitem__)
            metrics["majority"].update((labels == most).sum() / outcome.count.clamp(min=1), outcome.count)

    def predict_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Probabilities, float32 of shape (batch, …, classes)."""
        return self._logits(batch).softmax(dim=-1)

    def _logits(self, batch: Batch) -> torch.Tensor:
        return self.forward(**{name: value for name, value in batch.items() if name != "labels"}).float()
