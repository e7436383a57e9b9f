"""Prompt tuning: where the prompt starts, what its fields must be, and what it adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from lightning_peft import PEFTError, PromptTuning, PTuning, inject, trainable_parameters
from lightning_peft.injection import adapters
from lightning_peft.methods._prompts import FreePrompt
from tests.methods.prefix_models import ENDS, SIZES, build, inputs
from tests.methods.test_parameter_counts import count, llama_7b

WORDS = {word: 10 + index for index, word in enumerate(["is", "this", "review", "good", "or", "bad"])}


def prompt_of(model: nn.Module) -> Tensor:
    (prompt,) = (found for found in adapters(model, "default").values() if isinstance(found, FreePrompt))
    return prompt.prompt


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """The folder of a tokenizer that knows six words."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, **WORDS}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


def test_a_prompt_from_the_vocabulary_is_made_of_its_embeddings() -> None:
    model = build("llama")
    rows = model.get_input_embeddings().weight
    prompt = prompt_of(inject(model, PromptTuning()))
    assert prompt.shape == (20, 32)
    where = torch.cdist(prompt, rows).argmin(1)
    assert torch.equal(prompt, rows[where])
    assert len(where.unique()) > 5


def test_a_prompt_at_random_is_from_a_standard_normal() -> None:
    torch.manual_seed(0)
    prompt = prompt_of(inject(build("llama"), PromptTuning(num_virtual_tokens=500, init="random")))
    assert abs(prompt.mean()) < 0.05
    assert abs(prompt.std() - 1) < 0.05


@pytest.mark.parametrize(
    ("n", "expected"), [(4, [10, 11, 12, 13]), (6, [10, 11, 12, 13, 14, 15]), (8, [10, 11, 12, 13, 14, 15, 10, 11])]
)
def test_a_text_is_cut_or_repeated(n: int, expected: list[int], tokenizer: str) -> None:
    method = PromptTuning(
        num_virtual_tokens=n, init="text", init_text="is this review good or bad", tokenizer=tokenizer
    )
    model = build("gpt2")
    prompt = prompt_of(inject(model, method))
    assert torch.equal(prompt, model.get_input_embeddings().weight[expected])


def test_a_scaled_embedding_is_scaled_once() -> None:
    model = build("gemma3")
    prompt = prompt_of(inject(model, PromptTuning(num_virtual_tokens=30)))
    scaled = model.get_input_embeddings().weight * 32**0.5
    assert (prompt[:, None] - scaled).abs().amax(-1).min(1).values.max() < 1e-5


def test_a_checkpoint_does_not_need_the_tokenizer(tokenizer: str) -> None:
    method = PromptTuning(num_virtual_tokens=4, init="text", init_text="good", tokenizer=tokenizer)
    assert PromptTuning(**method.fields()) == PromptTuning(num_virtual_tokens=4)
    assert PromptTuning(init="random").fields()["init"] == "random"


def test_what_is_wrong_with_a_text_is_told_when_it_is_injected(tokenizer: str, tmp_path: Path) -> None:
    def fault(model: nn.Module, **fields: Any) -> str:
        with pytest.raises(PEFTError) as error:
            inject(model, PromptTuning(**{"init": "text", "init_text": "good", "tokenizer": tokenizer, **fields}))
        (only,) = error.value.faults
        return only

    model = build("llama")
    missing = str(tmp_path / "nowhere")
    assert fault(model, tokenizer=missing).startswith(f"PromptTuning.tokenizer: {missing!r} can't be loaded (")
    assert fault(model, init_text="  ") == "PromptTuning.init_text: '  ' has no token"
    few = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **ENDS, "vocab_size": 12}))
    assert fault(few) == (
        f"PromptTuning.tokenizer: {tokenizer!r} has a token 13, and the model has 12; give the model's own tokenizer"
    )
    assert not trainable_parameters(model).keys() & {"model.embed_tokens.adapters.default.prompt"}


@pytest.mark.parametrize(
    ("fields", "faults"),
    [
        ({"num_virtual_tokens": 0}, ["num_virtual_tokens: 0 is no number of them; at least 1"]),
        ({"num_virtual_tokens": 2.5}, ["num_virtual_tokens: 2.5 is no number of them; at least 1"]),
        ({"init": "rand"}, ["init: 'rand' is none of vocabulary, text, random; did you mean 'random'?"]),
        ({"init": "text"}, ["init_text: init 'text' needs it", "tokenizer: init 'text' needs it"]),
        (
            {"init_text": "good", "num_virtual_tokens": -1},
            [
                "num_virtual_tokens: -1 is no number of them; at least 1",
                "init_text: 'good' is of no use with init 'vocabulary'; give init 'text' with it",
            ],
        ),
    ],
)
def test_wrong_fields_are_told_with_their_rule(fields: dict[str, Any], faults: list[str]) -> None:
    with pytest.raises(PEFTError) as error:
        PromptTuning(**fields)
    assert error.value.faults == tuple(f"PromptTuning.{fault}" for fault in faults)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (PromptTuning(), 20 * 4096),
        (PromptTuning(num_virtual_tokens=100, init="random"), 100 * 4096),
        (PTuning(hidden_size=128), 20 * 4096 + 4096 * 128 + 128 + 128 * 128 + 128 + 128 * 4096 + 4096),
        (PTuning(), 20 * 4096 + 3 * (4096 * 4096 + 4096)),
        (
            # four gates, two directions, two layers, and two biases each
            PTuning(hidden_size=64, encoder="lstm"),
            20 * 4096
            + 2 * 4 * 64 * (4096 + 64 + 2)
            + 2 * 4 * 64 * (2 * 64 + 64 + 2)
            + (128 * 128 + 128)
            + (128 * 4096 + 4096),
        ),
    ],
)
def test_llama_7b(method: PromptTuning | PTuning, expected: int) -> None:
    model = inject(llama_7b(), method)
    assert count(model) == expected
    assert all(p.is_meta and p.dtype == torch.float32 for p in trainable_parameters(model).values())


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
@pytest.mark.parametrize("method", [PromptTuning(num_virtual_tokens=5), PTuning(num_virtual_tokens=5, encoder="lstm")])
def test_it_learns(name: str, method: PromptTuning | PTuning) -> None:
    torch.manual_seed(0)
    model = inject(build(name), method).train()
    given, goal = inputs(name), torch.zeros(3, dtype=torch.long)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.1)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(**given).logits[:, -1], goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
