from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from lightning_peft.data import SpeechRecognitionData
from lightning_peft.data.characters import character_tokenizer, count_characters, unknown_characters, vocabulary_of
from lightning_peft.methods.errors import PEFTError
from lightning_peft.tasks.speech_recognition import spelled
from tests.stand_ins import save_spoken

Write = Callable[..., str]
TEXTS = ["ab cad", "da  c", "dab", "b"]
VOCABULARY = ["<pad>", "<unk>", "|", "a", "b", "c", "d"]


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a feature extractor of waves, without a tokenizer."""
    from transformers import Wav2Vec2FeatureExtractor

    folder = str(tmp_path_factory.mktemp("extractor"))
    Wav2Vec2FeatureExtractor(sampling_rate=8000, do_normalize=False, return_attention_mask=True).save_pretrained(folder)
    return folder


@pytest.fixture
def spoken(tmp_path: Path) -> Path:
    return Path(save_spoken(tmp_path / "spoken", TEXTS))


def faults(data: SpeechRecognitionData) -> list[str]:
    with pytest.raises(PEFTError) as caught:
        data.setup()
    return list(caught.value.faults)


def batches(data: SpeechRecognitionData) -> list[dict[str, torch.Tensor]]:
    data.setup()
    return list(data.val_dataloader())


def test_folder_with_transcripts(spoken: Path, extractor: str) -> None:
    data = SpeechRecognitionData(str(spoken), validation_path=str(spoken), processor=extractor, batch_size=3)
    first, second = batches(data)
    assert sorted(first) == ["attention_mask", "input_values", "labels"]
    assert first["input_values"].shape == (3, 4800)
    assert first["attention_mask"].sum(dim=1).tolist() == [4800, 4000, 2400]
    # two spaces are one
    assert first["labels"].tolist() == [[3, 4, 2, 5, 3, 6], [6, 3, 2, 5, -100, -100], [6, 3, 4, -100, -100, -100]]
    assert second["labels"].tolist() == [[4]]
    assert (data.vocabulary, data.cut_rows) == (VOCABULARY, {"train": 0, "validation": 0})
    assert data.filler(data._encoded["validation"][0])["labels"] == []


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_table_whose_files_lie_beside_it(suffix: str, spoken: Path, extractor: str, write: Write) -> None:
    rows = [{"audio": f"spoken/{number}.wav", "said": text} for number, text in enumerate(TEXTS)]
    path = write(f"a.{suffix}", rows)
    options = {"text_column": "said", "validation_path": path, "processor": extractor}
    (batch,) = batches(SpeechRecognitionData(path, **options))  # type: ignore[arg-type]
    assert batch["labels"][3].tolist() == [4, -100, -100, -100, -100, -100]


def test_splits_in_folders_of_which_that_of_tests_has_no_transcripts(
    spoken: Path, tmp_path: Path, extractor: str
) -> None:
    for name in ("train", "dev", "test"):
        shutil.copytree(spoken, tmp_path / "all" / name)
    data = SpeechRecognitionData(str(tmp_path / "all"), processor=extractor)
    data.setup()
    assert [len(data._encoded[split]) for split in ("train", "validation", "test")] == [4, 4, 4]
    assert "labels" in next(iter(data.test_dataloader()))

    (tmp_path / "all" / "test" / "metadata.csv").unlink()
    data = SpeechRecognitionData(str(tmp_path / "all"), processor=extractor)
    data.setup()
    assert sorted(next(iter(data.predict_dataloader()))) == ["attention_mask", "input_values"]
    with pytest.raises(PEFTError, match="test_path: there are no test sounds with transcripts; give some"):
        data.test_dataloader()

    (tmp_path / "all" / "dev" / "metadata.csv").unlink()
    (told,) = faults(SpeechRecognitionData(str(tmp_path / "all"), processor=extractor))
    assert told == f"path: {tmp_path}/all/dev has no metadata.csv or metadata.jsonl with the transcripts"


def test_one_table_for_folders_of_splits_or_others(spoken: Path, tmp_path: Path, extractor: str) -> None:
    for name in ("train", "dev", "test", "more"):
        shutil.copytree(spoken, tmp_path / "all" / name)

    def data(*rows: str) -> SpeechRecognitionData:
        (tmp_path / "all" / "metadata.csv").write_text("\n".join(["file_name,text", *rows]) + "\n")
        return SpeechRecognitionData(str(tmp_path / "all"), processor=extractor, validation_fraction=0)

    def labels(data: SpeechRecognitionData) -> dict[str, list[list[int]]]:
        data.setup()
        return {split: [row["labels"] for row in rows] for split, rows in data._encoded.items()}

    # the vocabulary is that of the training transcripts
    found = labels(data("train/0.wav,a", "dev/1.wav,b", "train/2.wav,b", "test/1.wav,a b"))
    assert found == {"train": [[3], [4]], "validation": [[4]], "test": [[3, 2, 4]]}
    # folders of other names mean nothing
    assert labels(data("more/0.wav,a", "more/1.wav,b")) == {"train": [[3], [4]]}

    table = tmp_path / "all" / "metadata.csv"
    assert faults(data("train/0.wav,a", "more/1.wav,b")) == [
        f"path: 1 of the 2 sounds in {table} lie in no folder of a split, as the others do: {tmp_path}/all/more/1.wav"
    ]
    assert faults(data("test/0.wav,a", "dev/1.wav,b")) == [
        f"path: the sounds in {table} lie in folders of splits, but none of them in `train`"
    ]


def save_parts(folder: Path, mark: str) -> None:
    """A tokenizer of parts of words, with a mark where one begins, that ends every text for other models."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<pad>", "</s>", mark, f"{mark}ab", *"abcd"]
    made = tokenizers.Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0, False))
    made.pre_tokenizer = pre_tokenizers.Metaspace(mark)
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>").save_pretrained(folder)


def test_tokenizer_of_parts_of_words(spoken: Path, extractor: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(extractor, folder)
    save_parts(folder, "▁")
    data = SpeechRecognitionData(str(spoken), validation_path=str(spoken), processor=str(folder))
    (batch,) = batches(data)
    # without the end
    assert batch["labels"][0].tolist() == [3, 2, 6, 4, 7]
    assert [spelled(data.vocabulary, [number for number in row if number >= 0]) for row in batch["labels"]] == [
        " ".join(text.split()) for text in TEXTS
    ]

    save_parts(folder, "Ġ")
    assert faults(SpeechRecognitionData(str(spoken), validation_path=str(spoken), processor=str(folder))) == [
        "tokenizer: its tokens don't show where words begin, by `|`, a space or `▁`; use tokenizer=characters for one "
        "whose tokens do"
    ]


def test_long_sounds_are_left_out_of_training_and_whole_elsewhere(
    spoken: Path, extractor: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"validation_path": str(spoken), "processor": extractor}
    data = SpeechRecognitionData(str(spoken), max_seconds=0.35, **options)  # type: ignore[arg-type]
    with caplog.at_level(logging.INFO):
        (batch,) = batches(data)
    assert "train: 2 of 4 sounds (50.0%) are longer than max_seconds=0.35 and are left out" in caplog.text
    assert [len(row["labels"]) for row in data._encoded["train"]] == [3, 1]
    assert batch["attention_mask"].sum(dim=1).tolist() == [4800, 4000, 2400, 800]
    (told,) = faults(SpeechRecognitionData(str(spoken), max_seconds=0.05, **options))  # type: ignore[arg-type]
    assert told == "train: 4 of 4 sounds (100.0%) are longer than max_seconds=0.05; raise it"


def test_tokenizer_of_the_model_and_its_case(
    spoken: Path, extractor: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It knows A, B and C: transcripts are put into capitals, and d is unknown."""
    folder = tmp_path / "model"
    shutil.copytree(extractor, folder)
    character_tokenizer("ABC").save_pretrained(folder)
    data = SpeechRecognitionData(str(spoken), validation_path=str(spoken), processor=str(folder))
    with caplog.at_level(logging.INFO):
        (batch,) = batches(data)
    assert data.vocabulary == ["<pad>", "<unk>", "|", "A", "B", "C"]
    assert batch["labels"][0].tolist() == [3, 4, 2, 5, 3, 1]
    assert "train: the tokenizer doesn't know 1 characters: 'D' 3 times" in caplog.text
    (batch,) = batches(
        SpeechRecognitionData(str(spoken), validation_path=str(spoken), processor=str(folder), tokenizer="characters")
    )
    assert batch["labels"][0].tolist() == [3, 4, 2, 5, 3, 6]

    character_tokenizer("xyz").save_pretrained(folder)
    options = {"tokenizer": str(folder), "validation_fraction": 0}
    assert faults(SpeechRecognitionData(str(spoken), processor=extractor, **options)) == [  # type: ignore[arg-type]
        "tokenizer: it doesn't know most characters of the transcripts ('a' 4 times, 'b' 3 times, 'd' 3 times, "
        "'c' 2 times); use tokenizer=characters for one that does"
    ]


def test_rows_and_columns_are_checked(spoken: Path, extractor: str, write: Write, tmp_path: Path) -> None:
    soundfile.write(spoken / "9.wav", np.zeros(0, dtype=np.float32), 8000)
    rows = [("0.wav", "a"), ("1.wav", " "), ("9.wav", "b"), ("2.wav", "\t")]
    path = write("spoken/a.jsonl", [{"audio": name, "text": text} for name, text in rows])
    assert faults(SpeechRecognitionData(path, processor=extractor, validation_fraction=0)) == [
        "train: 2 of 4 transcripts are empty: rows 2, 4",
        f"train: 1 of 4 sounds can't be read: {spoken}/9.wav (it is 0 seconds long)",
    ]
    path = write("spoken/b.jsonl", [{"audio": "0.wav", "txt": "a"}])
    assert faults(SpeechRecognitionData(path, processor=extractor)) == [
        "text_column: the train data has no column 'text'; did you mean 'txt'?"
    ]
    path = write("spoken/c.jsonl", [{"audio": "0.wav", "text": 1}])
    assert faults(SpeechRecognitionData(path, processor=extractor)) == [
        "text_column: 'text' of the train data holds int64, not text"
    ]
    with pytest.raises(PEFTError) as caught:
        SpeechRecognitionData(path, max_seconds=0, batch_size=0)
    assert list(caught.value.faults) == ["max_seconds: 0 is not above 0", "batch_size: 0 is less than 1"]


def test_characters_are_counted_and_compared() -> None:
    assert count_characters(["a b", "b\tä"]) == Counter({"b": 2, "a": 1, "ä": 1})
    tokenizer = character_tokenizer("baß")
    assert vocabulary_of(tokenizer) == ["<pad>", "<unk>", "|", "a", "b", "ß"]
    assert unknown_characters(tokenizer, Counter("abcc")) == Counter({"c": 2})
    # a capital ß is two letters
    assert unknown_characters(tokenizer, Counter("ßß"), str.upper) == Counter({"S": 4})
    assert json.loads(json.dumps(tokenizer("ab ba")["input_ids"])) == [3, 4, 2, 4, 3]
