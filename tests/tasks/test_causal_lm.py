from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.text import Perplexity

from lightning_peft import PEFT, LoRA, load_from_checkpoint
from lightning_peft.methods.errors import PEFTError
from lightning_peft.tasks.causal_lm import CausalLM
from tests.tasks.writers import PAIRS, Pairs, build, flat, save, tokenizer, trainer

ANSWERS = [answer for _, answer in PAIRS]


class Bigrams(torch.nn.Module):
    """Logits of the next word from the one before it."""

    def __init__(self, words: int = 15) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(words, words)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        logits: torch.Tensor = self.table(input_ids)
        return logits


def batch() -> dict[str, torch.Tensor]:
    data = Pairs(decoder=True)
    return data.batch(data.rows)


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "OPT"])
def test_loss_is_that_of_transformers(kind: str) -> None:
    model = build(kind, initializer_range=0.3, **({"init_std": 0.3} if kind == "OPT" else {}))
    outcome = CausalLM(model).outcome(batch())
    assert float(outcome.loss.detach()) == pytest.approx(float(model(**batch()).loss.detach()), rel=1e-6)
    assert int(outcome.count) == sum(len(answer.split()) + 1 for answer in ANSWERS)


def test_first_label_of_a_row_is_foreseen_by_nothing() -> None:
    module = CausalLM(Bigrams())
    ids = torch.tensor([[3, 4, 5]])
    outcome = module.outcome({"input_ids": ids, "labels": ids})
    expected = F.cross_entropy(module.model.table.weight[[3, 4]], ids[0, 1:])
    assert float(outcome.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert int(outcome.count) == 2


def test_half_precision_logits_give_a_float32_loss() -> None:
    outcome = CausalLM(build("Llama").bfloat16()).outcome(batch())
    assert outcome.loss.dtype == torch.float32


def test_no_cache_is_made_where_nothing_is_generated() -> None:
    model = build("Llama")
    assert model.config.use_cache
    outputs = []
    model.register_forward_hook(lambda *call: outputs.append(call[-1]))
    CausalLM(model).outcome(batch())
    assert outputs[0].past_key_values is None


def test_metrics_are_over_all_tokens(tmp_path: Path) -> None:
    data = Pairs(decoder=True, unlabelled=1)
    model = build("Llama", initializer_range=0.3)
    (found,) = trainer(tmp_path).test(CausalLM(model), data, verbose=False)
    perplexity, losses, right = Perplexity(ignore_index=-100), [], []
    for ids, answer in data.rows:
        row = data.batch([(ids, answer)])
        logits, labels = model(**row).logits[:, :-1], row["labels"][:, 1:]
        perplexity.update(logits, labels)
        losses.append(F.cross_entropy(logits[0], labels[0], reduction="sum"))
        right += (logits.argmax(-1) == labels)[labels != -100].tolist()
    assert found["test_perplexity"] == pytest.approx(float(perplexity.compute()), rel=1e-5)
    assert found["test_loss"] == pytest.approx(float(sum(losses).detach()) / len(right), rel=1e-5)  # type: ignore[union-attr]
    assert found["test_perplexity"] == pytest.approx(math.exp(found["test_loss"]), rel=1e-5)
    assert found["test_accuracy"] == pytest.approx(sum(right) / len(right), rel=1e-5)


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_it_learns_answers_by_heart_and_says_them_again_after_loading(kind: str, tmp_path: Path) -> None:
    folder = save(kind, tmp_path / "model")
    module = CausalLM(folder, learning_rate=1e-2, generation={"max_new_tokens": 6}, generation_metrics=["exact_match"])
    loops, data = trainer(tmp_path, max_epochs=5, num_sanity_val_steps=0), Pairs(decoder=True, repeat=6)
    (before,) = trainer(tmp_path).validate(module, data, verbose=False)
    loops.fit(module.train(), data)
    after = loops.callback_metrics
    assert after["val_loss"] < 0.1 * before["val_loss"]
    assert before["val_exact_match"] == 0
    assert [float(after[f"val_{name}"]) for name in ("exact_match", "accuracy")] == [1, 1]
    assert flat(loops.predict(module, data)) == ANSWERS

    loops.save_checkpoint(tmp_path / "model.ckpt")
    again = CausalLM.load_from_checkpoint(tmp_path / "model.ckpt")
    assert again.hparams["generation"] == {"max_new_tokens": 6}
    # without the datamodule, the tokenizer is the model's own
    assert flat(trainer(tmp_path).predict(again, data.predict_dataloader())) == ANSWERS


def test_under_lora(tmp_path: Path) -> None:
    folder = save("Llama", tmp_path / "model", initializer_range=0.3)
    method = LoRA(r=16, alpha=32, target_modules="all-linear")
    loops = trainer(tmp_path, max_epochs=10, callbacks=[PEFT(method)], num_sanity_val_steps=0)
    data = Pairs(decoder=True, repeat=8)
    loops.fit(CausalLM(folder, learning_rate=1e-2, generation_metrics=["exact_match"]), data)
    assert loops.callback_metrics["val_exact_match"] == 1
    loops.save_checkpoint(tmp_path / "adapter.ckpt")
    again = load_from_checkpoint(CausalLM, tmp_path / "adapter.ckpt")
    assert flat(trainer(tmp_path).predict(again, data)) == ANSWERS


def test_packed_rows_give_the_loss_of_the_texts_alone(tmp_path: Path) -> None:
    model = build("Llama", initializer_range=0.3)
    packed = Pairs(decoder=True, packing=True)
    one = CausalLM(model).outcome(packed.batch(packed.rows))
    assert float(one.loss.detach()) == pytest.approx(float(model(**batch()).loss.detach()), rel=1e-5)
    loops = trainer(tmp_path, max_epochs=1)
    loops.fit(CausalLM(model), packed)
    assert loops.global_step == 2


def test_model_that_mixes_packed_texts_is_refused_before_training(tmp_path: Path) -> None:
    loops = trainer(tmp_path, max_epochs=1)
    with pytest.raises(PEFTError) as caught:
        loops.fit(CausalLM(build("OPT")), Pairs(decoder=True, packing=True))
    assert str(caught.value) == (
        "packing: the attention of OPTForCausalLM ignores where a document ends, and each would be trained on those "
        "packed before it; use packing=False"
    )
    assert loops.global_step == 0


def test_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    data = Pairs(decoder=True)
    data.tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    with pytest.raises(PEFTError) as caught:
        trainer(tmp_path, max_epochs=1).fit(CausalLM(build("Llama")), data)
    assert str(caught.value) == (
        "tokenizer: its 17 tokens are more than the 15 that the model has embeddings for; use the model's own, or "
        "resize the model's embeddings first"
    )


def test_token_that_stands_for_images_is_in_no_text(tmp_path: Path) -> None:
    """As that of Gemma 3's smallest model, which reads text only."""
    data = Pairs(decoder=True)
    data.tokenizer = tokenizer(image_token="<image>")
    assert (len(data.tokenizer), data.tokenizer.image_token_id) == (16, 15)
    loops = trainer(tmp_path, max_steps=1)
    loops.fit(CausalLM(build("Llama")), data)
    assert loops.global_step == 1


def test_given_module_learns(tmp_path: Path) -> None:
    given = Bigrams()
    rows = [{"input_ids": torch.arange(3, 11), "labels": torch.arange(3, 11)}] * 8
    loader: DataLoader[Any] = DataLoader(rows, batch_size=4)  # type: ignore[arg-type]
    loops = trainer(tmp_path, max_epochs=20)
    loops.fit(CausalLM(given, learning_rate=0.5), loader, loader)
    assert loops.callback_metrics["val_accuracy"] == 1
    assert loops.callback_metrics["val_perplexity"] < 1.1
