"""The answers in windows of a context, and how well they match the right ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.functional.text import squad
from torchmetrics.utilities import dim_zero_cat


class Spans(NamedTuple):
    """The best span of each window of a batch, and the score of none; each of shape (batch,).

    Attributes:
        score: the sum of the logits of both ends; -inf where a window has no token of a context.
        start: the first character in the context.
        end: the character after the last one.
        null: the sum of both logits of the first token, which stands for no answer.
    """

    score: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    null: torch.Tensor

    def lists(self) -> list[list[Any]]:
        """The four as lists of numbers."""
        return [column.tolist() for column in self]


def best_spans(logits: torch.Tensor, offsets: torch.Tensor, max_tokens: int) -> Spans:
    """The best span in the context, of up to `max_tokens` tokens.

    Args:
        logits: of both ends, of shape (2, batch, length).
        offsets: the characters of each token, int64 of shape (batch, length, 2); -1 outside of the context.
        max_tokens: the most that a span has.
    """
    rows, length = torch.arange(logits.shape[1], device=logits.device), logits.shape[2]
    starts, ends = logits.masked_fill(offsets[..., 0] < 0, -torch.inf)
    # for each start only the ends that are near, since all pairs of a long window would fill the memory
    near = F.pad(ends, (0, max_tokens - 1), value=-torch.inf).unfold(1, max_tokens, 1)
    score, place = (starts[:, :, None] + near).flatten(1).max(dim=1)
    first = place // max_tokens
    last = (first + place % max_tokens).clamp(max=length - 1)
    return Spans(score, offsets[rows, first, 0], offsets[rows, last, 1], logits[:, :, 0].sum(dim=0))


class AnswerScores(Metric):
    """SQuAD's `exact_match` and `f1`, from 0 to 100, of the best answer of all windows of each question.

    Args:
        names: which of the two it computes.
    """

    windows: list[torch.Tensor]

    def __init__(self, names: Sequence[str] = ("exact_match", "f1")) -> None:
        super().__init__()
        self.names = tuple(names)
        self.add_state("windows", default=[], dist_reduce_fx="cat")

    def update(
        self, examples: torch.Tensor, spans: Spans, look_up: Callable[[int], tuple[str, list[str]]], nulls: bool
    ) -> None:
        """Enter windows.

        Args:
            examples: the question of each, int64 of shape (batch,); -1 is left out.
            spans: the best span of each.
            look_up: gives a question's context and right answers.
            nulls: whether no answer may be given.
        """
        rows = []
        for example, score, start, end, null in zip(examples.tolist(), *spans.lists(), strict=True):
            context, answers = look_up(example) if example >= 0 else ("", [])
            given, none = _scores(context[start:end], answers), _scores("", answers) if nulls else (0.0, 0.0)
            rows.append([example, score, start, null if nulls else -np.inf, *given, *none])
        # one that is left out is kept till the end, since each device has to have rows to gather
        self.windows.append(torch.tensor(rows, device=self.device))

    def compute(self) -> dict[str, torch.Tensor]:
        """The mean over questions."""
        windows = dim_zero_cat(self.windows).cpu().numpy()
        windows = windows[windows[:, 0] >= 0]
        windows = windows[np.lexsort((windows[:, 2], -windows[:, 1], windows[:, 0]))]
        _, best = np.unique(windows[:, 0], return_index=True)
        none = np.minimum.reduceat(windows[:, 3], best) > windows[best, 1] if len(best) else []
        scores = np.where(np.reshape(none, (-1, 1)), windows[best, 6:8], windows[best, 4:6]).mean(axis=0)
        both = dict(zip(("exact_match", "f1"), scores, strict=True))
        return {name: torch.tensor(both[name]) for name in self.names}


def _scores(given: str, answers: list[str]) -> tuple[float, float]:
    """Exact match and F1 of an answer, against the right one that is nearest; no answer is an empty one."""
    right = answers or [""]
    truth: Any = {"id": "0", "answers": {"text": right, "answer_start": [0] * len(right)}}
    found = squad({"id": "0", "prediction_text": given}, truth)
    return float(found["exact_match"]), float(found["f1"])
