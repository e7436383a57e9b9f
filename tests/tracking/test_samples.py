"""The rows of the table of predictions, as a person reads them."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_peft.data.characters import character_tokenizer
from lightning_peft.tracking.monitor.samples import sample_table

TAGS = ["O", "B-PER", "I-PER", "B-LOC"]
PLAIN = L.Trainer(accelerator="cpu", logger=False, barebones=True)


class Answering(L.LightningModule):
    """Predicts what it was given."""

    def __init__(self, answer: Any, tokenizer: Any = None, names: list[str] | None = None) -> None:
        super().__init__()
        self.save_hyperparameters({"label_names": names})
        self.answer, self.tokenizer = answer, tokenizer
        self.layer = nn.Linear(1, 1)

    def predict_step(self, batch: Any, _: int) -> Any:
        return self.answer


class Words:
    """A tokenizer of four words."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(["[PAD]", "Ada", "lives", "there"][token] for token in ids)


def shown(module: L.LightningModule, batch: Any) -> list[list[Any]]:
    table = sample_table(PLAIN, module, batch, 8)
    assert table is not None
    return table[1]


def test_tags_of_tokens_are_named_and_not_decoded() -> None:
    batch = {"input_ids": torch.tensor([[1, 2, 3], [3, 2, 1]]), "labels": torch.tensor([[1, 0, 3], [-100, 2, -100]])}
    module = Answering([["a"], ["b"]], Words(), TAGS)
    assert shown(module, batch) == [
        ["Ada lives there", "B-PER, O, B-LOC", '["a"]'],
        ["there lives Ada", "I-PER", '["b"]'],
    ]
    # of a number that is no class, the number
    assert shown(module, {**batch, "labels": torch.tensor([4, 1])})[0][1] == 4
    assert shown(Answering([["a"], ["b"]], Words()), batch)[0][1] == "Ada [PAD] there"


def test_letters_of_a_transcript_are_all_there() -> None:
    tokenizer = character_tokenizer("helowrd")
    ids = torch.tensor(tokenizer("hello world")["input_ids"])
    [[_, target, prediction]] = shown(
        Answering(["helo"], tokenizer), {"input_values": torch.ones(1, 4), "labels": ids[None]}
    )
    assert (target, prediction) == ("hello world", "helo")


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_large_prediction_is_told_by_its_shape(as_dict: bool) -> None:
    masks = torch.zeros(2, 64, 64, dtype=torch.int64)
    batch = {"pixel_values": torch.ones(2, 3, 8, 8)}
    module = Answering({"mask": masks} if as_dict else masks)
    assert [row[-1] for row in shown(module, batch)] == ["int64 of shape (64, 64)"] * 2


@pytest.mark.parametrize("classes", [3, 40])
def test_of_likelihoods_the_best_class_is_named(classes: int) -> None:
    likely: Tensor = torch.arange(1.0, 1 + 2 * classes).view(2, classes).flip(1) / 100
    module = Answering(likely, names=[f"c{place}" for place in range(classes)])
    best = [row[-1] for row in shown(module, {"x": torch.ones(2, 1)})]
    assert best == [f"c0 ({classes / 100:.3f})", f"c0 ({2 * classes / 100:.3f})"]
