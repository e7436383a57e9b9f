from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch

from lightning_peft.data import TextClassificationData
from lightning_peft.methods.errors import PEFTError

Write = Callable[..., str]
ROWS = [{"text": f"the film was {word}", "label": word} for word in ("good", "bad", "fine") for _ in range(10)]


def fault(data: TextClassificationData) -> list[str]:
    with pytest.raises(PEFTError) as caught:
        data.setup()
    return list(caught.value.faults)


def test_labels_are_ids_in_the_order_of_their_names(write: Write, tokenizer_folder: str) -> None:
    data = TextClassificationData(write("a.csv", ROWS), tokenizer=tokenizer_folder, batch_size=4)
    data.prepare_data()
    data.setup("fit")
    assert (data.class_names, data.num_labels, data.class_counts) == (["bad", "fine", "good"], 3, [9, 9, 9])
    assert len(data.train_dataloader().dataset) == 27  # type: ignore[arg-type]
    batch = next(iter(data.val_dataloader()))
    assert batch["labels"].tolist() == [2, 0, 1]
    assert batch["input_ids"][0].tolist() == [2, 12, 8, 13, 4, 3]


@pytest.mark.parametrize("values", [[3, 7], [False, True], [-1, 1]])
def test_other_kinds_of_labels(values: list[Any], write: Write, tokenizer_folder: str) -> None:
    rows = [{"text": "a film", "label": values[number % 2]} for number in range(20)]
    path = write("a.parquet", rows)
    data = TextClassificationData(path, test_path=path, tokenizer=tokenizer_folder)
    data.setup()
    assert data.class_names == [str(value) for value in values]
    assert torch.cat([batch["labels"] for batch in data.test_dataloader()]).bincount().tolist() == [10, 10]


def test_batches_are_padded_to_their_longest_row(write: Write, tokenizer_folder: str) -> None:
    rows = [{"text": "good " * (number + 1), "label": number % 2} for number in range(4)]
    path = write("a.jsonl", rows)
    data = TextClassificationData(path, validation_path=path, tokenizer=tokenizer_folder, batch_size=2)
    data.setup()
    batches = list(data.val_dataloader())
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 4), (2, 6)]
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_cut_rows_are_counted_and_logged(write: Write, tokenizer_folder: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "good " * length, "label": length % 2} for length in (1, 2, 5, 6, 7, 8)]
    path = write("a.jsonl", rows)
    data = TextClassificationData(path, validation_path=path, tokenizer=tokenizer_folder, max_length=8)
    with caplog.at_level(logging.INFO):
        data.setup()
    # six words and two special tokens fill the eight
    assert data.cut_rows == {"train": 2, "validation": 2}
    assert "train: 2 of 6 rows (33.3%) are longer than max_length=8 tokens and were cut" in caplog.text
    assert next(iter(data.val_dataloader()))["input_ids"].shape == (6, 8)


def test_pairs(write: Write, tokenizer_folder: str) -> None:
    rows = [{"a": "good film", "b": "bad", "label": number % 2} for number in range(4)]
    data = TextClassificationData(
        write("a.jsonl", rows), text_column=["a", "b"], tokenizer=tokenizer_folder, validation_fraction=0.5
    )
    data.setup()
    assert next(iter(data.val_dataloader()))["input_ids"].tolist() == [[2, 4, 8, 3, 5, 3]] * 2


def test_split_keeps_every_class_and_depends_on_the_seed_alone(write: Write, tokenizer_folder: str) -> None:
    rows = [{"text": f"row {number}", "label": "rare" if number < 2 else "common"} for number in range(52)]
    path = write("a.jsonl", rows)

    def held(seed: int) -> list[list[int]]:
        data = TextClassificationData(path, tokenizer=tokenizer_folder, validation_fraction=0.5, seed=seed)
        data.setup()
        assert data.class_counts == [25, 1]
        labels = torch.cat([batch["labels"] for batch in data.val_dataloader()])
        assert labels.bincount().tolist() == [25, 1]
        return labels.tolist()  # type: ignore[no-any-return]

    assert held(1) == held(1)


def test_no_validation(write: Write, tokenizer_folder: str) -> None:
    data = TextClassificationData(write("a.csv", ROWS), tokenizer=tokenizer_folder, validation_fraction=0)
    data.setup()
    assert data.val_dataloader() == []
    assert data.class_counts == [10, 10, 10]


def test_withheld_test_labels_serve_for_prediction(write: Write, tokenizer_folder: str) -> None:
    bare = write("bare.jsonl", [{"text": "the film"}] * 3)
    data = TextClassificationData(write("a.csv", ROWS), test_path=bare, tokenizer=tokenizer_folder)
    data.setup()
    assert [sorted(batch) for batch in data.predict_dataloader()] == [["attention_mask", "input_ids"]]
    with pytest.raises(PEFTError) as caught:
        data.test_dataloader()
    assert str(caught.value) == "test_path: there are no test rows with labels; give a file that has them"


def test_tokenizer_comes_from_the_module(write: Write, tokenizer_folder: str) -> None:
    class Module(L.LightningModule):
        def __init__(self, model: str) -> None:
            super().__init__()
            self.save_hyperparameters()

        def predict_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return batch["input_ids"]

    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    data = TextClassificationData(write("a.csv", ROWS), validation_fraction=0.1, batch_size=3)
    (ids,) = trainer.predict(Module(tokenizer_folder), data)  # type: ignore[misc]
    assert ids[:, 4].tolist() == [4, 5, 6]  # type: ignore[call-overload]
    with pytest.raises(PEFTError, match=r"^tokenizer: none was given, and the module has no hyper-parameter `model`"):
        TextClassificationData(data.path).setup()


def test_every_wrong_number_is_told_at_once() -> None:
    with pytest.raises(PEFTError) as caught:
        TextClassificationData(
            "a.csv", text_column=[], max_length=0, batch_size=0, num_workers=-1, validation_fraction=1
        )
    assert list(caught.value.faults) == [
        "text_column: give one column or two, not []",
        "max_length: 0 is less than 1",
        "batch_size: 0 is less than 1",
        "num_workers: -1 is less than 0",
        "validation_fraction: 1 is not between 0 and 1 (1 left out)",
    ]


def test_missing_columns_are_told_for_all_splits_with_the_nearest(write: Write, tokenizer_folder: str) -> None:
    train = write("train.jsonl", [{"texts": "a", "lable": 1}, {"texts": "b", "lable": 2}])
    valid = write("valid.jsonl", [{"text": "a", "zzz": 1}])
    assert fault(TextClassificationData(train, validation_path=valid, tokenizer=tokenizer_folder)) == [
        "text_column: the train data has no column 'text'; did you mean 'texts'?",
        "label_column: the train data has no column 'label'; did you mean 'lable'?",
        "label_column: the validation data has no column 'label'; it has text, zzz",
    ]


def test_columns_of_the_wrong_kind(write: Write, tokenizer_folder: str) -> None:
    def told(rows: list[dict[str, Any]]) -> list[str]:
        return fault(TextClassificationData(write("a.jsonl", rows), tokenizer=tokenizer_folder))

    numbers = [{"text": number, "label": number} for number in range(3)]
    assert told(numbers) == ["text_column: 'text' of the train data holds int64, not text"]
    empty = [{"text": None if number else "a", "label": number} for number in range(3)]
    assert told(empty) == ["text_column: 2 of 3 rows of the train data have no 'text'"]
    unlabelled = [{"text": "a", "label": None if number % 2 else "x"} for number in range(4)]
    assert told(unlabelled) == ["label_column: 2 of 4 training rows have no label: rows 2, 4"]
    floats = [{"text": "a", "label": number / 2} for number in range(3)]
    assert told(floats) == ["label_column: 'label' holds float; a class is a string or an integer"]
    single = [{"text": "a", "label": "only"}] * 3
    assert told(single) == ["label_column: 'label' holds one class only, 'only'; a classifier needs two or more"]


def test_labels_that_training_does_not_have(write: Write, tokenizer_folder: str) -> None:
    other = write("other.csv", [{"text": "a", "label": "godo"}] * 2 + [{"text": "b", "label": "xyz"}])
    data = TextClassificationData(
        write("a.csv", ROWS), validation_path=other, test_path=other, tokenizer=tokenizer_folder
    )
    told = [
        "the label 'godo' (2 rows) does not occur in training; did you mean 'good'?",
        "the label 'xyz' (1 row) does not occur in training; its classes are 'bad', 'fine', 'good'",
    ]
    assert fault(data) == [f"{split}: {message}" for split in ("test", "validation") for message in told]


def test_tokenizer_faults(write: Write, tokenizer_folder: str, tmp_path: Any) -> None:
    path = write("a.csv", ROWS)
    assert fault(TextClassificationData(path, tokenizer=tokenizer_folder, max_length=513)) == [
        f"max_length: 513 is more than the 512 tokens that {tokenizer_folder!r} reads"
    ]
    (tmp_path / "none").mkdir()
    (message,) = fault(TextClassificationData(path, tokenizer=str(tmp_path / "none")))
    assert message.startswith(f"tokenizer: none can be loaded from {str(tmp_path / 'none')!r}: ")
