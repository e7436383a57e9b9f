from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft.data.labels import IGNORED
from lightning_peft.data.translation import TranslationData
from lightning_peft.methods.errors import PEFTError
from tests.data.decoders import faults_of

Write = Callable[..., str]
ROWS = [
    {"source": "good film", "target": "the good film"},
    {"source": "a bad book", "target": "bad"},
    {"source": "fine", "target": "a very fine plot"},
]


def evaluation(path: str, folder: str, **options: Any) -> tuple[TranslationData, dict[str, torch.Tensor]]:
    data = TranslationData(path, validation_path=path, tokenizer=folder, **options)
    data.setup()
    (batch,) = data.val_dataloader()
    return data, batch


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_sources_are_inputs_and_targets_are_labels(name: str, write: Write, tokenizer_folder: str) -> None:
    data, batch = evaluation(write(name, ROWS), tokenizer_folder)
    # [CLS] is 2, [SEP] is 3, [PAD] is 0; the words follow in the order of tests/data/conftest.py
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[2, 4, 8, 3, 0], [2, 11, 5, 9, 3], [2, 6, 3, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
        "labels": [[2, 12, 4, 8, 3, IGNORED], [2, 5, 3, *[IGNORED] * 3], [2, 11, 16, 6, 10, 3]],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    row = data._encoded["validation"][0]
    assert data.filler(row) == {**row, "labels": [IGNORED] * 5}


def test_template_stands_around_the_source(write: Write, tokenizer_folder: str) -> None:
    _, batch = evaluation(write("a.jsonl", ROWS[:2]), tokenizer_folder, template="the plot is {source}")
    assert batch["input_ids"].tolist() == [[2, 12, 10, 14, 4, 8, 3, 0], [2, 12, 10, 14, 11, 5, 9, 3]]


def test_pairs_by_language(write: Write, tokenizer_folder: str) -> None:
    rows = [{"translation": {"en": row["source"], "de": row["target"]}} for row in ROWS]
    path = write("pairs.jsonl", rows)
    _, one = evaluation(path, tokenizer_folder, source_language="en", target_language="de")
    _, other = evaluation(write("a.jsonl", ROWS), tokenizer_folder)
    assert {name: tensor.tolist() for name, tensor in one.items()} == {
        name: tensor.tolist() for name, tensor in other.items()
    }
    known = "the train data has the column 'translation' with de, en; say which is the source"
    assert faults_of(TranslationData(path, tokenizer=tokenizer_folder)) == [f"source_language: {known}"]
    wrong = TranslationData(path, tokenizer=tokenizer_folder, source_language="en_", target_language="fr")
    assert faults_of(wrong) == [
        "source_language: the train data has no language 'en_'; did you mean 'en'?",
        "target_language: the train data has no language 'fr'; it has de, en",
    ]


def test_cut_sources_and_targets_are_counted_apart(
    write: Write, tokenizer_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"source": "good " * number, "target": "bad " * (number // 2)} for number in range(2, 12)]
    with caplog.at_level("INFO"):
        data, batch = evaluation(write("a.jsonl", rows), tokenizer_folder, max_length=8, max_target_length=6)
    # two special tokens each
    assert (data.cut_rows["train"], data.cut_targets["train"]) == (5, 2)
    assert "train: 5 of 10 sources (50.0%) are longer than max_length=8 tokens and were cut" in caplog.text
    assert "train: 2 of 10 targets (20.0%) are longer than max_target_length=6 tokens and were cut" in caplog.text
    assert (batch["input_ids"].shape, batch["labels"].shape) == ((10, 8), (10, 6))
    data, batch = evaluation(write("a.jsonl", rows), tokenizer_folder, max_length=6)
    assert batch["labels"].shape == (10, 6)
    assert data.cut_targets == {"train": 2, "validation": 2}


def test_tokenizer_options_reach_the_tokenizer(write: Write, tokenizer_folder: str, tmp_path: Path) -> None:
    data, _ = evaluation(write("a.jsonl", ROWS), tokenizer_folder, tokenizer_options={"padding_side": "left"})
    assert data.tokenizer.padding_side == "left"


def test_a_tokenizer_that_writes_targets_otherwise_is_asked_for_them(write: Write, tmp_path: Path) -> None:
    from transformers import MBart50Tokenizer

    words = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁good", -1.0), ("▁bad", -1.0), ("▁", -2.0)]
    folder = str(tmp_path / "mbart")
    MBart50Tokenizer(vocab=words, src_lang="en_XX", tgt_lang="de_DE").save_pretrained(folder)
    options = {"src_lang": "en_XX", "tgt_lang": "de_DE"}
    data, batch = evaluation(
        write("a.jsonl", [{"source": "good", "target": "bad"}] * 2), folder, tokenizer_options=options
    )
    first = data.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    assert (first[0], first[-1]) == ("en_XX", "</s>")
    label = data.tokenizer.convert_ids_to_tokens(batch["labels"][0].tolist())
    assert (label[0], label[-1]) == ("de_DE", "</s>")


def test_prediction_has_no_labels_and_needs_no_targets(write: Write, tokenizer_folder: str) -> None:
    bare = write("bare.jsonl", [{"source": row["source"]} for row in ROWS])
    data = TranslationData(write("a.jsonl", ROWS), test_path=bare, tokenizer=tokenizer_folder)
    data.setup()
    (batch,) = data.predict_dataloader()
    assert sorted(batch) == ["attention_mask", "input_ids"]
    with pytest.raises(PEFTError) as caught:
        data.test_dataloader()
    assert str(caught.value) == "target_column: the test data has no targets; only predict on it"
    data, _ = evaluation(write("a.jsonl", ROWS), tokenizer_folder)
    assert [sorted(batch) for batch in data.predict_dataloader()] == [["attention_mask", "input_ids"]]
    with pytest.raises(PEFTError, match=r"^test_path: there are no test rows"):
        data.test_dataloader()


def test_every_wrong_argument_is_told_at_once() -> None:
    with pytest.raises(PEFTError) as caught:
        TranslationData("a.jsonl", template="translate:", source_language="en", max_target_length=0, batch_size=0)
    assert list(caught.value.faults) == [
        "template: 'translate:' needs the slot {source}, and no other",
        "target_language: give the languages of both sides, or of none",
        "max_target_length: 0 is less than 1",
        "batch_size: 0 is less than 1",
    ]
    with pytest.raises(PEFTError, match=r"^template: '\{source' is no format string: "):
        TranslationData("a.jsonl", template="{source")
    with pytest.raises(PEFTError, match=r"needs the slot \{source\}, and no other"):
        TranslationData("a.jsonl", template="{source} {target}")


def test_faulty_data_is_refused(write: Write, tokenizer_folder: str, tmp_path: Path) -> None:
    def told(rows: list[dict[str, Any]], **options: Any) -> list[str]:
        return faults_of(TranslationData(write("a.jsonl", rows), tokenizer=tokenizer_folder, **options))

    assert told([{"sorce": "a", "de": "b"}]) == [
        "source_column: the train data has no column 'source'; did you mean 'sorce'?",
        "target_column: the train data has no column 'target'; it has sorce, de",
    ]
    rows = [{"source": "a", "target": "b"}, {"source": None, "target": "b"}, {"source": " ", "target": ""}]
    assert told(rows) == [
        "source_column: 2 of 3 rows of the train data have no text: rows 2, 3",
        "target_column: 1 of 3 rows of the train data have no text: row 3",
    ]
    pairs = [{"translation": {"en": "a", "de": "b"}}, {"translation": {"en": "a"}}, {"translation": None}]
    assert told(pairs, source_language="en", target_language="de") == [
        "source_language: 1 of 3 rows of the train data have no text: row 3",
        "target_language: 2 of 3 rows of the train data have no text: rows 2, 3",
    ]
    assert told([{"source": "a", "target": "b"}] * 3, max_length=8, max_target_length=600) == [
        f"max_length: 600 is more than the 512 tokens that {tokenizer_folder!r} reads"
    ]
    empty, malformed = tmp_path / "empty.csv", tmp_path / "malformed.jsonl"
    empty.touch()
    malformed.write_text('{"source": "a", "target": "b"}\n{"source": }\n')
    for streaming in (False, True):
        options: dict[str, Any] = {"tokenizer": tokenizer_folder, "streaming": streaming}
        assert faults_of(TranslationData(str(empty), **options)) == [f"path: '{empty}' is empty"]
        assert faults_of(TranslationData(str(malformed), **options)) == [
            f"path: {malformed}, line 2: not JSON: Expecting value at character 12"
        ]
