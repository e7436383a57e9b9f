"""Virtual tokens in a model's input: what it computes with them, in every kind of model, with every mask and cache."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from lightning_peft import (
    LoRA,
    PEFTError,
    PromptTuning,
    PTuning,
    adapter_per_row,
    disable_adapters,
    inject,
    merge,
    remove,
    set_adapter,
    trainable_parameters,
)
from tests.methods.models import MODELS, NO_DROPOUT, inputs_of
from tests.methods.prefix_models import DECODERS, ENCODERS, ENDS, GROUPED, PREFIXABLE, SEQ2SEQ, SIZES, build, inputs
from tests.methods.prompt_models import N, both_implementations, by_hand, exact, logits, prompt_of, prompted


@both_implementations
@pytest.mark.parametrize("name", PREFIXABLE)
def test_the_input_is_the_prompt_and_the_tokens(name: str, implementation: str) -> None:
    model, tolerance = exact(name, implementation)
    given = inputs(name)
    more = {"decoder_input_ids": given["decoder_input_ids"]} if name in SEQ2SEQ else {}
    with torch.no_grad():
        found, expected = logits(model, **given), by_hand(name, prompt_of(model), given["input_ids"], **more)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    assert (logits(build(name).to(found.dtype), **given) - found).abs().max() > 1e-2


@both_implementations
@pytest.mark.parametrize("name", PREFIXABLE)
def test_padding_behind_the_tokens_changes_nothing(name: str, implementation: str) -> None:
    model, tolerance = exact(name, implementation)
    given, lengths = inputs(name), (7, 4, 2)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    given["input_ids"] = given["input_ids"].masked_fill(~mask, 0)
    with torch.no_grad():
        found = logits(model, **given, attention_mask=mask.long())
        for row, length in enumerate(lengths):
            own = {key: ids[row : row + 1] for key, ids in given.items()} | {
                "input_ids": given["input_ids"][row : row + 1, :length]
            }
            alone = logits(model, **own)[0]
            torch.testing.assert_close(found[row, : len(alone)], alone, atol=tolerance, rtol=tolerance)


@both_implementations
@pytest.mark.parametrize("name", [*DECODERS, "t5"])
def test_padding_before_the_tokens_changes_nothing(name: str, implementation: str) -> None:
    model, tolerance = exact(name, implementation)
    given = inputs(name)
    ids = F.pad(given["input_ids"], (4, 0))
    mask = (ids != 0).long()
    own = {} if name == "t5" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        found = logits(model, **{**given, "input_ids": ids}, attention_mask=mask, **own)
        expected = logits(model, **given)
    torch.testing.assert_close(found[:, -expected.shape[1] :], expected, atol=tolerance, rtol=tolerance)


@both_implementations
@pytest.mark.parametrize("name", PREFIXABLE)
def test_what_may_be_left_out_changes_nothing(name: str, implementation: str) -> None:
    model, tolerance = exact(name, implementation)
    given, body = inputs(name), model.base_model
    expected = logits(model, **given)
    names = inspect.signature(type(build(name)).forward).parameters
    first = 1 if name == "roberta" else 0
    others: list[dict[str, Any]] = [
        {"attention_mask": torch.ones(3, 7, dtype=torch.long)},
        {"attention_mask": torch.ones(3, 7, dtype=torch.bool)},
        {"token_type_ids": torch.zeros(3, 7, dtype=torch.long)},
        {"position_ids": torch.arange(7)[None] + first},
        {"input_ids": None, "inputs_embeds": model.get_input_embeddings()(given["input_ids"])},
    ]
    for other in others:
        if set(other) <= set(names) and not (name == "gpt2" and "token_type_ids" in other):  # which adds words for them
            torch.testing.assert_close(logits(model, **{**given, **other}), expected, atol=tolerance, rtol=tolerance)
    if name not in SEQ2SEQ:
        positional = body(given["input_ids"])[0]
        torch.testing.assert_close(positional, body(**given).last_hidden_state, atol=0, rtol=0)


def test_token_types_are_those_of_the_tokens() -> None:
    model = prompted("bert").double()
    ids, types = inputs("bert")["input_ids"], torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 3)
    expected = by_hand("bert", prompt_of(model), ids, token_type_ids=F.pad(types, (N, 0)))
    torch.testing.assert_close(logits(model, input_ids=ids, token_type_ids=types), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", PREFIXABLE)
@pytest.mark.parametrize("method", [PromptTuning, PTuning])
def test_checkpointed_layers_give_the_same_gradients(method: type[PTuning], name: str) -> None:
    model = inject(build(name), method(num_virtual_tokens=N)).train()
    given = inputs(name)
    weights = torch.randn_like(logits(model, **given))
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        (logits(model, **given) * weights).sum().backward()
        found.append({key: parameter.grad.clone() for key, parameter in trainable_parameters(model).items()})
    plain, again = found
    for key, gradient in plain.items():
        assert gradient.abs().max() > 0, key
        assert (again[key] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), key


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", PREFIXABLE)
def test_rows_have_prompts_of_their_own_lengths(name: str, padded: bool) -> None:
    model = prompted(name)
    inject(model, PromptTuning(num_virtual_tokens=2), adapter_name="short")
    inject(model, PTuning(num_virtual_tokens=3, hidden_size=8), adapter_name="made")
    inject(model, LoRA(r=2), adapter_name="lora")
    names = ["short", None, "default", "made", "lora"]
    given = {key: torch.cat([ids, ids])[:5] for key, ids in inputs(name).items()}
    lengths = [7, 7, 3, 5, 4] if padded else [7] * 5
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
    with adapter_per_row(model, names):
        together = logits(model, **given, **({"attention_mask": mask} if padded else {}))
    for row, (adapter_name, length) in enumerate(zip(names, lengths, strict=True)):
        own = {key: ids[row : row + 1] for key, ids in given.items()}
        own["input_ids"] = own["input_ids"][:, :length]
        set_adapter(model, adapter_name or "short")
        if adapter_name is None:
            with disable_adapters(model):
                alone = logits(model, **own)
        else:
            alone = logits(model, **own)
        torch.testing.assert_close(together[row, : alone.shape[1]], alone[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_all_outputs_have_the_input_s_length_and_so_the_labels(name: str) -> None:
    model = prompted(name)
    ids = inputs(name)["input_ids"]
    output = model(input_ids=ids, labels=ids, output_hidden_states=True)
    assert output.logits.shape == (3, 7, 48)
    assert {state.shape for state in output.hidden_states} == {(3, 7, 32)}
    tokens, labels = (output.logits[:, :-1], ids[:, 1:]) if name == "llama" else (output.logits, ids)
    torch.testing.assert_close(output.loss, F.cross_entropy(tokens.flatten(0, 1), labels.flatten()))
    first = model(input_ids=ids, return_dict=False)[0]
    torch.testing.assert_close(first, output.logits, atol=0, rtol=0)


def test_an_encoder_s_output_keeps_the_prompt_for_its_decoder() -> None:
    model = prompted("t5")
    given = inputs("t5")
    output = model(**given)
    assert output.encoder_last_hidden_state.shape == (3, N + 7, 32)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 7])
    expected = logits(model, **given, attention_mask=mask)
    encoded = model.get_encoder()(input_ids=given["input_ids"], attention_mask=mask)
    given["input_ids"] = None
    torch.testing.assert_close(logits(model, encoder_outputs=encoded, **given, attention_mask=mask), expected)


def test_a_head_on_an_encoder_reads_the_first_virtual_token_and_on_a_decoder_the_last_token() -> None:
    torch.manual_seed(1)
    config = transformers.RobertaConfig(**SIZES, **NO_DROPOUT, **ENDS, max_position_embeddings=32, num_labels=3)
    encoder = transformers.RobertaForSequenceClassification(config).eval()
    ids = inputs("roberta")["input_ids"]
    bare = copy.deepcopy(encoder)
    inject(encoder, PromptTuning(num_virtual_tokens=N, init="random"))
    both = torch.cat([prompt_of(encoder).expand(3, -1, -1), bare.get_input_embeddings()(ids)], dim=1)
    torch.testing.assert_close(logits(encoder, input_ids=ids), logits(bare, inputs_embeds=both))
    decoder = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**GROUPED, num_labels=3)).eval()
    inject(decoder, PromptTuning(num_virtual_tokens=N, init="random"))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 7])
    found = logits(decoder, input_ids=ids * mask, attention_mask=mask)
    torch.testing.assert_close(found[1:2], logits(decoder, input_ids=ids[1:2, :4]))


@pytest.mark.parametrize("name", PREFIXABLE)
def test_class_and_signature_are_the_model_s_own_while_it_is_on_and_after(name: str) -> None:
    model = build(name)
    own, signature, config = type(model), inspect.signature(model.forward), model.config.to_dict()
    expected = logits(model, **inputs(name))
    inject(model, PromptTuning(num_virtual_tokens=N))
    logits(model, **inputs(name))
    for _ in range(2):
        assert type(model) is own
        assert inspect.signature(model.forward) == signature
        assert model.config.to_dict() == config
        remove(model)
    assert torch.equal(logits(model, **inputs(name)), expected)


def test_every_text_model_of_a_module_has_a_prompt() -> None:
    model = nn.ModuleDict({"one": build("llama"), "two": build("bert")})
    inject(model, PromptTuning(num_virtual_tokens=N))
    assert [key for key, _ in trainable_parameters(model).items()] == [
        "one.model.embed_tokens.adapters.default.prompt",
        "two.bert.embeddings.word_embeddings.adapters.default.prompt",
    ]


def test_it_can_not_be_merged() -> None:
    with pytest.raises(PEFTError) as error:
        merge(prompted("llama"))
    assert error.value.faults == (
        "merge: virtual tokens are added to the input, which no weight of the base can hold; keep them as an adapter",
    )


@pytest.mark.parametrize(
    ("name", "given", "fault"),
    [
        (
            "llama",
            {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])},
            "position_ids: they begin anew inside of a row, as where several texts are packed into it, and virtual "
            "tokens stand before the first one alone; use packing=False",
        ),
        (
            "llama",
            {"attention_mask": torch.ones(3, 1, 7, 7, dtype=torch.bool)},
            "attention_mask: LlamaModel was given one for pairs of tokens, which virtual ones can't be added to; give "
            "one of shape (rows, length)",
        ),
        (
            "roberta",
            {"input_ids": torch.ones(1, 27, dtype=torch.long)},
            "27 tokens and 5 virtual ones are more than the model's 31 positions; cut sequences to 26 tokens",
        ),
    ],
)
def test_inputs_that_leave_no_place_for_a_prompt_are_refused(name: str, given: dict[str, Any], fault: str) -> None:
    with pytest.raises(PEFTError) as error:
        logits(prompted(name), **{**inputs(name), **given})
    assert error.value.faults == (fault,)


def test_as_many_tokens_as_there_are_positions_are_taken() -> None:
    for name, limit in (("roberta", 31), ("gpt2", 64)):
        ids = torch.ones(1, limit - N, dtype=torch.long)
        assert logits(prompted(name), input_ids=ids).shape[1] == limit - N


@pytest.mark.parametrize("name", ["vit", "resnet", "linear"])
def test_models_that_read_no_tokens_are_refused(name: str) -> None:
    model = MODELS[name]()
    reads = "" if name == "linear" else "; it reads pixel_values"
    with pytest.raises(PEFTError) as error:
        inject(model, PTuning())
    assert error.value.faults == (
        f"PTuning: {type(model).__name__} has no place for virtual tokens, which stand beside the input embeddings of "
        f"a text model of transformers{reads}",
    )
    assert logits(model, **inputs_of(name)).shape if name != "linear" else True


def test_a_recurrent_model_is_refused() -> None:
    sizes = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    with pytest.raises(PEFTError) as error:
        inject(transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)), PromptTuning())
    assert error.value.faults == (
        "PromptTuning: MambaModel keeps what it has read in cache_params, which does not tell whether virtual tokens "
        "are in it",
    )


def test_a_decoder_that_reads_sounds_has_its_prompt_before_the_text() -> None:
    torch.manual_seed(1)
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
    ends = {**ENDS, "decoder_start_token_id": 2, "vocab_size": 48, "max_source_positions": 8, "num_mel_bins": 6}
    config = transformers.WhisperConfig(**heads, **ends, d_model=32, encoder_layers=1, decoder_layers=1)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    bare, sounds, ids = copy.deepcopy(model), torch.randn(3, 6, 16), inputs("t5")["input_ids"]
    inject(model, PromptTuning(num_virtual_tokens=N, init="random"))
    both = torch.cat([prompt_of(model).expand(3, -1, -1), bare.model.decoder.embed_tokens(ids)], dim=1)
    expected = logits(bare, input_features=sounds, decoder_inputs_embeds=both)[:, N:]
    torch.testing.assert_close(logits(model, input_features=sounds, decoder_input_ids=ids), expected)


def test_what_can_not_stand_on_a_model_is_told() -> None:
    with pytest.raises(PEFTError) as error:
        inject(build("gpt2"), PromptTuning(num_virtual_tokens=64))
    assert error.value.faults == (
        "PromptTuning.num_virtual_tokens: 64 leaves no position for a token; the model has 64",
    )
    with pytest.raises(PEFTError) as error:
        inject(build("llama"), PromptTuning(), modules_to_save=["embed_tokens"])
    assert error.value.faults == (
        "PromptTuning: modules_to_save: model.embed_tokens is trained whole, and virtual tokens stand on it; leave it "
        "out",
    )


def test_encoders_are_all_there() -> None:
    assert {*DECODERS, *ENCODERS, *SEQ2SEQ} == set(PREFIXABLE)


@pytest.mark.slow
def test_compiled_with_padding_it_computes_the_same() -> None:
    model, given = prompted("llama"), inputs("llama")
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0] * 2 + [1] * 5])
    given |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    expected = logits(model, **given)
    torch._dynamo.reset()
    model.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(model, **given), expected)
