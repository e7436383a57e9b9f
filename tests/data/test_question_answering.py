from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_peft.data.question_answering import Example, QuestionAnsweringData
from lightning_peft.methods.errors import PEFTError

Write = Callable[..., str]
CONTEXT = "the film was good, the book was very bad"


def row(answer: str | None = "book", start: int = 23, **more: Any) -> dict[str, Any]:
    answers: dict[str, list[Any]] = {"text": [], "answer_start": []}
    if answer is not None:
        answers = {"text": [answer], "answer_start": [start]}
    return {"question": "was the plot", "context": CONTEXT, "answers": answers, **more}


def fault(data: QuestionAnsweringData) -> list[str]:
    with pytest.raises(PEFTError) as caught:
        data.setup()
    return list(caught.value.faults)


def batches(path: str, tokenizer: str, **options: Any) -> list[dict[str, torch.Tensor]]:
    data = QuestionAnsweringData(path, validation_path=path, tokenizer=tokenizer, **options)
    data.setup()
    loader: Any = data.val_dataloader()
    return list(loader)


def test_batch_points_at_the_answer(write: Write, tokenizer_folder: str) -> None:
    path = write("a.jsonl", [row(), row("very bad", 32), row(None)])
    data = QuestionAnsweringData(path, validation_path=path, tokenizer=tokenizer_folder)
    data.prepare_data()
    data.setup("fit")
    assert data.unanswerable
    training = next(iter(data.train_dataloader()))
    fields = ["attention_mask", "end_positions", "input_ids", "start_positions"]
    assert sorted(training) == fields
    batch: dict[str, torch.Tensor] = next(iter(data.val_dataloader()))
    assert sorted(batch) == sorted([*fields, "example", "offsets"])
    assert {value.dtype for value in batch.values()} == {torch.int64}
    # [CLS] was the plot [SEP] the film was good , the book was very bad [SEP]
    assert batch["input_ids"][0].tolist() == [2, 13, 12, 10, 3, 12, 8, 13, 4, 1, 12, 9, 13, 16, 5, 3]
    assert batch["start_positions"].tolist() == [11, 13, 0]
    assert batch["end_positions"].tolist() == [11, 14, 0]
    assert batch["example"].tolist() == [0, 1, 2]
    assert batch["offsets"].shape == (3, 16, 2)
    assert batch["offsets"][0, :7].tolist() == [[-1, -1]] * 5 + [[0, 3], [4, 8]]
    assert data.example("validation", 1) == Example(CONTEXT, ["very bad"])
    assert data.example("validation", 2) == Example(CONTEXT, [])


def test_long_contexts_become_windows_that_overlap(write: Write, tokenizer_folder: str) -> None:
    path = write("a.jsonl", [row("very bad", 32), row(None)])
    (batch,) = batches(path, tokenizer_folder, max_length=11, stride=2)
    # three words and three special tokens leave five of the ten tokens, of which the next window repeats two
    assert batch["example"].tolist() == [0, 0, 0, 1, 1, 1]
    words = [[CONTEXT[a:b] for a, b in window if a >= 0] for window in batch["offsets"].tolist()]
    assert words[:3] == [
        ["the", "film", "was", "good", ","],
        ["good", ",", "the", "book", "was"],
        ["book", "was", "very", "bad"],
    ]
    # the last window has no more than four
    assert batch["offsets"][2, 5:].tolist() == [[23, 27], [28, 31], [32, 36], [37, 40], [-1, -1], [-1, -1]]
    assert batch["start_positions"].tolist() == [0, 0, 7, 0, 0, 0]
    assert batch["end_positions"].tolist() == [0, 0, 8, 0, 0, 0]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(st.sampled_from(["a-b", "good.", "\n", "ß"]), min_size=4, max_size=20),
    place=st.tuples(st.integers(0, 99), st.integers(1, 20)),
    sizes=st.tuples(st.integers(8, 14), st.integers(0, 3)),
)
def test_windows_hold_the_whole_context_and_the_answer_can_be_read_back(
    words: list[str], place: tuple[int, int], sizes: tuple[int, int], tmp_path: Path, tokenizer_folder: str
) -> None:
    context = " ".join(words) + " end"
    start = place[0] % len(context)
    answer = context[start : start + place[1]]
    # the tokens that the answer's characters are in, of all of the context
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    encoded = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if not answer.strip():
        return
    length, stride = sizes
    path = tmp_path / "a.jsonl"
    answers = {"text": [answer], "answer_start": [start]}
    path.write_text(json.dumps({"question": "film", "context": context, "answers": answers}) + "\n")
    (batch,) = batches(str(path), tokenizer_folder, max_length=length, stride=stride)
    windows = [[tuple(pair) for pair in window if pair[0] >= 0] for window in batch["offsets"].tolist()]
    assert sorted({pair for window in windows for pair in window}) == encoded
    for before, after in pairwise(windows):
        assert before[len(before) - stride :] == after[:stride]
    touched = [pair for pair in encoded if pair[1] > start and pair[0] < start + len(answer)]
    for number, window in enumerate(windows):
        first, last = int(batch["start_positions"][number]), int(batch["end_positions"][number])
        if set(touched) <= set(window):
            assert (first, last) == (3 + window.index(touched[0]), 3 + window.index(touched[-1]))
        else:
            assert (first, last) == (0, 0)


def nested(answers: Any = None, **more: Any) -> dict[str, Any]:
    known = [{"text": "book", "answer_start": 23}, {"text": "the book", "answer_start": 19}]
    questions = [
        {"id": "q1", "question": "was the plot", "answers": known if answers is None else answers, **more},
        {"id": "q2", "question": "is the plot", "answers": [], "is_impossible": True, "plausible_answers": known},
    ]
    return {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": questions}]}] * 2}


def test_nested_json_of_squad(tmp_path: Path, tokenizer_folder: str) -> None:
    (tmp_path / "train.json").write_text(json.dumps(nested()))
    (tmp_path / "dev.json").write_text(json.dumps(nested(), indent=1))
    data = QuestionAnsweringData(str(tmp_path), tokenizer=tokenizer_folder)
    data.setup()
    assert data.read_splits()["train"]["id"][:] == ["q1", "q2", "q1", "q2"]
    batch: dict[str, torch.Tensor] = next(iter(data.val_dataloader()))
    assert batch["start_positions"].tolist() == [11, 0, 11, 0]
    assert data.example("validation", 2) == Example(CONTEXT, ["book", "the book"])
    assert data.example("validation", 3) == Example(CONTEXT, [])
    single = QuestionAnsweringData(str(tmp_path / "train.json"), tokenizer=tokenizer_folder, validation_fraction=0.5)
    single.setup()
    assert len(single.train_dataloader().dataset) == 2  # type: ignore[arg-type]


def test_nested_json_of_another_kind(tmp_path: Path, tokenizer_folder: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"version": "1", "data": [{"title": "t", "texts": []}]}))
    assert fault(QuestionAnsweringData(str(tmp_path / "a.json"), tokenizer=tokenizer_folder)) == [
        "path: the train data is not nested as SQuAD is: 'paragraphs' is missing"
    ]


def test_without_unanswerable_questions(write: Write, tokenizer_folder: str) -> None:
    path = write("a.parquet", [row()] * 4)
    data = QuestionAnsweringData(path, tokenizer=tokenizer_folder, validation_fraction=0.25)
    data.setup()
    assert not data.unanswerable
    assert next(iter(data.val_dataloader()))["example"].tolist() == [0]


def test_rows_that_fill_up_are_of_no_example(write: Write, tokenizer_folder: str) -> None:
    data = QuestionAnsweringData(write("a.jsonl", [row()]), tokenizer=tokenizer_folder)
    filler = data.filler({"input_ids": [2, 3], "example": 7, "start_positions": 1, "end_positions": 1})
    assert filler == {"input_ids": [2, 3], "example": -1, "start_positions": -100, "end_positions": -100}


def test_answers_may_be_withheld_in_test_rows(write: Write, tokenizer_folder: str) -> None:
    bare = write("bare.jsonl", [{"question": "film", "context": CONTEXT}])
    data = QuestionAnsweringData(write("a.jsonl", [row()] * 2), test_path=bare, tokenizer=tokenizer_folder)
    data.setup()
    (batch,) = data.predict_dataloader()
    assert sorted(batch) == ["attention_mask", "example", "input_ids", "offsets"]
    assert data.example("test", 0) == Example(CONTEXT, [])
    with pytest.raises(PEFTError) as caught:
        data.test_dataloader()
    assert str(caught.value) == "test_path: there are no test rows with answers; give a file that has them"


def test_padding_on_the_left_is_not_followed(write: Write, tmp_path: Path, tokenizer_folder: str) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tokenizer_folder, padding_side="left").save_pretrained(str(tmp_path / "left"))
    path = write("a.jsonl", [row(), {**row("film", 0), "context": "film"}])
    (left,), (right,) = batches(path, str(tmp_path / "left")), batches(path, tokenizer_folder)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_every_wrong_number_is_told_at_once() -> None:
    with pytest.raises(PEFTError) as caught:
        QuestionAnsweringData("a.json", max_length=64, stride=64, batch_size=0, streaming=True)
    assert list(caught.value.faults) == [
        "stride: 64 is not between 0 and max_length=64 (that left out)",
        "streaming: rows are numbered to find their answers; leave it out, the table is mapped from disk",
        "batch_size: 0 is less than 1",
    ]


def test_columns_that_are_missing_or_of_another_kind(write: Write, tokenizer_folder: str) -> None:
    train = write("train.jsonl", [{"questions": "a", "context": None, "answers": "film"}, {"context": "b"}])
    assert fault(QuestionAnsweringData(train, tokenizer=tokenizer_folder)) == [
        "path: the train data has no column 'question'; did you mean 'questions'?",
        "path: 1 of 2 rows of the train data have no 'context'",
        "path: 'answers' of the train data holds no objects with the lists `text` and `answer_start`",
    ]


def test_answers_that_stand_elsewhere_are_told_by_their_rows(write: Write, tokenizer_folder: str) -> None:
    train = [row(), row(start=22), row("films", 4), row(None), {**row(), "answers": None}, row(start=-17), row("", 3)]
    valid = [{**row(), "answers": {"text": ["film"], "answer_start": []}}]
    data = QuestionAnsweringData(
        write("train.jsonl", train), validation_path=write("valid.jsonl", valid), tokenizer=tokenizer_folder
    )
    assert fault(data) == [
        "path: 1 of 7 rows of the train data have no answers, or not one start for each: row 5",
        "path: 4 of 7 rows of the train data have an answer that doesn't stand at its answer_start: rows 2, 3, 6, 7; "
        "in row 2 ' boo' is at 22, and the answer is 'book'",
        "path: 1 of 1 rows of the validation data have no answers, or not one start for each: row 1",
    ]


def test_questions_that_leave_no_room_are_told_by_their_rows(write: Write, tokenizer_folder: str) -> None:
    path = write("a.jsonl", [row(question="film " * words) for words in (1, 4, 5, 60)])
    data = QuestionAnsweringData(path, tokenizer=tokenizer_folder, max_length=12, stride=4, validation_fraction=0)
    assert fault(data) == [
        "max_length: 2 of 4 questions of the train data are longer than the 4 tokens that max_length=12 and stride=4 "
        "leave them: rows 3, 4"
    ]
