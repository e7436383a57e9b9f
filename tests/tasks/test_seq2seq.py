from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.text import Perplexity

from lightning_peft import PEFT, LoRA, load_from_checkpoint
from lightning_peft.methods.errors import PEFTError
from lightning_peft.tasks.seq2seq import Seq2Seq
from tests.tasks.writers import PAIRS, Pairs, build, flat, save, trainer

ANSWERS = [answer for _, answer in PAIRS]
KINDS = ["T5", "Bart"]
ONCE: dict[str, Any] = {"max_epochs": 16, "check_val_every_n_epoch": 16, "num_sanity_val_steps": 0}
"""Evaluated when training ends."""


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_that_of_transformers(kind: str) -> None:
    model, data = build(kind), Pairs(decoder=False)
    batch = data.batch(data.rows)
    outcome = Seq2Seq(model).outcome(batch)
    assert float(outcome.loss.detach()) == pytest.approx(float(model(**batch).loss.detach()), rel=1e-6)
    assert int(outcome.count) == sum(len(answer.split()) + 1 for answer in ANSWERS)


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_over_all_tokens(kind: str, tmp_path: Path) -> None:
    data, model = Pairs(decoder=False, unlabelled=1), build(kind)
    (found,) = trainer(tmp_path).test(Seq2Seq(model), data, verbose=False)
    perplexity, losses, right = Perplexity(ignore_index=-100), [], []
    for row in data.rows:
        batch = data.batch([row])
        logits, labels = model(**batch).logits.detach(), batch["labels"]
        perplexity.update(logits, labels)
        losses.append(float(F.cross_entropy(logits[0], labels[0], reduction="sum")))
        right += (logits.argmax(-1) == labels)[0].tolist()
    assert found == {
        "test_loss": pytest.approx(sum(losses) / len(right), rel=1e-5),
        "test_perplexity": pytest.approx(float(perplexity.compute()), rel=1e-5),
        "test_accuracy": pytest.approx(sum(right) / len(right), rel=1e-5),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_answers_by_heart_and_says_them_again_after_loading(kind: str, tmp_path: Path) -> None:
    folder = save(kind, tmp_path / "model")
    module = Seq2Seq(folder, learning_rate=1e-2, generation={"max_new_tokens": 6}, generation_metrics=["exact_match"])
    loops, data = trainer(tmp_path, **ONCE), Pairs(decoder=False, repeat=8, batch_size=8)
    (before,) = trainer(tmp_path).validate(module, data, verbose=False)
    loops.fit(module.train(), data)
    after = loops.callback_metrics
    assert after["val_loss"] < 0.1 * before["val_loss"]
    assert before["val_exact_match"] == 0
    assert [float(after[f"val_{name}"]) for name in ("exact_match", "accuracy")] == [1, 1]
    assert flat(loops.predict(module, data)) == ANSWERS

    loops.save_checkpoint(tmp_path / "model.ckpt")
    again = Seq2Seq.load_from_checkpoint(tmp_path / "model.ckpt")
    # without the datamodule, the tokenizer is the model's own
    assert flat(trainer(tmp_path).predict(again, data.predict_dataloader())) == ANSWERS


def test_under_lora(tmp_path: Path) -> None:
    folder = save("T5", tmp_path / "model")
    method = LoRA(r=16, alpha=32, target_modules=["q", "k", "v", "o", "wi", "wo"])
    loops = trainer(tmp_path, callbacks=[PEFT(method)], **ONCE)
    data = Pairs(decoder=False, repeat=8, batch_size=8)
    loops.fit(
        Seq2Seq(folder, learning_rate=1e-2, generation_metrics=["exact_match"], generation={"max_new_tokens": 6}), data
    )
    assert loops.callback_metrics["val_exact_match"] == 1
    loops.save_checkpoint(tmp_path / "adapter.ckpt")
    again = load_from_checkpoint(Seq2Seq, tmp_path / "adapter.ckpt")
    assert flat(trainer(tmp_path).predict(again, data)) == ANSWERS


def test_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PEFTError, match="tokenizer: its 15 tokens are more than the 9 that the model has embeddings"):
        trainer(tmp_path).validate(Seq2Seq(build("T5", vocab_size=9)), Pairs(decoder=False), verbose=False)


def test_labels_in_a_batch_to_predict_on_make_no_difference(tmp_path: Path) -> None:
    data, module = Pairs(decoder=False), Seq2Seq(build("Bart"), generation={"max_new_tokens": 4})
    torch.manual_seed(0)
    plain = trainer(tmp_path).predict(module, data)
    data.predict_dataloader = data.val_dataloader  # type: ignore[method-assign]
    assert trainer(tmp_path).predict(module, data) == plain
