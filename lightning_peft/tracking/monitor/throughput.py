"""How many rows and tokens of its batches a run gets through in a second."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Throughput:
    """Counts rows and tokens, and the seconds in between, without waiting for the device."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None
        self._rows = 0
        self._tokens: Any = 0

    def resume(self) -> None:
        """Let the clock run, unless it does."""
        self._since = time.perf_counter() if self._since is None else self._since

    def pause(self) -> None:
        """Stop the clock for what is no training."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
        self._since = None

    def add(self, batch: Any) -> None:
        """Count a batch that was trained on."""
        self._rows += rows(batch) or 0
        self._tokens = self._tokens + tokens(batch)

    def read(self) -> dict[str, float]:
        """`samples_per_second` and `tokens_per_second` since the last time, those alone that batches have; the host
        waits for the device."""
        counts = {"samples": self._rows, "tokens": int(self._tokens)}
        self.pause()
        seconds = self._seconds
        self._seconds, self._rows, self._tokens = 0.0, 0, 0
        self.resume()
        return {f"{name}_per_second": count / seconds for name, count in counts.items() if count and seconds}


def rows(batch: Any) -> int | None:
    """The rows of a batch: the size of the first dimension of its `input_ids`, or else of the first tensor in it that
    has one. None where there is none."""
    inputs = _texts(batch)
    first = inputs["input_ids"] if inputs is not None else _first(batch)
    return None if first is None else len(first)


def tokens(batch: Any) -> Tensor | int:
    """The tokens of a batch: those that its `attention_mask` (batch, length) marks, as a scalar on its device, or else
    all of its `input_ids`; 0 where it has none."""
    inputs = _texts(batch)
    if inputs is None:
        return 0
    mask = inputs.get("attention_mask")
    return mask.sum() if isinstance(mask, Tensor) and mask.dim() == 2 else inputs["input_ids"].numel()


def _texts(batch: Any) -> Mapping[str, Any] | None:
    """The part of a batch that has `input_ids` (batch, …)."""
    if isinstance(batch, Mapping):
        ids = batch.get("input_ids")
        return batch if isinstance(ids, Tensor) and ids.dim() else None
    if isinstance(batch, (list, tuple)):
        return next((found for part in batch if (found := _texts(part)) is not None), None)
    return None


def _first(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch if batch.dim() else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((found for part in parts if (found := _first(part)) is not None), None)
