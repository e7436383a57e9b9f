"""Classification of the words of a text, such as named entities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torchmetrics import Metric

from lightning_peft.tasks.classification import Classification
from lightning_peft.tasks.entities import EntityF1, are_entity_tags
from lightning_peft.tasks.task import Batch, Outcome


class TokenClassification(Classification):
    """A pretrained encoder or decoder with a new head that gives one label to each word.

    Args, batches and metrics are those of `Classification`. Where the labels' names are tags such as `B-place`,
    `I-place` and `O`, it also logs `val_entity_precision`, `val_entity_recall` and `val_entity_f1`: see `EntityF1`.
    """

    auto_class: ClassVar[str] = "AutoModelForTokenClassification"

    def make_metrics(self) -> dict[str, Metric]:
        """Those of `Classification`, and those of entities where the labels mark them."""
        names = self.hparams["label_names"] or []
        return super().make_metrics() | ({"entities": EntityF1(names)} if are_entity_tags(names) else {})

    def update(self, metrics: Mapping[str, Any], batch: Batch, outcome: Outcome) -> None:
        """Enter a batch into the metrics."""
        super().update(metrics, batch, outcome)
        if "entities" in metrics:
            metrics["entities"].update(outcome.output.argmax(dim=-1), batch["labels"])
