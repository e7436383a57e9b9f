"""Questions about texts that hold the answer, as batches of windows for an extractive model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch.utils.data import DataLoader

from lightning_peft.data.files import HEAD
from lightning_peft.data.labels import IGNORED, row_numbers
from lightning_peft.data.module import Collate, TextData
from lightning_peft.data.tokenizing import missing_columns, text_faults
from lightning_peft.methods.errors import PEFTError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

_LABELS = ("start_positions", "end_positions")
_NOT_FOR_THE_MODEL = (*_LABELS, "example", "offsets")
_OUTSIDE = [[-1, -1]]


class Example(NamedTuple):
    """A context, and the answers that are right; none where the context doesn't tell."""

    context: str
    answers: list[str]


class QuestionAnsweringData(TextData):
    """Questions in the form of SQuAD: each with a context, and answers that are parts of it.

    The columns are `question`, `context` and `answers`, an object with the lists `text` and `answer_start` (characters
    from 0), both empty where the context doesn't tell. The original JSON of SQuAD, nested from `data` on, is read too.
    A context that is longer than a row becomes several overlapping windows: nothing is cut.

    A batch holds the tokenizer's fields, and `start_positions` and `end_positions`, int64 of shape (batch,): the tokens
    of the first answer, or the first token where the window doesn't hold it. Evaluation batches also hold `example`,
    int64 of shape (batch,), the row's number in its split, or -1 in rows that losses and metrics leave out; and
    `offsets`, int64 of shape (batch, length, 2), the characters of the context that each token stands for, or -1. A
    test table without the column `answers` serves for prediction only.

    Args:
        path: see `TableData`.
        max_length: tokens per window, the question and special tokens included.
        stride: the number of the context's tokens that a window shares with the next one.
        **options: see `TextData`; a tokenizer has to be a fast one. A stream is refused.

    Attributes:
        unanswerable: whether there are training questions without an answer; known after `setup`.

    Raises:
        PEFTError: by the constructor, a number is out of its range; by `setup`, data that can't be trained on: a
            missing file or column, text that is null, an answer that doesn't stand where `answer_start` says, a
            question that leaves its context no more than `stride` tokens.
    """

    def __init__(
        self,
        path: str,
        *,
        max_length: int = 384,
        stride: int = 128,
        **options: Any,
    ) -> None:
        self.stride = stride
        super().__init__(path, max_length=max_length, **options)
        self.unanswerable = False
        self._tables: dict[str, Dataset] = {}

    def faults(self) -> list[str]:
        """What is wrong with the arguments."""
        faults = []
        if not 0 <= self.stride < max(self.max_length, 1):
            faults.append(f"stride: {self.stride} is not between 0 and max_length={self.max_length} (that left out)")
        if self.streaming:
            faults.append(
                "streaming: rows are numbered to find their answers; leave it out, the table is mapped from disk"
            )
        return faults + super().faults()

    def read_splits(self) -> DatasetDict:
        """The tables, with one question per row where they are nested."""
        splits = super().read_splits()
        for split, table in splits.items():
            if "context" not in table.column_names and hasattr(table.features.get("data"), "feature"):
                splits[split] = _questions(table, split)
        return splits

    def column_faults(self, table: Dataset, split: str) -> list[str]:
        """Columns that are missing or of another kind, text that is null, and answers that stand elsewhere."""
        answered = split != "test" or "answers" in table.column_names
        texts = ["question", "context"]
        faults = missing_columns(table, split, {"path": [*texts, *(["answers"] if answered else [])]})
        faults += [
            fault
            for column in texts
            if column in table.column_names
            for fault in text_faults(table, column, split, "path")
        ]
        if "answers" in table.column_names:
            faults += [] if _holds_answers(table.features["answers"]) else [_answers_told(split)]
        return faults or (_answer_faults(table, split) if answered else [])

    def load_processor(self, source: str) -> None:
        """Load the tokenizer.

        Raises:
            PEFTError: there is none, or it can't tell which characters a token is from.
        """
        super().load_processor(source)
        if not self.tokenizer.is_fast:
            raise PEFTError(f"tokenizer: {source!r} is no fast tokenizer, and only these know where a token stands")

    def encode(self, table: Dataset, split: str) -> Dataset:
        """The windows of all rows."""
        self._tables[split] = table
        if split == "train":
            self.unanswerable = any(not row["answers"]["text"] for row in _rows(table, ["answers"]))
        if fault := self._length_fault(table, split):
            raise PEFTError(fault)
        workers = self.num_workers if len(table) > HEAD * self.num_workers else 0
        arguments = {"tokenizer": self.tokenizer, "max_length": self.max_length, "stride": self.stride}
        windows = table.map(
            _windows,
            batched=True,
            with_indices=True,
            remove_columns=table.column_names,
            num_proc=workers or None,
            fn_kwargs=arguments,
            desc=f"Tokenizing {split}",
        )
        return cast("Dataset", windows.remove_columns(["example", "offsets"]) if split == "train" else windows)

    def example(self, split: str, index: int) -> Example:
        """The row of a split that `example` in a batch stands for."""
        row = self._tables[split][index]
        return Example(row["context"], row["answers"]["text"] if row.get("answers") else [])

    def collate(self) -> Collate:
        """Pads a batch on the right to its longest window."""
        return partial(_pad, tokenizer=self.tokenizer)

    def filler(self, row: dict[str, Any]) -> dict[str, Any]:
        """The same window of no example, without an answer."""
        return {**row, "example": -1, **{name: IGNORED for name in _LABELS if name in row}}

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test windows in order.

        Raises:
            PEFTError: there is no test table, or it has no answers.
        """
        if "start_positions" not in (self._encoded["test"].column_names if "test" in self._encoded else []):
            raise PEFTError("test_path: there are no test rows with answers; give a file that has them")
        return super().test_dataloader()

    def _length_fault(self, table: Dataset, split: str) -> str | None:
        """That questions leave their contexts too little; the tokenizer would panic on them."""
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        most = max(0, self.max_length - special - self.stride - 1)
        arguments = {"tokenizer": self.tokenizer}
        counted = table.select_columns(["question"]).map(_count_tokens, batched=True, fn_kwargs=arguments)
        long = [row for row, tokens in enumerate(counted["tokens"], 1) if tokens > most]
        if not long:
            return None
        return (
            f"max_length: {len(long):,} of {len(table):,} questions of the {split} data are longer than the {most} "
            f"tokens that max_length={self.max_length} and stride={self.stride} leave them: {row_numbers(long)}"
        )


def _holds_answers(feature: Any) -> bool:
    if not isinstance(feature, dict) or not {"text", "answer_start"} <= set(feature):
        return False
    kinds = [getattr(getattr(feature[name], "feature", None), "dtype", "") for name in ("text", "answer_start")]
    # a column of nothing but empty lists has no type of its own
    return kinds[0] in ("string", "large_string", "null") and ("int" in kinds[1] or kinds[1] == "null")


def _answers_told(split: str) -> str:
    return f"path: 'answers' of the {split} data holds no objects with the lists `text` and `answer_start`"


def _answer_faults(table: Dataset, split: str) -> list[str]:
    """That answers are null, or don't stand where they should, with the numbers of the rows."""
    null: list[int] = []
    elsewhere: dict[int, str] = {}
    for number, row in enumerate(_rows(table, ["context", "answers"]), 1):
        answers = row["answers"] or {}
        texts, starts = answers.get("text"), answers.get("answer_start")
        if texts is None or starts is None or None in [*texts, *starts] or len(texts) != len(starts):
            null.append(number)
            continue
        for text, start in zip(texts, starts, strict=True):
            found = row["context"][max(start, 0) :][: len(text)]
            if found != text or start < 0 or not text.strip():
                elsewhere.setdefault(number, f"in row {number} {found!r} is at {start}, and the answer is {text!r}")
    of = f"of {len(table):,} rows of the {split} data have"
    faults = [f"path: {len(null):,} {of} no answers, or not one start for each: {row_numbers(null)}"] if null else []
    if elsewhere:
        rows, first = list(elsewhere), next(iter(elsewhere.values()))
        told = f"an answer that doesn't stand at its answer_start: {row_numbers(rows)}; {first}"
        faults.append(f"path: {len(rows):,} {of} {told}")
    return faults


def _rows(table: Dataset, columns: list[str]) -> Iterator[dict[str, Any]]:
    for batch in table.select_columns(columns).iter(batch_size=1000):
        for values in zip(*(batch[column] for column in columns), strict=True):
            yield dict(zip(columns, values, strict=True))


def _questions(table: Dataset, split: str) -> Dataset:
    """The questions of a nested table, of which each row is a whole file."""
    try:
        return table.map(_flatten, batched=True, batch_size=1, remove_columns=table.column_names)
    except (KeyError, TypeError) as error:
        told = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise PEFTError(f"path: the {split} data is not nested as SQuAD is: {told}") from error


def _flatten(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The questions of a nested file, one per row; only test files may lack answers."""
    asked = [
        (question, paragraph["context"])
        for article in batch["data"][0] or []
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    flat: dict[str, list[Any]] = {
        "id": [str(question.get("id")) for question, _ in asked],
        "question": [question["question"] for question, _ in asked],
        "context": [context for _, context in asked],
    }
    if any(question.get("answers") is not None for question, _ in asked):
        flat["answers"] = [_columns(question.get("answers")) for question, _ in asked]
    return flat


def _columns(answers: list[dict[str, Any]] | None) -> dict[str, list[Any]] | None:
    return (
        None if answers is None else {name: [answer[name] for answer in answers] for name in ("text", "answer_start")}
    )


def _count_tokens(batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    ids = tokenizer(batch["question"], add_special_tokens=False, verbose=False)["input_ids"]
    return {"tokens": [len(row) for row in ids]}


def _windows(
    batch: dict[str, list[Any]], rows: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int
) -> dict[str, list[Any]]:
    fields = tokenizer(
        batch["question"],
        batch["context"],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    sources = fields.pop("overflow_to_sample_mapping")
    found: dict[str, list[Any]] = {"example": [rows[source] for source in sources], "offsets": []}
    for window, offsets in enumerate(fields.pop("offset_mapping")):
        inside = [part == 1 for part in fields.sequence_ids(window)]
        found["offsets"].append([pair if here else (-1, -1) for pair, here in zip(offsets, inside, strict=True)])
    if "answers" in batch:
        spans = [_span(batch["answers"][row], found["offsets"][window]) for window, row in enumerate(sources)]
        found |= {name: [span[at] for span in spans] for at, name in enumerate(_LABELS)}
    return {**fields, **found}


def _span(answers: dict[str, list[Any]], offsets: list[tuple[int, int]]) -> tuple[int, int]:
    """The first and last token of the first answer; the first token twice where the window doesn't hold all of it."""
    inside = [place for place, (start, _) in enumerate(offsets) if start >= 0]
    if not answers["text"] or not inside:
        return 0, 0
    text = answers["text"][0]
    # tokens need not cover the spaces around it
    begin = answers["answer_start"][0] + len(text) - len(text.lstrip())
    end = begin + len(text.strip())
    if offsets[inside[0]][0] > begin or offsets[inside[-1]][1] < end:
        return 0, 0
    touched = [place for place in inside if offsets[place][1] > begin and offsets[place][0] < end]
    return (touched[0], touched[-1]) if touched else (0, 0)


def _pad(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    fields = [{name: value for name, value in row.items() if name not in _NOT_FOR_THE_MODEL} for row in rows]
    # on the right whatever the tokenizer says, because positions count from the left
    batch = dict(tokenizer.pad(fields, padding_side="right", return_tensors="pt"))
    batch |= {name: torch.tensor([row[name] for row in rows]) for name in (*_LABELS, "example") if name in rows[0]}
    if "offsets" in rows[0]:
        length = batch["input_ids"].shape[1]
        batch["offsets"] = torch.tensor([[*row["offsets"], *_OUTSIDE * (length - len(row["offsets"]))] for row in rows])
    return batch
