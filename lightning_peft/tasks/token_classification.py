"""Classification of the words of a text, such as named entities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torchmetrics import Metric

from lightning_peft.tasks.class_metrics import CLASS_METRICS
from lightning_peft.tasks.classification import Classification
from lightning_peft.tasks.entities import EntityF1, are_entity_tags
from lightning_peft.tasks.metrics import MetricFactory
from lightning_peft.tasks.task import Batch, Outcome


class TokenClassification(Classification):
    """A pretrained encoder or decoder with a new head that gives one label to each word.

    Args, batches and metrics are those of `Classification`. Where the labels' names are tags such as `B-place`,
    `I-place` and `O`, it also logs `val_entity_precision`, `val_entity_recall` and `val_entity_f1`: see `EntityF1`.
    Among `metrics` these three are called `entities`.
    """

    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    known_metrics: ClassVar[Mapping[str, MetricFactory]] = {**CLASS_METRICS, "entities": lambda task: _entities(task)}

    def default_metrics(self) -> Sequence[str]:
        """Those of `Classification`, and those of entities where the labels mark them."""
        tags = are_entity_tags(self.hparams["label_names"] or [])
        return (*super().default_metrics(), *(("entities",) if tags else ()))

    def update(self, metrics: Mapping[str, Any], batch: Batch, outcome: Outcome) -> None:
        """Enter a batch into the metrics."""
        others = dict(metrics)
        if "entities" in others:
            others.pop("entities").update(outcome.output.argmax(dim=-1), batch["labels"])
        super().update(others, batch, outcome)


def _entities(task: Any) -> Metric:
    names = task.hparams["label_names"] or []
    if not are_entity_tags(names):
        raise ValueError("the labels are no tags such as B-place, I-place and O")
    return EntityF1(names)
