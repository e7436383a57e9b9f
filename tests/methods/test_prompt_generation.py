"""Writing with virtual tokens in the input: caches, beams, padding, rows with prompts of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft import PEFTError, PromptTuning, adapter_per_row, disable_adapters, inject, set_adapter
from tests.methods.prefix_models import DECODERS, ENDS, SEQ2SEQ, inputs
from tests.methods.prompt_models import N, both_implementations, by_hand, logits, prompt_of, prompted


def generated(model: nn.Module, **more: Any) -> Tensor:
    return model.generate(do_sample=False, max_new_tokens=6, min_new_tokens=6, **more)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_generate_writes_the_same_with_a_cache_and_with_none(name: str, beams: int) -> None:
    model = prompted(name)
    ids = inputs(name)["input_ids"]
    expected = generated(model, input_ids=ids, num_beams=beams, use_cache=False)
    assert torch.equal(generated(model, input_ids=ids, num_beams=beams), expected)
    with disable_adapters(model):
        assert not torch.equal(generated(model, input_ids=ids, num_beams=beams), expected)
    if beams > 1:
        return
    words = model.get_input_embeddings()(ids)
    assert torch.equal(generated(model, inputs_embeds=words)[:, -6:], expected[:, -6:])
    if name in DECODERS:
        assert torch.equal(generated(model, input_ids=ids, prefill_chunk_size=3), expected)
        manual = ids
        for _ in range(6):
            last = by_hand(name, prompt_of(model), manual)[:, -1:]
            last[..., ENDS["eos_token_id"]] = -torch.inf  # which min_new_tokens rules out
            manual = torch.cat([manual, last.argmax(-1)], dim=1)
        assert torch.equal(manual, expected)


@pytest.mark.parametrize("name", [*DECODERS, "t5"])
def test_padding_on_the_left_changes_nothing_that_is_written(name: str) -> None:
    model = prompted(name)
    ids = inputs(name)["input_ids"]
    padded = F.pad(ids, (4, 0))
    for beams in (1, 3):
        alone = generated(model, input_ids=ids, num_beams=beams)[:, -6:]
        found = generated(model, input_ids=padded, attention_mask=(padded != 0).long(), num_beams=beams)[:, -6:]
        assert torch.equal(found, alone)


@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_a_static_cache_is_used_where_it_has_room_and_else_refused(name: str) -> None:
    model = prompted(name)
    ids = inputs(name)["input_ids"]
    if name in SEQ2SEQ:
        found = generated(model, input_ids=ids, cache_implementation="static")
        assert torch.equal(found, generated(model, input_ids=ids))
        return
    with pytest.raises(PEFTError) as error:
        generated(model, input_ids=ids, cache_implementation="static")
    assert error.value.faults == (
        f"past_key_values: {type(model.base_model).__name__} was given a static cache, whose size and mask leave no "
        "room for virtual tokens; use a dynamic one, which is generate's default",
    )


@both_implementations
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_cache_goes_on_behind_the_prompt(name: str, with_mask: bool, implementation: str) -> None:
    model = prompted(name, implementation)
    ids = inputs(name)["input_ids"]
    whole = logits(model, input_ids=ids)
    masks = [{"attention_mask": torch.ones(3, length)} if with_mask else {} for length in (4, 7)]
    output = model(input_ids=ids[:, :4], use_cache=True, **masks[0])
    assert output.past_key_values.get_seq_length() == N + 4
    rest = model(input_ids=ids[:, 4:], past_key_values=output.past_key_values, **masks[1])
    torch.testing.assert_close(torch.cat([output.logits, rest.logits], dim=1), whole, atol=1e-5, rtol=1e-5)


def test_a_cache_that_was_filled_without_the_prompt_is_refused() -> None:
    model = prompted("llama")
    ids = inputs("llama")["input_ids"]
    with disable_adapters(model):
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(PEFTError) as error:
        model(input_ids=ids[:, :1], past_key_values=cache, attention_mask=torch.ones(3, 8))
    assert error.value.faults == (
        "past_key_values: it holds 7 tokens, and 5 of them are not virtual ones, or are not counted as such; begin "
        "with an empty cache, and go on with it in the same call of generate",
    )
    output = generated(model, input_ids=ids, return_dict_in_generate=True)
    with pytest.raises(PEFTError, match="begin with an empty cache"):  # generate takes all it holds for tokens
        generated(model, input_ids=output.sequences, past_key_values=output.past_key_values)


def test_tokens_that_are_looked_ahead_and_taken_back_leave_the_prompt_in_the_cache() -> None:
    model, ids = prompted("llama"), inputs("llama")["input_ids"][:1].repeat(1, 3)
    assert torch.equal(generated(model, input_ids=ids, prompt_lookup_num_tokens=3), generated(model, input_ids=ids))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_rows_write_with_prompts_of_their_own(name: str) -> None:
    model = inject(prompted(name), PromptTuning(num_virtual_tokens=2), adapter_name="short")
    ids = inputs(name)["input_ids"]
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :3], mask[1, :3] = 0, 0
    names = ["default", "short", None]
    with adapter_per_row(model, names):
        together = generated(model, input_ids=padded, attention_mask=mask)[:, -6:]
    for row, adapter_name in enumerate(names):
        own = ids[row : row + 1, 3 if row == 1 else 0 :]
        set_adapter(model, adapter_name or "short")
        if adapter_name is None:
            with disable_adapters(model):
                alone = generated(model, input_ids=own)
        else:
            alone = generated(model, input_ids=own)
        assert torch.equal(together[row], alone[0, -6:])
    with (
        pytest.raises(PEFTError, match=r"^adapter_per_row: 2 names, but \w+ was given \(3, 7\)"),
        adapter_per_row(model, names[:2]),
    ):
        logits(model, **inputs(name))
