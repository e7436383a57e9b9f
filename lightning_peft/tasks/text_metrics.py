"""Metrics of generated texts against reference texts, and of the tokens that a model foresees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torchmetrics import MeanMetric, Metric
from torchmetrics.functional.text import rouge_score, squad
from torchmetrics.text import CharErrorRate, CHRFScore, SacreBLEUScore, WordErrorRate


class Perplexity(MeanMetric):
    """The exponential of the mean loss per token; it is updated with a batch's mean loss and its number of tokens."""

    def compute(self) -> torch.Tensor:
        """The perplexity over all devices, a scalar."""
        return super().compute().exp()


class WordErrors(WordErrorRate):
    """The words to put in, take out or exchange, as a part of the references' words; it may be more than 1."""

    def update(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Enter texts with one reference each."""
        super().update(list(texts), [reference for (reference,) in references])


class CharacterErrors(CharErrorRate):
    """The same in characters."""

    def update(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Enter texts with one reference each."""
        super().update(list(texts), [reference for (reference,) in references])


class RowMean(Metric):
    """The mean over all rows of a score that each row has for itself.

    Args:
        score: gives a row's score from its text and its reference.
    """

    total: torch.Tensor
    rows: torch.Tensor

    def __init__(self, score: Callable[[str, str], float]) -> None:
        super().__init__()
        self.score = score
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("rows", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Enter texts with one reference each."""
        self.total += sum(self.score(text, reference) for text, (reference,) in zip(texts, references, strict=True))
        self.rows += len(texts)

    def compute(self) -> torch.Tensor:
        """The mean, a scalar."""
        return self.total / self.rows


def exact_match(text: str, reference: str) -> float:
    """1 where both are the same but for space around them, else 0."""
    return float(text.strip() == reference.strip())


def token_f1(text: str, reference: str) -> float:
    """SQuAD's F1 of the words that both have in common, from 0 to 1; case, punctuation and articles don't count."""
    truth: Any = {"id": "0", "answers": {"text": [reference], "answer_start": [0]}}
    return float(squad({"id": "0", "prediction_text": text}, truth)["f1"]) / 100


def rouge(kind: str, text: str, reference: str) -> float:
    """The f-measure of `rouge1`, `rouge2` or `rougeL`."""
    return float(rouge_score(text, reference, rouge_keys=kind)[f"{kind}_fmeasure"])


TEXT_METRICS: dict[str, Callable[[], Metric]] = {
    "bleu": SacreBLEUScore,
    "chrf": CHRFScore,
    # row by row, since ROUGEScore keeps rows in lists: devices with differing numbers of rows would wait for each other
    **{kind: partial(RowMean, partial(rouge, kind)) for kind in ("rouge1", "rouge2", "rougeL")},
    "exact_match": partial(RowMean, exact_match),
    "token_f1": partial(RowMean, token_f1),
    "wer": WordErrors,
}
"""What makes a metric of texts, by the name under which it is logged."""
