from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.text import SQuAD

from lightning_peft.data.question_answering import QuestionAnsweringData
from lightning_peft.methods.errors import PEFTError
from lightning_peft.tasks.answers import AnswerScores, Spans, best_spans
from lightning_peft.tasks.question_answering import QuestionAnswering

ANSWERS = ["good", "bad", "fine", "poor"]
OTHERS = ["film", "book", "plot", "a", "the", "is"]


def written(path: Path, rows: int, length: int, unanswerable: float = 0.0) -> str:
    """Contexts of `length` words or more, of which one or two that touch are the answer."""
    draw = random.Random(0)
    lines = []
    for _ in range(rows):
        words = draw.choices(OTHERS, k=length)
        place, answer = draw.randrange(length), " ".join(draw.choices(ANSWERS, k=draw.choice((1, 2))))
        known = draw.random() >= unanswerable
        words[place:place] = [answer] if known else []
        start = len(" ".join(words[:place])) + (place > 0)
        answers: dict[str, Any] = {"text": [answer] * known, "answer_start": [start] * known}
        lines.append(json.dumps({"question": "was very", "context": " ".join(words), "answers": answers}) + "\n")
    path.write_text("".join(lines))
    return str(path)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(**{"accelerator": "cpu", "devices": 1, "default_root_dir": folder, **quiet, **options})


class Pointer(torch.nn.Module):
    """Logits that depend on the token and its place in the window."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = torch.nn.Embedding(15, 2), torch.nn.Embedding(64, 2)

    def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> Any:
        logits = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        return SimpleNamespace(start_logits=logits[..., 0], end_logits=logits[..., 1])


def by_hand(model: Pointer, data: QuestionAnsweringData, split: str, most: int) -> dict[str, float]:
    """Loss, exact match and F1 window by window and span by span, and SQuAD's scores from torchmetrics."""
    losses = []
    best: dict[int, tuple[float, str]] = {}
    null: dict[int, float] = {}
    for window in data._encoded[split]:
        with torch.no_grad():
            output = model(torch.tensor([window["input_ids"]]))
        start, end = output.start_logits[0].double(), output.end_logits[0].double()
        losses += [
            float(-start.log_softmax(0)[window["start_positions"]]),
            float(-end.log_softmax(0)[window["end_positions"]]),
        ]
        example = window["example"]
        context, _ = data.example(split, example)
        inside = [place for place, (first, _) in enumerate(window["offsets"]) if first >= 0]
        for first in inside:
            for last in inside:
                if first <= last < first + most:
                    text = context[window["offsets"][first][0] : window["offsets"][last][1]]
                    candidate = (float(start[first] + end[last]), text)
                    best[example] = max(best.get(example, (-1e9, "")), candidate, key=lambda found: found[0])
        null[example] = min(null.get(example, 1e9), float(start[0] + end[0]))
    metric = SQuAD()
    for example, (score, text) in best.items():
        given = "" if data.unanswerable and null[example] > score else text
        answers = data.example(split, example).answers or [""]
        truth: Any = {"id": str(example), "answers": {"text": answers, "answer_start": [0] * len(answers)}}
        metric.update({"id": str(example), "prediction_text": given}, truth)
    found = {name: float(value) for name, value in metric.compute().items()}
    return {"loss": sum(losses) / len(losses), **found}


def test_fit_learns_the_answers_and_load_from_checkpoint_gives_the_model_back(tiny_bert: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", 64, 5)
    module = QuestionAnswering(tiny_bert, learning_rate=1e-2)
    loops = trainer(tmp_path, max_epochs=25)
    rows = QuestionAnsweringData(path, validation_path=path, max_length=32, stride=4, batch_size=8)
    loops.fit(module, rows)
    metrics = {name: float(value) for name, value in loops.callback_metrics.items()}
    assert sorted(metrics) == ["train_loss", "val_exact_match", "val_f1", "val_loss"]
    assert metrics["val_loss"] < 0.2
    assert metrics["val_exact_match"] > 95
    assert metrics["val_f1"] >= metrics["val_exact_match"]

    loops.save_checkpoint(tmp_path / "model.ckpt")
    again = QuestionAnswering.load_from_checkpoint(tmp_path / "model.ckpt")
    found = [row for batch in loops.predict(module, rows) for row in batch]  # type: ignore[union-attr]
    assert [row for batch in trainer(tmp_path).predict(again.eval(), rows) for row in batch] == found  # type: ignore[union-attr]
    assert [sorted(row) for row in found] == [["answer", "example", "null_score", "score"]] * 64
    assert [row["example"] for row in found] == list(range(64))
    right = [row["answer"] in rows.example("validation", row["example"]).answers for row in found]
    assert 100 * sum(right) / 64 == pytest.approx(metrics["val_exact_match"], rel=1e-6)


@pytest.mark.parametrize("unanswerable", [0.0, 0.5])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_metrics_equal_those_found_by_hand(
    unanswerable: float, batch_size: int, tmp_path: Path, tiny_bert: str
) -> None:
    """Contexts of two to four windows, which lie in different batches."""
    path = written(tmp_path / "a.jsonl", 20, 20, unanswerable)
    data = QuestionAnsweringData(
        path, test_path=path, tokenizer=tiny_bert, max_length=12, stride=3, batch_size=batch_size
    )
    model = Pointer()
    with torch.no_grad():  # so that some find no answer
        model.places.weight[0] += 0.7
    module = QuestionAnswering(model, max_answer_tokens=3)
    (found,) = trainer(tmp_path).test(module, data, verbose=False)
    expected = by_hand(model, data, "test", most=3)
    assert data.unanswerable == bool(unanswerable)
    assert 0 < expected["f1"] < 100
    assert found == {f"test_{name}": pytest.approx(value, rel=1e-5) for name, value in expected.items()}


def test_loss_is_transformers_own_and_does_not_depend_on_padding(tiny_bert: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", 4, 6)
    data = QuestionAnsweringData(path, validation_path=path, tokenizer=tiny_bert, batch_size=1)
    data.setup()
    module = QuestionAnswering(tiny_bert)
    module.configure_model()
    module.eval()
    losses = []
    for batch in data.val_dataloader():
        loss = module.outcome(batch).loss
        theirs = module.model(**{name: value for name, value in batch.items() if name not in ("example", "offsets")})
        assert loss.item() == pytest.approx(theirs.loss.item(), rel=1e-6)
        losses.append(loss.item())
    long = written(tmp_path / "b.jsonl", 1, 40)
    Path(path).write_text(Path(path).read_text() + Path(long).read_text())
    data = QuestionAnsweringData(path, validation_path=path, tokenizer=tiny_bert)
    data.setup()
    (batch,) = data.val_dataloader()
    batch["start_positions"][4] = batch["end_positions"][4] = -100
    outcome = module.outcome(batch)
    assert outcome.count == 4
    assert outcome.loss.item() == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_batches_without_examples_count_in_the_loss_only(tmp_path: Path) -> None:
    rows = [{"input_ids": torch.arange(5), "start_positions": torch.tensor(1), "end_positions": torch.tensor(2)}] * 3
    loader = torch.utils.data.DataLoader(rows, batch_size=2)  # type: ignore[arg-type]
    (found,) = trainer(tmp_path).test(QuestionAnswering(Pointer()), loader, verbose=False)
    assert list(found) == ["test_loss"]


def test_longest_answer_is_checked() -> None:
    with pytest.raises(PEFTError) as caught:
        QuestionAnswering("model", max_answer_tokens=0)
    assert str(caught.value) == "max_answer_tokens: 0 is less than 1"


numbers = st.floats(-3, 3, width=32)


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.lists(st.tuples(numbers, numbers, st.booleans()), min_size=1, max_size=8),
    most=st.integers(1, 10),
)
def test_best_span_equals_that_of_brute_force(tokens: list[tuple[float, float, bool]], most: int) -> None:
    logits = torch.tensor([[[s for s, _, _ in tokens]], [[e for _, e, _ in tokens]]])
    offsets = torch.tensor([[[10 * n, 10 * n + 5] if inside else [-1, -1] for n, (_, _, inside) in enumerate(tokens)]])
    found = best_spans(logits, offsets, most)
    pairs = [
        (logits[0, 0, a] + logits[1, 0, b], 10 * a, 10 * b + 5)
        for a in range(len(tokens))
        for b in range(a, min(a + most, len(tokens)))
        if tokens[a][2] and tokens[b][2]
    ]
    assert found.null.tolist() == [logits[:, 0, 0].sum()]
    if not pairs:
        assert [value.tolist() for value in found[:3]] == [[-torch.inf], [-1], [-1]]
        return
    assert found.score.item() == max(score for score, _, _ in pairs)
    assert (found.score.item(), found.start.item(), found.end.item()) in pairs


def test_question_takes_the_best_of_its_windows_and_none_where_all_say_so() -> None:
    """Question 0 has two windows; the second is right. Question 1 has no answer, of which one window isn't sure."""
    contexts = {0: ("a cat or a dog", ["dog", "the dog"]), 1: ("nothing here", [])}

    def spans(*rows: tuple[float, int, int, float]) -> Spans:
        return Spans(*(torch.tensor(column) for column in zip(*rows, strict=True)))

    def measured(nulls: bool, sure: float) -> tuple[float, float]:
        metric = AnswerScores()
        metric.update(torch.tensor([0, 1]), spans((1.0, 2, 5, 9.0), (3.0, 0, 7, 5.0)), contexts.__getitem__, nulls)
        metric.update(torch.tensor([-1]), spans((99.0, 0, 1, 0.0)), contexts.__getitem__, nulls)
        metric.update(torch.tensor([0, 1]), spans((2.0, 9, 14, 1.5), (0.0, 0, 0, sure)), contexts.__getitem__, nulls)
        found = metric.compute()
        return float(found["exact_match"]), float(found["f1"])

    # "a dog" is "dog" once articles are left out; "nothing" is wrong where there is no answer
    assert measured(False, 3.5) == (50, 50)
    assert measured(True, 3.5) == (100, 100)
    assert measured(True, 2.5) == (50, 50)
