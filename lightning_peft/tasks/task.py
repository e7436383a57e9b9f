"""What the tasks share: a pretrained model or a given one, its optimizer, and a loss with metrics beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torchmetrics import MeanMetric, Metric

from lightning_peft.tasks.pretrained import check_length, load_pretrained
from lightning_peft.tasks.schedules import configure

IGNORED = -100
"""The label of what is left out of losses and metrics, as in torch's cross-entropy and transformers' collators."""
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """What a model makes of a batch: the mean loss, a scalar; over how many labels; and the output."""

    loss: torch.Tensor
    count: torch.Tensor
    output: Any


class Task(L.LightningModule, ABC):
    """A LightningModule around a model of transformers, or any other module that answers in the same way.

    It logs `train_loss`, and `val_loss` or `test_loss` with the task's own metrics, over the rows of all devices.

    Args:
        model: a hub id, a folder, `package:NAME/folder` in an installed Python package, or a module.
        learning_rate: AdamW's, at its highest; by default what a configuration's method advises, else 1e-4.
        weight_decay: AdamW's.
        warmup_ratio: the part of all optimizer steps over which the rate rises, before it falls along a cosine.
        optimizer: another optimizer, in place of AdamW with these values.
        lr_scheduler: another schedule, stepped once an epoch.
        model_options: passed on to `from_pretrained`, such as `{revision: main, attn_implementation: eager}`.
        trust_remote_code: lets a model on the hub run the code that it comes with.

    Raises:
        PEFTError: by `configure_model`, there is no such model, or the data does not fit it.
    """

    auto_class: ClassVar[str]
    """The class of transformers that loads the model."""

    def __init__(
        self,
        model: str | torch.nn.Module,
        learning_rate: float | None = None,
        weight_decay: float = 0.01,
        warmup_ratio: float = 0.06,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        model_options: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        # functions and modules have no place in a checkpoint
        given = ["model"] if isinstance(model, torch.nn.Module) else []
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", *given])
        self.model: Any = model if isinstance(model, torch.nn.Module) else None
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.metrics: Any = None

    @property
    def data(self) -> Any:
        """The datamodule that is being run; None without one."""
        return getattr(self._trainer, "datamodule", None)

    def configure_model(self) -> None:
        """Builds the model and the metrics, once; new weights are drawn from torch's global generator."""
        options = self.model_arguments()
        if self.model is None:
            options |= self.hparams["model_options"] or {}
            options["trust_remote_code"] = self.hparams["trust_remote_code"]
            self.model = load_pretrained(self.auto_class, self.hparams["model"], **options)
        if self.metrics is None:
            made = {stage: {"loss": MeanMetric(float("nan")), **self.make_metrics()} for stage in ("val", "test")}
            self.metrics = torch.nn.ModuleDict({stage: torch.nn.ModuleDict(made[stage]) for stage in made})
        check_length(self.model, self.data)

    def model_arguments(self) -> dict[str, Any]:
        """What `from_pretrained` is given beside `model_options`, such as the number of classes."""
        return {}

    @abstractmethod
    def make_metrics(self) -> dict[str, Metric]:
        """The metrics of one stage by name, beside the loss; each is logged when an epoch ends."""

    @abstractmethod
    def outcome(self, batch: Batch) -> Outcome:
        """The loss of a batch, and the model's output."""

    @abstractmethod
    def update(self, metrics: Mapping[str, Any], batch: Batch, outcome: Outcome) -> None:
        """Enter a batch into the metrics of one stage."""

    def forward(self, **inputs: torch.Tensor) -> Any:
        """The model's own output."""
        return self.model(**inputs)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """The mean loss of a batch, a scalar."""
        loss = self.outcome(batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Enters a batch into the metrics named `val_…`."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Enters a batch into the metrics named `test_…`."""
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics named `val_…`."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Logs the metrics named `test_…`."""
        self._log_metrics("test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The given optimizer and schedule, or AdamW with warm-up and cosine."""
        return configure(self, self.optimizer, self.lr_scheduler, self.hparams)

    def _evaluate(self, batch: Batch, stage: str) -> None:
        outcome = self.outcome(batch)
        # a metric, since Lightning's mean over devices rounds their rows down to integers; it lets NaN be seen
        self.metrics[stage]["loss"].update(outcome.loss, outcome.count)
        self.update(self.metrics[stage], batch, outcome)

    def _log_metrics(self, stage: str) -> None:
        for name, metric in self.metrics[stage].items():
            if metric.update_called:
                values = value if isinstance(value := metric.compute(), dict) else {name: value}
                self.log_dict({f"{stage}_{key}": number for key, number in values.items()}, prog_bar=True)
            with torch.inference_mode(False):  # a later `fit` could not update a state that `validate` made in it
                metric.reset()
