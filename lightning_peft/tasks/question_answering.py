"""Extractive question answering: which part of a context answers a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.nn import functional as F
from torchmetrics import Metric

from lightning_peft.methods.errors import PEFTError
from lightning_peft.tasks.answers import AnswerScores, best_spans
from lightning_peft.tasks.metrics import MetricFactory, metric_faults
from lightning_peft.tasks.task import IGNORED, Batch, Outcome, Task

_NOT_FOR_THE_MODEL = ("start_positions", "end_positions", "example", "offsets")


class QuestionAnswering(Task):
    """A pretrained encoder or decoder with a new head that finds the first and the last token of an answer.

    Batches are those of `QuestionAnsweringData`. The loss is the mean of the cross-entropies of both ends, over the
    tokens that are no padding. Beside it, `val_exact_match` and `val_f1` are SQuAD's, from 0 to 100, over questions: an
    answer is the best span of all windows of a context. Where training has questions without an answer, none is given
    if the first token scores higher than that span in every window. Batches without `example` count in the loss only.

    Args:
        model: see `Task`; a given module's output has `start_logits` and `end_logits`, of shape (batch, length).
        max_answer_tokens: the longest span that is taken for an answer.
        **options: see `Task`.

    Raises:
        PEFTError: by the constructor, `max_answer_tokens` is less than 1; by `configure_model`, there is no such model.
    """

    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    known_metrics: ClassVar[Mapping[str, MetricFactory]] = {
        "exact_match": lambda task: AnswerScores(("exact_match",)),
        "f1": lambda task: AnswerScores(("f1",)),
    }

    def __init__(self, model: str | torch.nn.Module, max_answer_tokens: int = 30, **options: Any) -> None:
        faults = metric_faults(options.get("metrics"), self.known_metrics, self.takes_other_metrics)
        if max_answer_tokens < 1:
            faults.append(f"max_answer_tokens: {max_answer_tokens} is less than 1")
        if faults:
            raise PEFTError(faults)
        super().__init__(model, **options)

    def default_metrics(self) -> Sequence[str]:
        """SQuAD's exact match and F1."""
        return tuple(self.known_metrics)

    def make_metrics(self) -> dict[str, Metric]:
        """One metric for both, since each would keep and gather the same windows."""
        names = tuple(super().make_metrics())
        return {"answers": AnswerScores(names)} if names else {}

    def outcome(self, batch: Batch) -> Outcome:
        """The mean of both ends' cross-entropies over the windows that count, and both logits in float32."""
        logits = self._logits(batch)
        targets = torch.stack([batch["start_positions"], batch["end_positions"]])
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        count = (targets[0] != IGNORED).sum()
        return Outcome(total / 2 / count.clamp(min=1), count, logits)

    def update(self, metrics: Mapping[str, Any], batch: Batch, outcome: Outcome) -> None:
        """Enter a batch into the metrics."""
        if "example" not in batch or not metrics:
            return
        split = "test" if self.trainer.testing else "validation"
        spans = best_spans(outcome.output, batch["offsets"], self.hparams["max_answer_tokens"])
        metrics["answers"].update(
            batch["example"], spans, lambda example: self.data.example(split, example), self.data.unanswerable
        )

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """The best answer in each window.

        Returns:
            for each window, `example`, the question's row number; `answer`, a part of the context; its `score`; and
            `null_score`, that of no answer. A question's answer is that of the highest score of all its windows.
        """
        spans = best_spans(self._logits(batch), batch["offsets"], self.hparams["max_answer_tokens"])
        split = self.data.predict_split()
        return [
            {
                "example": example,
                "answer": self.data.example(split, example).context[start:end].strip(),
                "score": score,
                "null_score": null,
            }
            for example, score, start, end, null in zip(batch["example"].tolist(), *spans.lists(), strict=True)
        ]

    def _logits(self, batch: Batch) -> torch.Tensor:
        """Logits of both ends, float32 of shape (2, batch, length)."""
        inputs = {name: value for name, value in batch.items() if name not in _NOT_FOR_THE_MODEL}
        output = self.forward(**inputs)
        logits = torch.stack([output.start_logits, output.end_logits]).float()
        if "attention_mask" not in batch:
            return logits
        # without it the loss of a window would depend on how much padding its batch has
        return logits.masked_fill(batch["attention_mask"] == 0, torch.finfo(logits.dtype).min)
