from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_peft.data.token_classification import TokenClassificationData
from lightning_peft.methods.errors import PEFTError

Write = Callable[..., str]
ROWS = [
    {"tokens": ["the", "film-plot", "was", "good"], "tags": ["O", "B-THING", "O", "O"]},
    {"tokens": ["the", "very", "book"], "tags": ["O", "B-THING", "I-THING"]},
] * 5


def fault(data: TokenClassificationData) -> list[str]:
    with pytest.raises(PEFTError) as caught:
        data.setup()
    return list(caught.value.faults)


def test_first_piece_of_a_word_has_its_tag(write: Write, tokenizer_folder: str) -> None:
    path = write("a.jsonl", ROWS)
    data = TokenClassificationData(path, validation_path=path, tokenizer=tokenizer_folder, batch_size=2)
    data.prepare_data()
    data.setup("fit")
    assert (data.class_names, data.num_labels) == (["B-THING", "I-THING", "O"], 3)
    assert data.class_counts == [10, 5, 20]
    batch = next(iter(data.val_dataloader()))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (torch.int64, (2, 8))
    )
    # [CLS] the film - plot was good [SEP]: the hyphen is unknown, and a piece like any other
    assert batch["input_ids"][0].tolist() == [2, 12, 8, 1, 10, 13, 4, 3]
    assert batch["labels"].tolist() == [
        [-100, 2, 0, -100, -100, 2, 2, -100],
        [-100, 2, 0, 1, -100, -100, -100, -100],
    ]


def test_other_kinds_of_tags(write: Write, tokenizer_folder: str, tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, List, Value

    numbers = [{"tokens": ["a", "film"], "tags": [7, 3]}] * 4
    data = TokenClassificationData(write("a.parquet", numbers), tokenizer=tokenizer_folder)
    data.setup()
    assert (data.class_names, data.class_counts) == (["3", "7"], [3, 3])
    features = Features({"tokens": List(Value("string")), "ner": List(ClassLabel(names=["O", "B-X", "I-X"]))})
    Dataset.from_dict({"tokens": [["a", "film"]] * 4, "ner": [[1, 0]] * 4}, features).to_parquet(tmp_path / "b.parquet")
    data = TokenClassificationData(str(tmp_path / "b.parquet"), tags_column="ner", tokenizer=tokenizer_folder)
    data.setup()
    assert (data.class_names, data.class_counts) == (["O", "B-X", "I-X"], [3, 3, 0])
    assert next(iter(data.val_dataloader()))["labels"].tolist() == [[-100, 1, 0, -100]]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.lists(
            st.tuples(st.sampled_from(["film", "a-b", "good.", "x"]), st.sampled_from("PQ")), min_size=1, max_size=9
        ),
        min_size=1,
        max_size=4,
    ),
    length=st.integers(3, 14),
)
def test_labels_are_the_tags_of_the_words_that_fit(
    rows: list[list[tuple[str, str]]], length: int, tmp_path: Path, tokenizer_folder: str
) -> None:
    from transformers import AutoTokenizer

    table = [{"tokens": [w for w, _ in row], "tags": [t for _, t in row]} for row in rows]
    table.append({"tokens": ["a", "a"], "tags": ["P", "Q"]})
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    data = TokenClassificationData(
        str(path), validation_path=str(path), tokenizer=tokenizer_folder, max_length=length, batch_size=len(table)
    )
    data.setup()
    batch = next(iter(data.val_dataloader()))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    cut = 0
    for row, labels, ids in zip(table, batch["labels"], batch["input_ids"], strict=True):
        words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in row["tokens"]]
        pieces = [(piece, "PQ".index(tag) if n == 0 else -100) for word, tag in zip(words, row["tags"], strict=True)
                  for n, piece in enumerate(word)]  # fmt: skip
        cut += len(pieces) > length - 2
        expected = [(2, -100), *pieces[: length - 2], (3, -100)]
        padding = [(0, -100)] * (len(ids) - len(expected))
        assert list(zip(ids.tolist(), labels.tolist(), strict=True)) == [*expected, *padding]
    assert data.cut_rows == {"train": cut, "validation": cut}


def test_cut_rows_are_counted_and_logged(write: Write, tokenizer_folder: str, caplog: pytest.LogCaptureFixture) -> None:
    path = write("a.jsonl", ROWS)
    data = TokenClassificationData(path, validation_path=path, tokenizer=tokenizer_folder, max_length=6)
    with caplog.at_level(logging.INFO):
        data.setup()
    assert data.cut_rows == {"train": 5, "validation": 5}
    assert "train: 5 of 10 rows (50.0%) are longer than max_length=6 tokens and were cut" in caplog.text
    # the fifth and sixth piece, of the words `was` and `good`, are gone
    assert next(iter(data.val_dataloader()))["labels"][0].tolist() == [-100, 2, 0, -100, -100, -100]


def test_rare_tag_may_be_in_the_rows_held_out(write: Write, tokenizer_folder: str) -> None:
    rows = [{"tokens": ["a"], "tags": [str(number)]} for number in range(10)]
    data = TokenClassificationData(write("a.jsonl", rows), tokenizer=tokenizer_folder, validation_fraction=0.5)
    data.setup()
    assert (data.num_labels, sorted(data.class_counts)) == (10, [0] * 5 + [1] * 5)


def test_rows_that_fill_up_have_no_labels(write: Write, tokenizer_folder: str) -> None:
    data = TokenClassificationData(write("a.jsonl", ROWS), tokenizer=tokenizer_folder)
    assert data.filler({"input_ids": [2, 4, 3], "labels": [-100, 1, -100]}) == {
        "input_ids": [2, 4, 3],
        "labels": [-100, -100, -100],
    }


@pytest.mark.parametrize("extra", [{}, {"tags": None}])
def test_withheld_test_tags_serve_for_prediction(extra: dict[str, Any], write: Write, tokenizer_folder: str) -> None:
    bare = write("bare.jsonl", [{"tokens": ["the", "film"], **extra}] * 3)
    data = TokenClassificationData(write("a.jsonl", ROWS), test_path=bare, tokenizer=tokenizer_folder)
    data.setup()
    assert [sorted(batch) for batch in data.predict_dataloader()] == [["attention_mask", "input_ids"]]
    with pytest.raises(PEFTError) as caught:
        data.test_dataloader()
    assert str(caught.value) == "test_path: there are no test rows with tags; give a file that has them"


def test_every_wrong_number_is_told_at_once() -> None:
    with pytest.raises(PEFTError) as caught:
        TokenClassificationData("a.jsonl", max_length=0, batch_size=0, streaming=True)
    assert list(caught.value.faults) == [
        "streaming: the classes are known once all is read; leave it out, the table is mapped from disk",
        "max_length: 0 is less than 1",
        "batch_size: 0 is less than 1",
    ]


def test_missing_columns_are_told_for_all_splits_with_the_nearest(write: Write, tokenizer_folder: str) -> None:
    train = write("train.jsonl", [{"token": ["a"], "ner_tags": [1]}] * 2)
    valid = write("valid.jsonl", [{"tokens": "a film", "tags": [0.5]}] * 2)
    assert fault(TokenClassificationData(train, validation_path=valid, tokenizer=tokenizer_folder)) == [
        "tokens_column: the train data has no column 'tokens'; did you mean 'token'?",
        "tags_column: the train data has no column 'tags'; did you mean 'ner_tags'?",
        "tokens_column: 'tokens' of the validation data holds no lists of strings",
        "tags_column: 'tags' of the validation data holds no lists of strings or integers",
    ]


def test_unfit_rows_are_told_by_their_numbers(write: Write, tokenizer_folder: str) -> None:
    train = [
        *ROWS[:2],
        {"tokens": ["a", "film"], "tags": ["O"]},
        {"tokens": [], "tags": []},
        {"tokens": ["a", None], "tags": ["O", "O"]},
        {"tokens": None, "tags": ["O"]},
        {"tokens": ["a"], "tags": [None]},
    ]
    valid = [{"tokens": ["a", "a"], "tags": [1, -1]}, {"tokens": ["a"], "tags": [-1]}]
    data = TokenClassificationData(
        write("train.jsonl", train), validation_path=write("valid.jsonl", valid), tokenizer=tokenizer_folder
    )
    assert fault(data) == [
        "tags_column: 1 of 7 rows of the train data have other numbers of tags than of words: row 3",
        "tokens_column: 2 of 7 rows of the train data have no words: rows 4, 6",
        "tags_column: 1 of 7 rows of the train data have no tags: row 4",
        "tokens_column: 1 of 7 rows of the train data have a word that is null: row 5",
        "tags_column: 1 of 7 rows of the train data have a tag that is null: row 7",
        "tags_column: 2 of 2 rows of the validation data have a negative tag: rows 1, 2",
    ]
    empty = [{"tokens": [], "tags": []}] * 6
    assert fault(TokenClassificationData(write("empty.jsonl", empty), tokenizer=tokenizer_folder)) == [
        "tokens_column: 6 of 6 rows of the train data have no words: rows 1, 2, 3, 4, 5, …",
        "tags_column: 6 of 6 rows of the train data have no tags: rows 1, 2, 3, 4, 5, …",
    ]


def test_tags_that_can_not_be_trained_on(write: Write, tokenizer_folder: str) -> None:
    single = write("a.jsonl", [{"tokens": ["a"], "tags": ["O"]}] * 3)
    assert fault(TokenClassificationData(single, tokenizer=tokenizer_folder)) == [
        "tags_column: 'tags' holds one class only, 'O'; a classifier needs two or more"
    ]
    other = write("b.jsonl", [{"tokens": ["a", "a", "b"], "tags": ["B-THIN", "B-THIN", "zzz"]}])
    data = TokenClassificationData(write("c.jsonl", ROWS), validation_path=other, tokenizer=tokenizer_folder)
    assert fault(data) == [
        "validation: the tag 'B-THIN' (2 words) does not occur in training; did you mean 'B-THING' or 'I-THING'?",
        "validation: the tag 'zzz' (1 word) does not occur in training; its classes are 'B-THING', 'I-THING', 'O'",
    ]


def test_gpt2s_tokenizer_reads_words_as_words(write: Write, tmp_path: Path) -> None:
    from transformers import GPT2TokenizerFast

    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "Ġa": 1, "b": 2, "Ġb": 3, "Ġ": 4, "<|endoftext|>": 5}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ a\nĠ b\n")
    tokenizer = GPT2TokenizerFast(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    rows = write("rows.jsonl", [{"tokens": ["a", "b"], "tags": ["X", "Y"]}] * 2)
    data = TokenClassificationData(rows, validation_path=rows, tokenizer=str(tmp_path / "tokenizer"))
    data.setup()
    batch = next(iter(data.val_dataloader()))
    assert batch["input_ids"].tolist() == [[1, 3]] * 2
    assert batch["labels"].tolist() == [[0, 1]] * 2
