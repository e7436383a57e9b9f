"""Classification of texts, or of anything else that a given model makes logits from."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_peft.methods.errors import PEFTError
from lightning_peft.tasks.pretrained import load_pretrained
from lightning_peft.tasks.schedules import configure

IGNORED = -100
"""The label of a row that is left out, as in torch's cross-entropy and transformers' collators."""


class SequenceClassification(L.LightningModule):
    """A pretrained encoder or decoder with a new classification head, or any module that gives logits.

    A batch is a mapping: `labels`, int64 of shape (batch,), where -100 marks a row to leave out, and what the model is
    called with, as keywords. It logs `train_loss`, and for validation `val_loss`, `val_accuracy`, `val_macro_f1` and,
    where the datamodule has `class_counts`, `val_majority`: the accuracy of always naming the most frequent training
    class. Testing logs the same with `test_`. Under several devices all of them are over the rows of all.

    Args:
        model: a hub id, a folder, `package:NAME/folder` in an installed Python package, or a module whose output is
            logits of shape (batch, classes) or has them as `.logits`.
        num_labels: the number of classes; by default the datamodule's `num_labels`, kept in the hyper-parameters.
        learning_rate: AdamW's, at its highest.
        weight_decay: AdamW's.
        warmup_ratio: the part of all optimizer steps over which the rate rises, before it falls along a cosine.
        optimizer: another optimizer, in place of AdamW with these values.
        lr_scheduler: another schedule, stepped once an epoch.
        trust_remote_code: lets a model on the hub run the code that it comes with.

    Raises:
        PEFTError: by `configure_model`, there is no such model, or the number of classes is unknown or too small.
    """

    def __init__(
        self,
        model: str | torch.nn.Module,
        num_labels: int | None = None,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        warmup_ratio: float = 0.06,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        # functions and modules have no place in a checkpoint: they come from the constructor each time
        given = ["model"] if isinstance(model, torch.nn.Module) else []
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", *given])
        self.model: Any = model if isinstance(model, torch.nn.Module) else None
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.metrics: Any = None

    def configure_model(self) -> None:
        """Builds the model and the metrics, once; the head's weights are drawn from torch's global generator."""
        data = self._trainer.datamodule if self._trainer is not None else None  # type: ignore[attr-defined]
        num_labels = self._num_labels(data)
        if self.model is None:
            name, trusted = self.hparams["model"], self.hparams["trust_remote_code"]
            auto = "AutoModelForSequenceClassification"
            self.model = load_pretrained(auto, name, num_labels=num_labels, trust_remote_code=trusted)
        if self.metrics is None:
            self.metrics = torch.nn.ModuleDict({stage: _metrics(num_labels) for stage in ("val", "test")})
        tokenizer, config = getattr(data, "tokenizer", None), getattr(self.model, "config", None)
        if tokenizer is not None and config is not None and getattr(config, "pad_token_id", 0) is None:
            # decoders read the logits at the last token that isn't padding
            config.pad_token_id = tokenizer.pad_token_id

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Logits of shape (batch, classes) in the model's dtype."""
        output = self.model(**inputs)
        logits: torch.Tensor = getattr(output, "logits", output)
        return logits

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The mean cross-entropy of a batch, a scalar."""
        loss, _ = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Logs what is named `val_…`."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Logs what is named `test_…`."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Probabilities, float32 of shape (batch, classes)."""
        return self._logits(batch).softmax(dim=-1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The given optimizer and schedule, or AdamW with warm-up and cosine."""
        return configure(self, self.optimizer, self.lr_scheduler, self.hparams)

    def _logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.forward(**{name: value for name, value in batch.items() if name != "labels"}).float()

    def _loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self._logits(batch)
        total = F.cross_entropy(logits, batch["labels"], ignore_index=IGNORED, reduction="sum")
        return total / (batch["labels"] != IGNORED).sum().clamp(min=1), logits

    def _evaluate(self, batch: dict[str, torch.Tensor], stage: str) -> None:
        labels, metrics = batch["labels"], self.metrics[stage]
        loss, logits = self._loss(batch)
        rows = (labels != IGNORED).sum()
        metrics["loss"].update(loss, rows)
        for name in ("accuracy", "macro_f1"):
            metrics[name].update(logits.argmax(dim=-1), labels)
        counts = getattr(getattr(self.trainer, "datamodule", None), "class_counts", None)
        if counts:
            most = max(range(len(counts)), key=counts.__getitem__)
            metrics["majority"].update((labels == most).sum() / rows.clamp(min=1), rows)
        for name, metric in metrics.items():
            if counts or name != "majority":
                self.log(f"{stage}_{name}", metric, on_epoch=True, prog_bar=True)

    def _num_labels(self, data: Any) -> int:
        known: int = getattr(data, "num_labels", 0)
        given: int = self.hparams["num_labels"] or known
        if not given:
            raise PEFTError("num_labels: give the number of classes, or use a datamodule that has `num_labels`")
        if known > given:
            raise PEFTError(f"num_labels: {given} is less than the data's {known} classes")
        self.hparams["num_labels"] = given
        return given


def _metrics(num_labels: int) -> torch.nn.ModuleDict:
    # a MeanMetric and no logged number: Lightning's mean over devices rounds the rows of each down to an integer
    return torch.nn.ModuleDict(
        {
            "loss": MeanMetric(),
            "accuracy": MulticlassAccuracy(num_labels, average="micro", ignore_index=IGNORED),
            "macro_f1": MulticlassF1Score(num_labels, average="macro", ignore_index=IGNORED),
            "majority": MeanMetric(),
        }
    )
