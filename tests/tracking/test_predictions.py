"""Predictions in a file, against what `trainer.predict` returns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset

from lightning_peft.methods.errors import PEFTError
from lightning_peft.tracking import PredictionFile

FORMS = ("texts", "tensor", "dicts", "columns", "arrays", "text", "number", "nothing", "uneven", "short", "object")


class Squares(L.LightningModule):
    """Predicts the square of each row, in one of several forms."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        self.form = form

    def predict_step(self, batch: torch.Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        squares = batch.float() ** 2 / 3
        return {
            "texts": [f"“{int(value)}”\n" for value in batch],
            "tensor": torch.stack([squares, -squares], dim=1).bfloat16() if batch_idx > 99 else squares,
            "dicts": [{"square": value, "of": {"value": int(n)}} for value, n in zip(squares, batch, strict=True)],
            "columns": {"square": squares, "pair": torch.stack([batch, batch], dim=1)},
            "arrays": squares.numpy(),
            "text": "a text",
            "number": squares.sum(),
            "nothing": None,
            "uneven": {"a": squares, "b": squares[:1]},
            "short": squares[:1],
            "object": [object()] * len(batch),
        }[self.form]


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(7))


def loader(rows: int = 7, batch_size: int = 3) -> DataLoader[Any]:
    return DataLoader(torch.arange(rows), batch_size=batch_size)  # type: ignore[arg-type]


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    base = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "callbacks": list(callbacks)}
    return L.Trainer(**{**base, **quiet, **options})


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


EXPECTED: dict[str, list[Any]] = {
    "texts": [{"row": n, "prediction": f"“{n}”\n"} for n in range(7)],
    "tensor": [{"row": n, "prediction": round(n * n / 3, 6)} for n in range(7)],
    "arrays": [{"row": n, "prediction": round(n * n / 3, 6)} for n in range(7)],
    "dicts": [{"row": n, "square": round(n * n / 3, 6), "of": {"value": n}} for n in range(7)],
    "columns": [{"row": n, "square": round(n * n / 3, 6), "pair": [n, n]} for n in range(7)],
}


@pytest.mark.parametrize("form", EXPECTED)
def test_each_row_has_a_line(form: str, tmp_path: Path) -> None:
    trainer(tmp_path, PredictionFile()).predict(Squares(form), loader(), return_predictions=False)
    assert lines(tmp_path / "predictions.jsonl") == EXPECTED[form]


def test_row_comes_first_and_texts_are_as_they_are(tmp_path: Path) -> None:
    trainer(tmp_path, PredictionFile()).predict(Squares("texts"), loader(1))
    assert (tmp_path / "predictions.jsonl").read_text(encoding="utf-8") == '{"row": 0, "prediction": "“0”\\n"}\n'


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    class Odd(Squares):
        def predict_step(self, batch: torch.Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return [torch.tensor([float("nan"), float("inf"), 1 / 3]), numpy.float32(0.1), None, True]

    trainer(tmp_path, PredictionFile()).predict(Odd(), loader(4, 4))
    found = [line["prediction"] for line in lines(tmp_path / "predictions.jsonl")]
    assert found == [[None, None, 0.333333], 0.1, None, True]


def test_lines_are_there_as_soon_as_their_batch_is_done(tmp_path: Path) -> None:
    seen = []

    class Look(L.Callback):
        def on_predict_batch_end(self, *_: Any) -> None:
            seen.append(len(lines(tmp_path / "predictions.jsonl")))

    trainer(tmp_path, PredictionFile(), Look()).predict(Squares(), loader())
    assert seen == [3, 6, 7]


def test_place_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "mine.jsonl"
    trainer(tmp_path, PredictionFile(str(path))).predict(Squares(), loader())
    assert lines(path) == EXPECTED["tensor"]
    logger = CSVLogger(tmp_path / "runs", name="squares", version=3)
    trainer(tmp_path, PredictionFile(), logger=logger).predict(Squares(), loader())
    assert lines(tmp_path / "runs" / "squares" / "version_3" / "predictions.jsonl") == EXPECTED["tensor"]


def test_a_second_run_replaces_the_file(tmp_path: Path) -> None:
    loops = trainer(tmp_path, PredictionFile())
    loops.predict(Squares(), loader())
    loops.predict(Squares(), loader(2))
    assert lines(tmp_path / "predictions.jsonl") == EXPECTED["tensor"][:2]


def test_several_loaders_are_told_apart(tmp_path: Path) -> None:
    trainer(tmp_path, PredictionFile()).predict(Squares(), [loader(2), loader(3, 2)])
    assert lines(tmp_path / "predictions.jsonl") == [
        {"dataloader": at, "row": row, "prediction": round(row * row / 3, 6)}
        for at, rows in ((0, 2), (1, 3))
        for row in range(rows)
    ]


def test_rows_of_a_stream_are_counted(tmp_path: Path) -> None:
    trainer(tmp_path, PredictionFile()).predict(Squares(), DataLoader(Stream(), batch_size=3))
    assert lines(tmp_path / "predictions.jsonl") == EXPECTED["tensor"]


NEEDED = "return a list, a tensor or a dict of them, with an item for each row"
BAD = {
    "text": f"returned str, which has no rows to write; {NEEDED}",
    "number": f"returned a single number, which has no rows to write; {NEEDED}",
    "nothing": f"returned NoneType, which has no rows to write; {NEEDED}",
    "uneven": f"returned a dict of columns of differing lengths, which has no rows to write; {NEEDED}",
    "short": f"returned 1 rows for a batch of 3; {NEEDED}",
    "object": "returned a object, which can't be written as JSON",
}


@pytest.mark.parametrize("form", BAD)
def test_prediction_without_rows_is_refused(form: str, tmp_path: Path) -> None:
    with pytest.raises(PEFTError) as caught:
        trainer(tmp_path, PredictionFile()).predict(Squares(form), loader())
    assert str(caught.value) == f"predict: predict_step {BAD[form]}"


@pytest.mark.xdist_group("devices")
@pytest.mark.slow
def test_two_devices_write_what_one_does(tmp_path: Path) -> None:
    """Seven rows: one device has a row more."""
    devices = {"devices": 2, "strategy": "ddp_fork"}
    trainer(tmp_path, PredictionFile(), **devices).predict(Squares("columns"), loader(), return_predictions=False)
    assert lines(tmp_path / "predictions.jsonl") == EXPECTED["columns"]
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


@pytest.mark.xdist_group("devices")
@pytest.mark.slow
def test_stream_on_two_devices_is_refused(tmp_path: Path) -> None:
    devices = {"devices": 2, "strategy": "ddp_fork"}
    with pytest.raises(Exception, match="a data loader without a batch sampler can't be divided among devices"):
        trainer(tmp_path, PredictionFile(), **devices).predict(
            Squares(), DataLoader(Stream(), batch_size=3), return_predictions=False
        )
