from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import Metric
from torchmetrics.text import CHRFScore, ROUGEScore, SacreBLEUScore

from lightning_peft.methods.errors import PEFTError
from lightning_peft.tasks.causal_lm import CausalLM, split
from lightning_peft.tasks.seq2seq import Seq2Seq
from lightning_peft.tasks.text_metrics import TEXT_METRICS
from tests.tasks.writers import PAIRS, Pairs, build, flat, save, tokenizer, trainer

REFERENCES = ["one cat sun", "the sea is blue today, is it", "two dogs", "Green.", "a b c d e f"]
TEXTS = ["one cat", "the sea is blue today or not", " two dogs\n", "green", "f e d c b a"]


class Echo(torch.nn.Module):
    """Writes the prompt's last token again, and the number of its tokens; it is no model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(15, 15)
        self.calls: list[dict[str, Any]] = []

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        logits: torch.Tensor = self.table(input_ids)
        return logits

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        self.calls.append({"training": self.training, "mask": attention_mask.tolist(), **options})
        return torch.cat([input_ids, input_ids[:, -1:], attention_mask.sum(dim=1, keepdim=True)], dim=1)


def words(text: str) -> list[str]:
    """As SQuAD's evaluation has them."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def overlap(one: list[str], other: list[str]) -> float:
    """The F1 of the words that both have."""
    if not one or not other:
        return float(one == other)
    return 2 * (Counter(one) & Counter(other)).total() / (len(one) + len(other))


def distance(one: Sequence[str], other: Sequence[str]) -> int:
    """What to put in, take out or exchange, by trying all three at each place."""
    if not one or not other:
        return len(one) + len(other)
    return min(
        distance(one[1:], other) + 1,
        distance(one, other[1:]) + 1,
        distance(one[1:], other[1:]) + (one[0] != other[0]),
    )


def by_hand(texts: list[str], references: list[str]) -> dict[str, float]:
    several: list[list[str]] = [[reference] for reference in references]
    found: dict[str, float] = {}
    plain: dict[str, Metric] = {"bleu": SacreBLEUScore(), "chrf": CHRFScore()}
    for name, metric in plain.items():
        metric.update(texts, several)
        found[name] = float(metric.compute())
    rouge = ROUGEScore(rouge_keys=("rouge1", "rouge2", "rougeL"))
    rouge.update(texts, several)
    found |= {kind: float(rouge.compute()[f"{kind}_fmeasure"]) for kind in ("rouge1", "rouge2", "rougeL")}
    pairs = list(zip(texts, references, strict=True))
    same = [text.strip() == reference.strip() for text, reference in pairs]
    shared = [overlap(words(text), words(reference)) for text, reference in pairs]
    errors = sum(distance(text.split(), reference.split()) for text, reference in pairs)
    count = sum(len(reference.split()) for reference in references)
    more = {"exact_match": sum(same) / len(same), "token_f1": sum(shared) / len(shared), "wer": errors / count}
    return {**found, **more}


def test_metrics_are_those_of_torchmetrics_in_batches_of_any_size() -> None:
    expected = by_hand(TEXTS, REFERENCES)
    assert expected["exact_match"] == 0.2
    assert set(expected) == set(TEXT_METRICS)
    for name, make in TEXT_METRICS.items():
        metric = make()
        for rows in (slice(0, 2), slice(2, 2), slice(2, 5)):
            metric.update(TEXTS[rows], [[reference] for reference in REFERENCES[rows]])
        assert float(metric.compute()) == pytest.approx(expected[name], rel=1e-6), name


sentences = st.lists(st.sampled_from(["a", "b", "The", "c."]), max_size=4).map(" ".join)


@settings(deadline=None)
@given(batches=st.lists(st.lists(st.tuples(sentences, sentences), max_size=3), min_size=1, max_size=3))
def test_word_errors_and_token_f1_of_any_batches_equal_those_of_brute_force(
    batches: list[list[tuple[str, str]]],
) -> None:
    wer, f1 = TEXT_METRICS["wer"](), TEXT_METRICS["token_f1"]()
    for batch in batches:
        for metric in (wer, f1):
            metric.update([text for text, _ in batch], [[reference] for _, reference in batch])
    pairs = [pair for batch in batches for pair in batch]
    count = sum(len(reference.split()) for _, reference in pairs)
    errors = sum(distance(text.split(), reference.split()) for text, reference in pairs)
    if count:
        assert float(wer.compute()) == pytest.approx(errors / count)
    if pairs:
        assert float(f1.compute()) == pytest.approx(sum(overlap(words(a), words(b)) for a, b in pairs) / len(pairs))
    else:
        assert math.isnan(float(f1.compute()))


@pytest.mark.parametrize(("task", "kind", "decoder"), [(CausalLM, "GPT2", True), (Seq2Seq, "Bart", False)])
def test_texts_of_evaluation_rows_are_measured(task: Any, kind: str, decoder: bool, tmp_path: Path) -> None:
    model, data = build(kind, initializer_range=0.5, init_std=0.5), Pairs(decoder=decoder, unlabelled=1)
    module = task(model, generation={"max_new_tokens": 3}, generation_metrics=list(TEXT_METRICS))
    (found,) = trainer(tmp_path).test(module, data, verbose=False)
    texts = []
    for prompt, _ in data.rows:
        made = model.generate(**data.prompts([(prompt, [])]), max_new_tokens=3)[0]
        texts.append(data.tokenizer.decode(made[len(prompt) :] if decoder else made, skip_special_tokens=True))
    assert any(texts)
    expected = by_hand(texts, [answer for _, answer in PAIRS])
    assert {name: found[f"test_{name}"] for name in TEXT_METRICS} == pytest.approx(expected, rel=1e-5)
    assert trainer(tmp_path).predict(module, data) == [texts[:4], texts[4:]]


def test_prompts_are_padded_on_the_left_however_rows_are() -> None:
    data, module = Pairs(decoder=True), CausalLM(Echo())
    rows = [data.rows[0], data.rows[3], data.rows[4]]
    prompts, answers = module.prompts(data.batch(rows))
    assert prompts["input_ids"].tolist() == data.prompts(rows)["input_ids"].tolist()
    assert prompts["attention_mask"].tolist() == data.prompts(rows)["attention_mask"].tolist()
    assert answers == [answer for _, answer in rows]
    again, none = module.prompts(data.prompts(rows))
    assert again["input_ids"].tolist() == prompts["input_ids"].tolist()
    assert again["attention_mask"].tolist() == prompts["attention_mask"].tolist()
    assert none == [[], [], []]


def test_last_of_several_answers_is_the_one_to_write() -> None:
    labels = [-100, -100, 5, 6, -100, 8, 9, -100]
    assert split([3, 4, 5, 6, 7, 8, 9, 0], [1, 1, 1, 1, 1, 1, 1, 0], labels) == ([3, 4, 5, 6, 7], [8, 9])


@given(st.lists(st.tuples(st.integers(3, 9), st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_prompt_and_answer_of_any_row(row: list[tuple[int, bool, bool]]) -> None:
    ids, mask = [token for token, *_ in row], [int(kept) for _, kept, _ in row]
    labels = [token if labelled else -100 for token, _, labelled in row]
    prompt, answer = split(ids, mask, labels)
    text = "".join("x" if label != -100 else " " for label in labels)
    run = text.split()[-1] if text.split() else ""
    assert len(answer) == len(run)
    start = text.rindex(run) if run else len(text)
    assert answer == ids[start : start + len(run)]
    assert prompt == [token for token, kept in zip(ids[:start], mask[:start], strict=True) if kept]


def test_row_without_a_prompt_is_refused() -> None:
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(PEFTError) as caught:
        CausalLM(Echo()).prompts({"input_ids": ids, "labels": ids})
    assert str(caught.value) == (
        "a row has nothing before its labels to generate from; use data with prompts, such as InstructionData"
    )


def test_unknown_names_are_refused_by_the_constructor_all_at_once() -> None:
    with pytest.raises(PEFTError) as caught:
        CausalLM(
            "model",
            metrics=["perplexty", "bleu"],
            generation={"num_beam": 2, "max_new_tokens": 0},
            generation_metrics=["rogue1", "xyz"],
        )
    assert caught.value.faults == (
        "metrics: 'bleu' is of generated texts; name it in generation_metrics",
        "metrics: there is no 'perplexty'; did you mean 'perplexity'?",
        "generation_metrics: there is no 'rogue1'; did you mean 'rouge1' or 'rougeL' or 'rouge2'?",
        "generation_metrics: there is no 'xyz'; the metrics are bleu, chrf, rouge1, rouge2, rougeL, exact_match, "
        "token_f1, wer",
        "generation: `generate` has no option 'num_beam'; did you mean 'num_beams' or 'num_beam_groups'?",
        "generation: `max_new_tokens` must be greater than 0, but is 0.",
    )
    with pytest.raises(PEFTError) as caught:
        Seq2Seq("model", generation={"num_return_sequences": 2, "num_beams": 2, "return_dict_in_generate": True})
    assert caught.value.faults == (
        "generation.num_return_sequences: one text is made for each row; leave it out",
        "generation.return_dict_in_generate: the texts alone are used; leave it out",
    )


def test_metrics_of_texts_need_a_tokenizer(tmp_path: Path) -> None:
    data = Pairs(decoder=True)
    with pytest.raises(PEFTError) as caught:
        trainer(tmp_path).validate(CausalLM(Echo(), generation_metrics=["bleu"]), data.val_dataloader(), verbose=False)
    assert str(caught.value) == (
        "generation_metrics: there is no tokenizer to make text with; use a datamodule that has one"
    )


def test_without_a_tokenizer_predictions_are_token_ids(tmp_path: Path) -> None:
    build("Llama").save_pretrained(tmp_path / "model")
    loader = Pairs(decoder=True).predict_dataloader()
    (first, _) = trainer(tmp_path).predict(CausalLM(Echo()), loader)  # type: ignore[misc]
    assert first == [[3, 3], [4, 3], [5, 2], [11, 3]]
    made = trainer(tmp_path).predict(CausalLM(str(tmp_path / "model"), generation={"max_new_tokens": 2}), loader)
    assert [len(batch) for batch in made] == [4, 3]  # type: ignore[union-attr]
    assert all(isinstance(token, int) for batch in made for row in batch for token in row)  # type: ignore[union-attr]


def test_module_that_can_not_generate_is_refused(tmp_path: Path) -> None:
    class Plain(Echo):
        generate: Any = property()

    with pytest.raises(PEFTError) as caught:
        trainer(tmp_path).predict(CausalLM(Plain()), Pairs(decoder=True))
    assert str(caught.value) == "predict: the model, a Plain, has no method `generate`"
    with pytest.raises(PEFTError) as caught:
        trainer(tmp_path).fit(CausalLM(Plain(), generation_metrics=["chrf"]), Pairs(decoder=True))
    assert str(caught.value) == "generation_metrics: the model, a Plain, has no method `generate`"
    trainer(tmp_path).validate(CausalLM(Plain()), Pairs(decoder=True), verbose=False)


def test_packed_rows_can_not_be_gone_on_from(tmp_path: Path) -> None:
    data = Pairs(decoder=True, packing=True)
    with pytest.raises(PEFTError) as caught:
        trainer(tmp_path).fit(CausalLM(build("Llama"), generation_metrics=["chrf"]), data)
    assert str(caught.value) == "generation_metrics: rows with several texts have no prompt; use packing=False"
    measured = CausalLM(build("Llama"), generation={"max_new_tokens": 1}, generation_metrics=["chrf"])
    assert len(flat(trainer(tmp_path).predict(measured, data))) == len(PAIRS)
    with pytest.raises(PEFTError, match="packing: rows with several texts have no prompt to go on from"):
        trainer(tmp_path).predict(CausalLM(build("Llama")), data.val_dataloader())


def test_options_reach_generate_and_the_model_is_in_evaluation_mode(tmp_path: Path) -> None:
    given, options = Echo(), {"max_new_tokens": 2, "flavour": "own"}
    trainer(tmp_path).predict(CausalLM(given, generation=options), Pairs(decoder=True))
    assert given.calls[1]["mask"] == [[0, 0, 1], [1, 1, 1], [1, 1, 1]]
    assert [{**call, "mask": 0} for call in given.calls] == [{"training": False, "mask": 0, **options}] * 2


def test_length_is_128_tokens_where_none_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    model, data = build("Llama"), Pairs(decoder=True)

    def generate(**options: Any) -> torch.Tensor:
        asked.append(options)
        made: torch.Tensor = options["input_ids"]
        return made

    monkeypatch.setattr(model, "generate", generate)
    for options in (None, {"max_length": 9}, {"use_cache": False, "eos_token_id": 7}):
        trainer(tmp_path, limit_predict_batches=1).predict(CausalLM(model, generation=options), data)
    assert [(call.get("max_new_tokens"), call.get("max_length")) for call in asked] == [
        (128, None),
        (None, 9),
        (128, None),
    ]
    assert [(call["use_cache"], call["eos_token_id"], call["pad_token_id"]) for call in asked] == [
        (True, [2], 0),
        (True, [2], 0),
        (False, 7, 0),
    ]


def test_text_ends_where_the_tokenizer_or_the_model_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    model, data = build("Llama", eos_token_id=[5, 9]), Pairs(decoder=True)

    def generate(**options: Any) -> torch.Tensor:
        asked.append(options)
        made: torch.Tensor = options["input_ids"]
        return made

    monkeypatch.setattr(model, "generate", generate)
    for options in (None, {"stop_strings": ["sun"]}):
        trainer(tmp_path, limit_predict_batches=1).predict(CausalLM(model, generation=options), data)
    assert [call["eos_token_id"] for call in asked] == [[2, 5, 9]] * 2
    # transformers looks for the strings in the tokenizer's words
    assert [call.get("tokenizer") for call in asked] == [None, data.tokenizer]


def test_decoder_without_a_padding_token_pads_with_its_end(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    model, data = build("GPT2", pad_token_id=None), Pairs(decoder=True)
    data.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer, eos_token="<eos>")
    made = trainer(tmp_path).predict(CausalLM(model, generation={"max_new_tokens": 4}), data)
    assert [len(batch) for batch in made] == [4, 3]  # type: ignore[union-attr]


def test_checkpoint_loads_without_data_or_tokenizer(tmp_path: Path) -> None:
    loops = trainer(tmp_path, max_steps=1)
    loops.fit(CausalLM(build("Llama"), generation_metrics=["chrf"]), Pairs(decoder=True))
    loops.save_checkpoint(tmp_path / "model.ckpt")
    again = CausalLM.load_from_checkpoint(tmp_path / "model.ckpt", model=build("Llama"))
    assert again.tokenizer is None


def test_tokenizer_in_the_models_place_is_loaded_once(tmp_path: Path) -> None:
    module = CausalLM(save("Llama", tmp_path / "model"))
    assert module.tokenizer is module.tokenizer
    assert len(module.tokenizer) == 15
