"""Classification: one label for a whole row, or for each of its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from lightning_peft.methods.errors import PEFTError
from lightning_peft.tasks.class_metrics import CLASS_METRICS
from lightning_peft.tasks.metrics import MetricFactory
from lightning_peft.tasks.task import IGNORED, Batch, Outcome, Task


class Classification(Task):
    """A pretrained model with a new classification head, or any module that gives logits.

    A batch is a mapping: `labels`, int64 of shape (batch,) or (batch, tokens), where -100 marks what to leave out, and
    what the model is called with, as keywords. Beside the loss it logs `val_accuracy`, `val_macro_f1` and, where the
    datamodule has `class_counts`, `val_majority`: the accuracy of always naming the most frequent training class.

    Other `metrics` are `f1`, `precision` and `recall`: of two classes those of the second one, label 1; of more the
    mean over classes. The same with `macro_` (that mean), `micro_`, `weighted_` (by how often a class is right) and
    `per_class_`; `top2_accuracy`, and so on with 3, 5 and 10; and `confusion_matrix`, a row for each actual class. A
    score with nothing to divide by is 0; a class that is neither there nor predicted is left out of means. A metric
    that is an object is given logits, float32 of shape (labels, classes), and labels, int64 of shape (labels,).

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

    known_metrics: ClassVar[Mapping[str, MetricFactory]] = CLASS_METRICS
    takes_other_metrics: ClassVar[bool] = True

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

    def default_metrics(self) -> Sequence[str]:
        """Accuracy, macro-F1 and the majority's accuracy."""
        return ("accuracy", "macro_f1", "majority")

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
        """Enter the labels that count and their logits into the metrics."""
        kept = batch["labels"] != IGNORED
        logits, labels = outcome.output[kept], batch["labels"][kept]
        if not len(labels):
            return  # there are metrics that take no empty batch
        for name, metric in metrics.items():
            if name != "majority":
                metric.update(logits, labels)
            elif counts := getattr(self.data, "class_counts", None):
                metric.update((labels == max(range(len(counts)), key=counts.__getitem__)).float())

    def predict_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Probabilities, float32 of shape (batch, …, classes)."""
        return self._logits(batch).softmax(dim=-1)

    def _logits(self, batch: Batch) -> torch.Tensor:
        return self.forward(**{name: value for name, value in batch.items() if name != "labels"}).float()
