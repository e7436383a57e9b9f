from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_peft.data.labels import IGNORED
from lightning_peft.data.language_modeling import LanguageModelingData, encode_documents
from lightning_peft.methods.errors import PEFTError
from tests.data.decoders import TEXT, faults_of, save_tokenizer

Write = Callable[..., str]
EOS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), adds="bos")


@pytest.mark.parametrize(("adds", "first"), [("", []), ("bos", [1]), ("bos eos", [1])])
def test_a_document_ends_in_one_eos_and_begins_with_bos_where_the_tokenizer_adds_it(
    adds: str, first: list[int], write: Write, tmp_path: Path
) -> None:
    path = write("a.jsonl", [{"text": text} for text in TEXT])
    data = LanguageModelingData(
        path, validation_path=path, tokenizer=save_tokenizer(tmp_path / "t", adds=adds), packing=False
    )
    data.setup()
    (batch,) = data.val_dataloader()
    expected = [[*first, *data.tokenizer(text, add_special_tokens=False)["input_ids"], EOS] for text in TEXT]
    lengths = [len(ids) for ids in expected]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    for ids, labels, whole in zip(batch["input_ids"], batch["labels"], expected, strict=True):
        assert ids[: len(whole)].tolist() == labels[: len(whole)].tolist() == whole
        assert ids[len(whole) :].unique().tolist() in ([], [0])
        assert labels[len(whole) :].unique().tolist() in ([], [IGNORED])
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=5), length=st.integers(1, 12))
def test_pieces_are_the_documents_and_nothing_is_lost(texts: list[str], length: int, folder: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = encode_documents({"text": texts}, tokenizer, "text", length)
    whole = [[*tokenizer(text)["input_ids"], EOS] for text in texts if text.strip()]
    assert [token for piece in encoded["input_ids"] for token in piece] == [token for ids in whole for token in ids]
    assert len(encoded["input_ids"]) == sum(-(-len(ids) // length) for ids in whole)
    assert all(0 < len(piece) <= length for piece in encoded["input_ids"])
    assert encoded["labels"] == encoded["input_ids"]


def test_nothing_counts_as_cut(write: Write, folder: str) -> None:
    data = LanguageModelingData(write("a.jsonl", [{"text": TEXT[0]}] * 20), tokenizer=folder, max_length=8)
    data.setup()
    assert data.cut_rows == {"train": 0, "validation": 0}
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (32, 8)


@pytest.mark.parametrize("packing", [False, True])
def test_prediction_has_no_labels(packing: bool, write: Write, folder: str) -> None:
    path = write("a.txt", [{"text": "the lazy dog"}] * 2)
    data = LanguageModelingData(path, test_path=path, tokenizer=folder, packing=packing, validation_fraction=0)
    data.setup()
    (batch,) = data.predict_dataloader()
    assert sorted(batch) == (["input_ids", "position_ids"] if packing else ["attention_mask", "input_ids"])


def test_faulty_data_is_refused(write: Write, tmp_path: Path, folder: str) -> None:
    def told(rows: list[dict[str, object]], tokenizer: str = folder) -> list[str]:
        return faults_of(LanguageModelingData(write("a.jsonl", rows), tokenizer=tokenizer))

    assert told([{"txt": "a"}]) == ["text_column: the train data has no column 'text'; did you mean 'txt'?"]
    assert told([{"text": 3}]) == ["text_column: 'text' of the train data holds int64, not text"]
    assert told([{"text": "a"}, {"text": None}]) == ["text_column: 1 of 2 rows of the train data have no 'text'"]
    assert told([{"text": " \n"}] * 2) == ["path: the train data has no row that anything can be learned from"]
    endless = save_tokenizer(tmp_path / "endless", eos=None)
    assert told([{"text": "a"}] * 2, endless) == [
        f"tokenizer: {endless!r} has no end-of-sequence token to end a text with"
    ]
    empty, malformed = tmp_path / "empty.txt", tmp_path / "malformed.jsonl"
    empty.touch()
    malformed.write_text('{"text": "a"}\n{"text": \n')
    assert faults_of(LanguageModelingData(str(empty), tokenizer=folder)) == [f"path: '{empty}' is empty"]
    assert faults_of(LanguageModelingData(str(malformed), tokenizer=folder)) == [
        f"path: {malformed}, line 2: not JSON: Expecting value at character 9"
    ]
    with pytest.raises(PEFTError) as caught:
        LanguageModelingData("a.txt", streaming=True, group_by_length=True, max_length=0)
    assert list(caught.value.faults) == [
        "max_length: 0 is less than 1",
        "group_by_length: the rows of a stream can't be sorted; leave it or streaming out",
    ]
