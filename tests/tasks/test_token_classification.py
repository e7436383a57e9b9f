from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from lightning_peft.data.token_classification import TokenClassificationData
from lightning_peft.tasks.entities import EntityF1, are_entity_tags
from lightning_peft.tasks.token_classification import TokenClassification

NAMES = ["O", *(f"{prefix}-{kind}" for kind in ("per", "loc") for prefix in "BIES")]


@pytest.fixture
def phrases(tmp_path: Path) -> str:
    """48 sentences in which `good film` is of one kind, `bad plot` of another, and a hyphen splits some words."""
    rows = []
    for n in range(48):
        words, tags = ["the"] * (n % 3), ["O"] * (n % 3)
        for kind in (n % 2, n // 2 % 2):
            words += [["good", "film-book"], ["bad", "plot"]][kind] + ["was", "a"][: n // 4 % 3]
            tags += [["B-X", "I-X"], ["B-Y", "I-Y"]][kind] + ["O", "O"][: n // 4 % 3]
        rows.append({"tokens": words, "tags": tags})
    path = tmp_path / "phrases.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(**{"accelerator": "cpu", "devices": 1, "default_root_dir": folder, **quiet, **options})


def test_fit_learns_the_entities_and_load_from_checkpoint_gives_the_model_back(
    tiny_bert: str, phrases: str, tmp_path: Path
) -> None:
    module = TokenClassification(tiny_bert, learning_rate=1e-2)
    loops = trainer(tmp_path, max_epochs=10)
    rows = TokenClassificationData(phrases, validation_path=phrases, batch_size=8)
    loops.fit(module, rows)
    assert module.hparams["label_names"] == ["B-X", "B-Y", "I-X", "I-Y", "O"]
    metrics = {name: float(value) for name, value in loops.callback_metrics.items()}
    assert sorted(name for name in metrics if name.startswith("val")) == [
        "val_accuracy",
        "val_entity_f1",
        "val_entity_precision",
        "val_entity_recall",
        "val_loss",
        "val_macro_f1",
        "val_majority",
    ]
    assert metrics["val_loss"] < 0.1
    assert metrics["val_entity_f1"] > 0.99
    assert metrics["val_accuracy"] > 0.99
    counts = rows.class_counts
    assert metrics["val_majority"] == pytest.approx(max(counts) / sum(counts))

    loops.save_checkpoint(tmp_path / "model.ckpt")
    again = TokenClassification.load_from_checkpoint(tmp_path / "model.ckpt")
    assert again.model.config.id2label == {0: "B-X", 1: "B-Y", 2: "I-X", 3: "I-Y", 4: "O"}
    (first, *_), (other, *_) = loops.predict(module, rows), trainer(tmp_path).predict(again.eval(), rows)  # type: ignore[misc]
    assert torch.equal(first, other)  # type: ignore[arg-type]
    assert first.shape[::2] == (8, 5)  # type: ignore[union-attr]
    assert first.sum(dim=-1).numpy() == pytest.approx(1, abs=1e-5)  # type: ignore[union-attr]


class Table(torch.nn.Module):
    """Logits that depend on the word alone."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(15, classes)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.words(input_ids)  # type: ignore[no-any-return]


def test_metrics_are_over_all_words_and_leave_ignored_ones_out(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(0, 15, (10, 6), generator=draw), torch.randint(0, 9, (10, 6), generator=draw)
    labels[torch.rand(10, 6, generator=draw) < 0.3] = -100
    labels[9] = -100
    module = TokenClassification(Table(9), label_names=NAMES)
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    (found,) = trainer(tmp_path).test(module, DataLoader(rows, batch_size=3), verbose=False)  # type: ignore[arg-type]
    kept = labels != -100
    logits, truth = module.model(ids)[kept], labels[kept]
    guess = module.model(ids).argmax(dim=-1)
    pairs = [(g[k].tolist(), t[k].tolist()) for g, t, k in zip(guess, labels, kept, strict=True)]
    precision, recall, f1 = scores(NAMES, pairs)
    assert found == {
        "test_loss": pytest.approx(torch.nn.functional.cross_entropy(logits, truth).item(), rel=1e-6),
        "test_accuracy": pytest.approx(float(multiclass_accuracy(logits, truth, 9, average="micro")), rel=1e-6),
        "test_macro_f1": pytest.approx(float(multiclass_f1_score(logits, truth, 9)), rel=1e-6),
        "test_entity_precision": pytest.approx(precision, rel=1e-6),
        "test_entity_recall": pytest.approx(recall, rel=1e-6),
        "test_entity_f1": pytest.approx(f1, rel=1e-6),
    }


@pytest.mark.parametrize("names", [["NOUN", "VERB"], ["O", "B-X", "other"], None])
def test_entities_are_left_out_where_tags_do_not_mark_them(names: list[str] | None) -> None:
    module = TokenClassification(Table(2), num_labels=3 if names and len(names) == 3 else 2, label_names=names)
    module.configure_model()
    assert sorted(module.metrics["val"]) == ["accuracy", "loss", "macro_f1", "majority"]


@pytest.mark.parametrize(
    ("names", "answer"),
    [
        (["O", "B-X", "I-X"], True),
        (["I-X", "O"], True),
        (["O", "B-a-b", "I-a-b", "E-a-b", "S-a-b"], True),
        (["O", "B-X", "I-X", "L-X", "U-X"], True),
        (["B-X", "I-X"], True),
        (["O"], False),
        ([], False),
        (["O", "X"], False),
        (["O", "B-", "I-"], False),
        (["b-X", "o"], False),
    ],
)
def test_which_names_are_entity_tags(names: list[str], answer: bool) -> None:
    assert are_entity_tags(names) is answer


def spans(tags: list[str]) -> set[tuple[int, int, str]]:
    """All (first, last, type) such that the words between are one entity, by asking of every pair of places."""

    def joined(left: str, right: str) -> bool:
        return left[0] in "BI" and right[0] in "IEL" and left[2:] == right[2:]

    places = range(len(tags))
    return {
        (first, last, tags[first][2:])
        for first, last in itertools.product(places, places)
        if first <= last
        and all(tag != "O" for tag in tags[first : last + 1])
        and all(joined(*pair) for pair in itertools.pairwise(tags[first : last + 1]))
        and not (first > 0 and joined(tags[first - 1], tags[first]))
        and not (last + 1 < len(tags) and joined(tags[last], tags[last + 1]))
    }


def scores(names: list[str], pairs: list[tuple[list[int], list[int]]]) -> tuple[float, float, float]:
    """Precision, recall and F1 of guessed against true labels, counted in sets."""
    found = [(spans([names[n] for n in guess]), spans([names[n] for n in truth])) for guess, truth in pairs]
    correct = sum(len(guess & truth) for guess, truth in found)
    guessed, true = sum(len(guess) for guess, _ in found), sum(len(truth) for _, truth in found)
    precision, recall = correct / guessed if guessed else 0.0, correct / true if true else 0.0
    return precision, recall, 2 * precision * recall / (precision + recall) if correct else 0.0


def measured(names: list[str], batches: list[tuple[Any, Any]]) -> tuple[float, float, float]:
    metric = EntityF1(names)
    for guess, truth in batches:
        metric.update(torch.tensor(guess), torch.tensor(truth))
    found = metric.compute()
    assert list(found) == ["entity_precision", "entity_recall", "entity_f1"]
    return tuple(float(value) for value in found.values())  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("guess", "truth", "counts"),
    [
        ("B-per I-per O", "B-per I-per O", (1, 1, 1)),
        ("B-per O O", "B-per I-per O", (0, 1, 1)),
        ("B-loc I-loc O", "B-per I-per O", (0, 1, 1)),
        # no B- before: an entity all the same
        ("I-per I-per O", "B-per I-per O", (1, 1, 1)),
        ("O I-per I-loc", "O B-per B-loc", (2, 2, 2)),
        # two that touch
        ("B-per I-per I-per", "B-per B-per I-per", (0, 1, 2)),
        ("B-per I-loc I-loc", "B-per B-loc I-loc", (2, 2, 2)),
        # what ends an entity
        ("B-per E-per I-per", "B-per E-per S-per", (2, 2, 2)),
        ("S-per S-per O", "B-per E-per O", (0, 2, 1)),
        ("O O O", "O O O", (0, 0, 0)),
        ("O O O", "B-per O S-per", (0, 0, 2)),
    ],
)
def test_entities_by_hand(guess: str, truth: str, counts: tuple[int, int, int]) -> None:
    ids = [[NAMES.index(tag) for tag in tags.split()] for tags in (guess, truth)]
    correct, guessed, true = counts
    expected = (correct / max(guessed, 1), correct / max(true, 1), 2 * correct / max(guessed + true, 1))
    assert measured(NAMES, [([ids[0]], [ids[1]])]) == pytest.approx(expected)


tables = st.integers(1, 7).flatmap(
    lambda width: st.lists(
        st.tuples(*[st.lists(st.integers(0, 8), min_size=width, max_size=width)] * 2), min_size=1, max_size=4
    )
)


@settings(max_examples=100, deadline=None)
@given(batches=st.lists(tables, min_size=1, max_size=3), mask=st.randoms(use_true_random=False))
def test_entities_equal_those_that_brute_force_finds(batches: list[Any], mask: Any) -> None:
    given_batches, pairs = [], []
    for rows in batches:
        guesses, truths = [row[0] for row in rows], [row[1] for row in rows]
        kept = [[mask.random() < 0.8 for _ in truth] for truth in truths]
        pairs += [
            (list(itertools.compress(guess, keep)), list(itertools.compress(truth, keep)))
            for guess, truth, keep in zip(guesses, truths, kept, strict=True)
        ]
        hidden = [
            [label if keep else -100 for label, keep in zip(truth, row, strict=True)]
            for truth, row in zip(truths, kept, strict=True)
        ]
        given_batches.append((guesses, hidden))
    assert measured(NAMES, given_batches) == pytest.approx(scores(NAMES, pairs))
