"""What the tasks share: a pretrained model or a given one, its optimizer, and a loss with metrics beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torchmetrics import MeanMetric, Metric

from lightning_peft.methods.errors import PEFTError
from lightning_peft.tasks.metrics import MetricFactory, metric_faults, metric_name, split_values
from lightning_peft.tasks.pretrained import check_length, load_pretrained
from lightning_peft.tasks.schedules import configure
from lightning_peft.tracking.matrices import show_matrix

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

    It logs `train_loss`, and `val_loss` or `test_loss` with the metrics that were chosen, over the rows of all devices.
    A task says in `known_metrics` which ones can be named, in `default_metrics` which ones it logs unless told, and in
    `update` what they are given. Where a metric has a number for each class it is logged as `val_<metric>_<class>`; a
    matrix is shown by `show_matrix`.

    Args:
        model: a hub id, a folder, `package:NAME/folder` in an installed Python package, or a module.
        learning_rate: AdamW's, at its highest; by default what a configuration's method advises, else 1e-4.
        weight_decay: AdamW's.
        warmup_ratio: the part of all optimizer steps over which the rate rises, before it falls along a cosine.
        optimizer: another optimizer, in place of AdamW with these values. In a configuration, one that is given no `lr`
            gets `learning_rate`.
        lr_scheduler: another schedule, stepped once an epoch.
        model_options: passed on to `from_pretrained`, such as `{revision: main, attn_implementation: eager}`.
        trust_remote_code: lets a model on the hub run the code that it comes with.
        metrics: what is logged beside the loss: names that the task knows and, where it can enter a batch into any,
            objects of torchmetrics, in YAML `{class_path: …, init_args: {…}}`; by default the task's own choice.

    Raises:
        PEFTError: by the constructor, the task doesn't know a metric; by `configure_model`, there is no such model, or
            the data or a metric does not fit it.
    """

    auto_class: ClassVar[str]
    """The class of transformers that loads the model."""
    known_metrics: ClassVar[Mapping[str, MetricFactory]] = {}
    """What makes a metric, by the name under which it is chosen and logged; called with the task by `configure_model`,
    when `model_arguments` has filled the hyper-parameters in."""
    takes_other_metrics: ClassVar[bool] = False
    """Whether `update` gives each metric the same, so that one of any class can be among them."""

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
        metrics: Sequence[str | Metric] | None = None,
    ) -> None:
        super().__init__()
        if faults := metric_faults(metrics, self.known_metrics, self.takes_other_metrics):
            raise PEFTError(faults)
        # functions and modules have no place in a checkpoint
        given = ["model"] if isinstance(model, torch.nn.Module) else []
        given += ["metrics"] if any(isinstance(metric, Metric) for metric in metrics or ()) else []
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", *given])
        # not among the modules: each stage has copies
        self._asked = None if metrics is None else tuple(metrics)
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
    def default_metrics(self) -> Sequence[str]:
        """The names in `known_metrics` of what is logged where nothing is asked for; asked once the data is known."""

    def make_metrics(self) -> dict[str, Metric]:
        """The metrics of one stage by name, beside the loss; each is logged when an epoch ends.

        Raises:
            PEFTError: one that can't be computed with this model and data.
        """
        made, faults = {}, []
        for metric in self.default_metrics() if self._asked is None else self._asked:
            try:
                made[metric_name(metric)] = (
                    metric.clone() if isinstance(metric, Metric) else self.known_metrics[metric](self)
                )
            except ValueError as error:
                faults.append(f"metrics: {metric}: {error}")
        if faults:
            raise PEFTError(faults)
        return made

    @abstractmethod
    def outcome(self, batch: Batch) -> Outcome:
        """The loss of a batch, and the model's output."""

    @abstractmethod
    def update(self, metrics: Mapping[str, Any], batch: Batch, outcome: Outcome) -> None:
        """Enter a batch into the metrics of one stage, which are those of `make_metrics`."""

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
        loss, chosen = self.metrics[stage]["loss"], dict(self.metrics[stage])
        # a metric, since Lightning's mean over devices rounds their rows down to integers; it lets NaN be seen
        loss.update(outcome.loss, outcome.count)
        del chosen["loss"]
        self.update(chosen, batch, outcome)

    def _log_metrics(self, stage: str) -> None:
        values: dict[str, torch.Tensor] = {}
        for name, metric in self._updated(self.metrics[stage]):
            value = metric.compute()
            values |= value if isinstance(value, dict) else {name: value}
        for metric in self.metrics[stage].values():
            with torch.inference_mode(False):  # a later `fit` could not update a state that `validate` made in it
                metric.reset()
        numbers, matrices = split_values(values, self.hparams.get("label_names"))
        for name, number in numbers.items():
            self.log(f"{stage}_{name}", number, prog_bar=name in values)
        for name, matrix in matrices.items():
            show_matrix(self.trainer, f"{stage}_{name}", matrix, self.hparams.get("label_names"))

    def _updated(self, metrics: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """Those that a batch was entered into on any device: all have to compute the same ones, as they wait for each
        other."""
        updated = torch.tensor([float(metric.update_called) for metric in metrics.values()], device=self.device)
        anywhere: Any = self.trainer.strategy.reduce(updated, reduce_op="sum")
        return [item for item, count in zip(metrics.items(), anywhere.tolist(), strict=True) if count]
