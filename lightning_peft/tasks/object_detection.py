"""Object detection: boxes around things in an image, and what each of them is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torchmetrics import Metric

from lightning_peft.tasks.boxes import BOX_SCORES, MeanAveragePrecision, best_boxes, corners
from lightning_peft.tasks.classification import Classification
from lightning_peft.tasks.metrics import MetricFactory
from lightning_peft.tasks.task import Outcome

_NOT_FOR_THE_MODEL = ("labels", "sizes")


def _score(name: str, task: Any) -> Metric:
    return MeanAveragePrecision([name])


class ObjectDetection(Classification):
    """A pretrained detector whose queries each give a class and a box, such as DETR or YOLOS, with a new class head.

    Batches are those of `DetectionData`: `labels`, a dict for each image with `boxes` and `class_labels`, or None for
    an image that does not count; `sizes`, each image's height and width; and what the model is called with. The loss is
    the model's own, over the pairs of queries and boxes that fit best; crowds have no part in it.

    Beside it, `val_map` is COCO's mean average precision, of the 100 best boxes of each image. Other `metrics` are
    `map_50`, `map_75`, `map_small`, `map_medium`, `map_large`, and the mean recalls `mar_1`, `mar_10`, `mar_100`,
    `mar_small`, `mar_medium` and `mar_large`: see `MeanAveragePrecision`.

    Args:
        model: see `Classification`; a given module is called with `labels` too, and its output has `loss`, `logits` and
            `pred_boxes`, laid out as `best_boxes` says.
        **options: see `Classification`. A checkpoint with a head for another number of classes gets a new one.
    """

    auto_class: ClassVar[str] = "AutoModelForObjectDetection"
    known_metrics: ClassVar[Mapping[str, MetricFactory]] = {name: partial(_score, name) for name in BOX_SCORES}
    takes_other_metrics: ClassVar[bool] = False

    def model_arguments(self) -> dict[str, Any]:
        """The classes, and that a head of another size is replaced."""
        return {**super().model_arguments(), "ignore_mismatched_sizes": True}

    def default_metrics(self) -> Sequence[str]:
        """Mean average precision."""
        return ("map",)

    def make_metrics(self) -> dict[str, Metric]:
        """One metric that gives all that is asked for, since each would keep all boxes."""
        names = [name for name in self._asked or self.default_metrics() if isinstance(name, str)]
        return {"boxes": MeanAveragePrecision(names)}

    def forward(self, **inputs: Any) -> Any:
        """The model's own output."""
        return self.model(**inputs)

    def outcome(self, batch: dict[str, Any]) -> Outcome:
        """The model's loss over the images that count, how many there are, and its output."""
        counted = _counted(batch)
        # a device that has none runs the model as the others do, on an image without boxes
        rows = counted or [0]
        targets = [_without_crowds(batch["labels"][row], self.device) for row in rows]
        output = self.forward(**_inputs(batch, rows), labels=targets)
        return Outcome(output.loss, torch.tensor(len(counted), device=output.loss.device), output)

    def update(self, metrics: Mapping[str, Any], batch: dict[str, Any], outcome: Outcome) -> None:
        """Enter the images that count into the metric."""
        counted = _counted(batch)
        sizes, output = batch["sizes"][counted], outcome.output
        truth = [
            {
                "boxes": corners(target["boxes"], size),
                "labels": target["class_labels"],
                **{name: target[name] for name in ("area", "iscrowd") if name in target},
            }
            for target, size in zip((batch["labels"][row] for row in counted), sizes, strict=True)
        ]
        metrics["boxes"].update(self._best(output, sizes) if counted else [], truth)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        """For each image its 100 best boxes: `boxes` in pixels, `scores` and `labels`, as `best_boxes` gives them."""
        output = self.forward(**_inputs(batch, range(len(batch["sizes"]))))
        return self._best(output, batch["sizes"])

    def _best(self, output: Any, sizes: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        return best_boxes(output.logits.float(), output.pred_boxes.float(), sizes, self.hparams["num_labels"])


def _counted(batch: Mapping[str, Any]) -> list[int]:
    """The places of a batch's images that count."""
    return [place for place, target in enumerate(batch["labels"]) if target is not None]


def _inputs(batch: Mapping[str, Any], rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """What the model is called with, of those rows."""
    inputs = {name: value for name, value in batch.items() if name not in _NOT_FOR_THE_MODEL}
    return {name: value if len(rows) == len(value) else value[list(rows)] for name, value in inputs.items()}


def _without_crowds(target: Mapping[str, torch.Tensor] | None, device: torch.device) -> dict[str, torch.Tensor]:
    """What the model's loss takes of an image's labels; no boxes where there are none."""
    if target is None:
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return {"boxes": torch.zeros(0, 4, device=device), "class_labels": none}
    single = target["iscrowd"] == 0 if "iscrowd" in target else slice(None)
    return {name: target[name][single] for name in ("boxes", "class_labels")}
