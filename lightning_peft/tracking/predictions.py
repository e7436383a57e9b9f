"""Predictions in a file, row by row, as they are made."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lightning_peft.methods.errors import PEFTError

NAME = "predictions.jsonl"
DIGITS = 6
"""Decimals of a number; float32 holds no more of a probability."""
NEEDED = "return a list, a tensor or a dict of them, with an item for each row"


class PredictionFile(BasePredictionWriter):
    """Writes what `trainer.predict` makes as JSONL: `{"row": 0, "prediction": …}` for each row, in order.

    A text stays as it is, a tensor becomes lists of numbers with six decimals (null for what is no number), and the
    keys of a dict are put beside `row`. A prediction of a batch is a list, a tensor whose first dimension are the rows,
    or a dict of such. Where there are several data loaders, each line holds `dataloader` too. Lines are on disk as soon
    as their batch is done, so nothing has to be kept in memory: `trainer.predict(…, return_predictions=False)`.

    Under several devices each process writes the file `NAME.rank0` and so on beside it. When all are done, the first
    one merges them in the order of the rows, and deletes them; on several machines the folder has to be shared.

    Args:
        path: the file, which is replaced; by default `predictions.jsonl` in the logger's folder, or in the Trainer's
            `default_root_dir` where there is none.

    Raises:
        PEFTError: during prediction: what `predict_step` returns has no rows, or another number of them than the batch;
            under several devices, it is unknown which rows a batch has.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__("batch")
        self.path = path
        self._open: TextIO | None = None
        self._next: dict[int, int] = {}

    def file(self, trainer: pl.Trainer) -> Path:
        """Where the predictions are written; to be asked in every process, as the first one's answer is taken."""
        return Path(self.path if self.path is not None else Path(trainer.log_dir or trainer.default_root_dir) / NAME)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the file."""
        whole = self.file(trainer)
        whole.parent.mkdir(parents=True, exist_ok=True)
        own = whole if trainer.world_size == 1 else _part(whole, trainer.global_rank)
        self._open = own.open("w", encoding="utf-8")
        self._next = {}

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Writes a batch's rows."""
        assert self._open is not None
        values = rows_of(prediction)
        if not batch_indices:
            if trainer.world_size > 1:
                raise PEFTError(
                    "predict: a data loader without a batch sampler can't be divided among devices; use one"
                )
            start = self._next.get(dataloader_idx, 0)
            self._next[dataloader_idx] = start + len(values)
            batch_indices = range(start, start + len(values))
        if len(values) != len(batch_indices):
            raise PEFTError(
                f"predict: predict_step returned {len(values)} rows for a batch of {len(batch_indices)}; {NEEDED}"
            )
        several = trainer.predict_loop.num_dataloaders > 1
        for row, value in zip(batch_indices, values, strict=True):
            place = {"dataloader": dataloader_idx, "row": row} if several else {"row": row}
            content = value if isinstance(value, Mapping) else {"prediction": value}
            self._open.write(json.dumps({**place, **plain(content), **place}, ensure_ascii=False) + "\n")
        self._open.flush()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Closes the file; the first process merges those of all."""
        self._close()
        if trainer.world_size == 1:
            return
        whole = self.file(trainer)
        trainer.strategy.barrier("predictions are written")
        if trainer.is_global_zero:
            _merge(whole, [_part(whole, rank) for rank in range(trainer.world_size)])
        trainer.strategy.barrier("predictions are merged")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Closes the file, which keeps what was written."""
        self._close()

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
        self._open = None


def _part(whole: Path, rank: int) -> Path:
    return whole.with_name(f"{whole.name}.rank{rank}")


def _merge(whole: Path, parts: list[Path]) -> None:
    """Each part is in order, so that only a line of each is in memory."""
    with ExitStack() as stack:
        files: list[Iterator[str]] = [stack.enter_context(part.open(encoding="utf-8")) for part in parts]
        lines = heapq.merge(*files, key=_place)
        # ranks that computed a batch together have the same rows
        once = (next(same) for _, same in groupby(lines, key=_place))
        stack.enter_context(whole.open("w", encoding="utf-8")).writelines(once)
    for part in parts:
        part.unlink()


def _place(line: str) -> tuple[int, int]:
    content = json.loads(line)
    return content.get("dataloader", 0), content["row"]


def rows_of(prediction: Any) -> list[Any]:
    """The prediction of each row of a batch; of a tensor, a tensor on the CPU.

    Args:
        prediction: what `predict_step` returned.

    Raises:
        PEFTError: it has no rows.
    """
    if isinstance(prediction, Mapping):
        columns = [rows_of(column) for column in prediction.values()]
        if len({len(column) for column in columns}) == 1:
            return [dict(zip(prediction, values, strict=True)) for values in zip(*columns, strict=True)]
        kind = "a dict of columns of differing lengths"
    else:
        # at once, since a row of a device's memory after the other would take its time
        values = prediction.cpu() if isinstance(prediction, Tensor) else prediction
        dimensions = getattr(values, "ndim", None)  # of a tensor, or an array of numpy
        if dimensions or isinstance(values, (list, tuple)):
            return list(values)
        is_number = dimensions == 0 or isinstance(values, (int, float))
        kind = "a single number" if is_number else type(values).__name__
    raise PEFTError(f"predict: predict_step returned {kind}, which has no rows to write; {NEEDED}")


def plain(value: Any) -> Any:
    """`value` as JSON has it, numbers with six decimals.

    Raises:
        PEFTError: it is of a type that JSON can't have.
    """
    if hasattr(value, "tolist"):  # a tensor, or an array of numpy
        return plain(value.tolist())
    if isinstance(value, float):
        return round(value, DIGITS) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, int)):
        return value
    raise PEFTError(f"predict: predict_step returned a {type(value).__name__}, which can't be written as JSON")
