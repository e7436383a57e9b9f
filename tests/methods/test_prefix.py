"""A prefix in attention: what it computes, in every kind of model, with every cache and mask."""

from __future__ import annotations

import copy
import inspect
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from lightning_peft import (
    LoRA,
    PEFTError,
    PrefixTuning,
    PTuningV2,
    adapter_per_row,
    disable_adapters,
    inject,
    merge,
    remove,
    set_adapter,
    trainable_parameters,
)
from lightning_peft.injection import adapters
from lightning_peft.methods._prefix import FreePrefix
from lightning_peft.state import adapter_tensors
from tests.methods.prefix_models import DECODERS, ENCODERS, PREFIXABLE, SEQ2SEQ, build, inputs
from tests.processes import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
N = 5
both_implementations = pytest.mark.parametrize("implementation", ["sdpa", "eager"])


def logits(model: nn.Module, **given: Any) -> Tensor:
    return model(**given).logits


def prefixed(name: str, implementation: str = "sdpa", **fields: Any) -> nn.Module:
    torch.manual_seed(2)
    return inject(build(name, implementation), PTuningV2(**{"num_virtual_tokens": N, **fields}))


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]


@pytest.fixture
def oracle() -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """An attention implementation that goes query by query; it takes the prefixes P_k, P_v (n, heads, width) that are
    put here by the id of the module."""
    tables: dict[int, tuple[Tensor, Tensor]] = {}

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
    ) -> tuple[Tensor, None]:
        prefix_keys, prefix_values = tables[id(module)]
        rows, heads, length, _ = query.shape
        group, bias, scale = heads // key.shape[1], more.get("position_bias"), more["scaling"]
        output = torch.zeros(rows, length, heads, value.shape[-1], dtype=query.dtype)
        for row in range(rows):
            for head in range(heads):
                own = head // group
                keys, values = key[row, own], value[row, own]
                for q in range(length):
                    scores = [float(k @ query[row, head, q]) * scale for k in prefix_keys[:, own]]
                    for k in range(len(keys)):
                        score = float(keys[k] @ query[row, head, q]) * scale
                        score += 0.0 if attention_mask is None else float(attention_mask[row, 0, q, k])
                        scores.append(score + (0.0 if bias is None else float(bias[0, head, q, k])))
                    weights = torch.tensor(softmax(scores), dtype=query.dtype)
                    output[row, q, head] = weights @ torch.cat([prefix_values[:, own], values])
        return output, None

    AttentionInterface.register("oracle", attention)
    AttentionMaskInterface.register("oracle", eager_mask)
    yield tables
    for table in (AttentionInterface, AttentionMaskInterface):
        del table._global_mapping["oracle"]


@both_implementations
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", PREFIXABLE)
def test_every_query_sees_the_prefix_before_its_keys(
    name: str, padded: bool, implementation: str, oracle: dict[int, tuple[Tensor, Tensor]]
) -> None:
    model = prefixed(name, implementation).double()
    plain = build(name).double()
    plain.set_attn_implementation("oracle")
    for path, adapter in adapters(model, "default").items():
        if isinstance(adapter, FreePrefix):
            shape = N, -1, 8
            tables = adapter.prefix_keys.detach().view(shape), adapter.prefix_values.detach().view(shape)
            oracle[id(plain.get_submodule(path))] = tables
    given = {key: ids[:2, :5] for key, ids in inputs(name).items()}
    seen = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    if padded:
        given["attention_mask"] = seen
    # tokens come after the prefix, except in an encoder-decoder
    first = N + 1 if name == "roberta" else N  # which counts from behind its padding index, 0 here
    shifted = {} if name in SEQ2SEQ else {"position_ids": torch.arange(5)[None] + first}
    with torch.no_grad():
        found, expected = logits(model, **given), logits(plain, **given, **shifted)
    rows = seen.bool() if padded and name not in SEQ2SEQ else torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(found[rows], expected[rows], atol=1e-6, rtol=1e-6)
    assert (logits(build(name).double(), **given) - found).abs().max() > 1e-2


@both_implementations
@pytest.mark.parametrize("name", PREFIXABLE)
@pytest.mark.parametrize("method", [PTuningV2, PrefixTuning])
def test_checkpointed_layers_give_the_same_gradients_to_every_prefix(
    method: type[PTuningV2], name: str, implementation: str
) -> None:
    model = inject(build(name, implementation), method(num_virtual_tokens=N)).train()
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
        size = gradient.abs().max()
        assert size > 0, key
        assert (again[key] - gradient).abs().max() <= 1e-5 * size, key


def generated(model: nn.Module, **more: Any) -> Tensor:
    return model.generate(do_sample=False, max_new_tokens=8, min_new_tokens=8, **more)


@both_implementations
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_generate_writes_the_same_with_any_cache_and_with_none(name: str, beams: int, implementation: str) -> None:
    model = prefixed(name, implementation)
    ids = inputs(name)["input_ids"]
    expected = generated(model, input_ids=ids, num_beams=beams, use_cache=False)
    assert torch.equal(generated(model, input_ids=ids, num_beams=beams), expected)
    assert torch.equal(generated(model, input_ids=ids, num_beams=beams, cache_implementation="static"), expected)
    with disable_adapters(model):
        assert not torch.equal(generated(model, input_ids=ids, num_beams=beams), expected)


@both_implementations
@pytest.mark.parametrize("name", [*DECODERS, "t5"])
def test_padding_on_the_left_changes_nothing_that_is_written(name: str, implementation: str) -> None:
    model = prefixed(name, implementation)
    ids = inputs(name)["input_ids"]
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), ids], dim=1)
    for more in ({}, {"cache_implementation": "static"}):
        alone = generated(model, input_ids=ids, **more)[:, -8:]
        found = generated(model, input_ids=padded, attention_mask=(padded != 0).long(), **more)[:, -8:]
        assert torch.equal(found, alone)


@both_implementations
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_no_cache_holds_the_prefix(name: str, implementation: str) -> None:
    model = prefixed(name, implementation)
    ids = inputs(name)["input_ids"]
    whole = logits(model, input_ids=ids)
    output = model(input_ids=ids[:, :4], use_cache=True)
    assert output.past_key_values.get_seq_length() == 4
    rest = model(input_ids=ids[:, 4:], past_key_values=output.past_key_values)
    torch.testing.assert_close(rest.logits, whole[:, 4:], atol=1e-5, rtol=1e-5)
    static = transformers.StaticCache(config=model.config, max_cache_len=ids.shape[1])
    first = model(input_ids=ids[:, :4], past_key_values=static)
    torch.testing.assert_close(first.logits, whole[:, :4], atol=1e-5, rtol=1e-5)
    rest = model(input_ids=ids[:, 4:], past_key_values=static)
    torch.testing.assert_close(rest.logits, whole[:, 4:], atol=1e-5, rtol=1e-5)


@both_implementations
@pytest.mark.parametrize("name", PREFIXABLE)
def test_a_mask_of_ones_is_as_no_mask(name: str, implementation: str) -> None:
    model = prefixed(name, implementation)
    given = inputs(name)
    expected = logits(model, **given)
    for key in [key for key in ("input_ids", "decoder_input_ids") if key in given]:
        mask = {key.replace("input_ids", "attention_mask"): torch.ones_like(given[key])}
        torch.testing.assert_close(logits(model, **given, **mask), expected, atol=1e-6, rtol=1e-6)
    if name in DECODERS:
        causal = torch.ones(7, 7, dtype=torch.bool).tril()[None, None].expand(3, 1, 7, 7)
        mask = causal if implementation == "sdpa" else torch.zeros(3, 1, 7, 7).masked_fill(~causal, -1e9)
        if name != "gemma3":  # whose layers have two kinds of mask
            torch.testing.assert_close(logits(model, **given, attention_mask=mask), expected, atol=1e-6, rtol=1e-6)


@both_implementations
@pytest.mark.parametrize("name", ["llama", "gpt2", "modernbert", "t5"])
def test_rows_see_prefixes_of_their_own_lengths(name: str, implementation: str) -> None:
    model = prefixed(name, implementation)
    inject(model, PTuningV2(num_virtual_tokens=2), adapter_name="short")
    inject(model, PrefixTuning(num_virtual_tokens=3, hidden_size=8), adapter_name="made")
    with torch.no_grad():
        for adapter in adapters(model, "made").values():
            for parameter in adapter.parameters():
                parameter += torch.randn_like(parameter)
    inject(model, LoRA(r=2), adapter_name="lora")
    names = ["short", None, "default", "made", "lora"]
    given = {key: torch.cat([ids, ids])[:5] for key, ids in inputs(name).items()}
    alone = []
    for row, adapter_name in enumerate(names):
        own = {key: ids[row : row + 1] for key, ids in given.items()}
        set_adapter(model, adapter_name or "short")
        if adapter_name is None:
            with disable_adapters(model):
                alone.append(logits(model, **own))
        else:
            alone.append(logits(model, **own))
    with adapter_per_row(model, names):
        together = logits(model, **given)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert (together[0] - together[2]).abs().max() > 1e-2


@pytest.mark.parametrize("name", PREFIXABLE)
def test_class_signature_and_config_are_the_model_s_own_while_it_is_on_and_after(name: str) -> None:
    model = build(name)
    own, signature, config = type(model), inspect.signature(model.forward), model.config.to_dict()
    attention = [module.config for module in model.modules() if hasattr(module, "config")]
    inject(model, PTuningV2(num_virtual_tokens=N))
    logits(model, **inputs(name))
    for _ in range(2):
        assert type(model) is own
        assert inspect.signature(model.forward) == signature
        assert model.config.to_dict() == config
        assert all(
            module.config is before
            for module, before in zip(
                [module for module in model.modules() if hasattr(module, "config")], attention, strict=True
            )
        )
        remove(model)


def test_a_fault_inside_of_attention_leaves_the_config_as_it_was() -> None:
    model = prefixed("llama")
    with pytest.raises(RuntimeError):
        model(input_ids=torch.ones(2, 3, dtype=torch.long), attention_mask=torch.ones(2, 1, 3, 9, dtype=torch.bool))
    assert model.model.layers[0].self_attn.config is model.config


def test_another_implementation_that_is_set_later_is_refused_when_it_runs() -> None:
    model = prefixed("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(PEFTError) as error:
        logits(model, input_ids=torch.ones(1, 3, dtype=torch.long))
    assert str(error.value) == (
        "LlamaAttention: its mask under 'flash_attention_2' can't be widened for a prefix; call "
        "model.set_attn_implementation('sdpa') before"
    )


def test_attention_s_weights_count_the_prefix_s_keys() -> None:
    model = prefixed("llama", "eager")
    weights = model(input_ids=inputs("llama")["input_ids"], output_attentions=True).attentions
    assert [tuple(layer.shape) for layer in weights] == [(3, 4, 7, N + 7)] * 2
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(3, 4, 7))
    assert weights[0][..., :N].min() > 0
    assert weights[0][..., 0, N + 1 :].max() == 0


def test_labels_are_as_long_as_the_tokens() -> None:
    model = prefixed("gpt2")
    ids = inputs("gpt2")["input_ids"]
    output = model(input_ids=ids, labels=ids)
    expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


def test_a_prefix_can_not_be_merged() -> None:
    model = prefixed("llama")
    with pytest.raises(PEFTError, match=r"^merge: a prefix adds keys and values to attention, which no weight"):
        merge(model)


@pytest.mark.slow
def test_a_pickled_model_runs_in_a_new_process(tmp_path: Path) -> None:
    model = prefixed("llama")
    given = inputs("llama")
    torch.save((model, given, logits(model, **given)), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, given, expected = torch.load(sys.argv[1], weights_only=False); "
        "assert torch.equal(model(**given).logits, expected)"
    )
    run_ranks(tmp_path, ["-c", code, tmp_path / "model.pt"], count=1)


def test_the_layers_of_one_mlp_share_its_first_half_and_nothing_else() -> None:
    model = inject(build("llama"), PrefixTuning(num_virtual_tokens=N, hidden_size=1200))
    first, second = (layer.self_attn.adapters["default"] for layer in model.model.layers)
    shared = ("prefix_embedding", "hidden_weight", "hidden_bias")
    assert all(getattr(first, name) is getattr(second, name) for name in shared)
    assert first.output_weight is not second.output_weight
    expected = torch.tanh(first.prefix_embedding @ first.hidden_weight.T + first.hidden_bias)
    keys, values = (expected @ first.output_weight.T + first.output_bias).chunk(2, dim=1)
    torch.testing.assert_close(first.tables(), (keys, values))
    saved = io.BytesIO()
    torch.save(adapter_tensors(model, "default"), saved)
    unique = sum(parameter.nbytes for parameter in trainable_parameters(model).values())
    assert saved.tell() < unique + 6000  # names, and what a zip file needs
    copied = copy.deepcopy(model)
    assert copied.model.layers[0].self_attn.adapters["default"].hidden_weight is (
        copied.model.layers[1].self_attn.adapters["default"].hidden_weight
    )


def test_the_mlp_learns_more_slowly_than_what_stands_beside_it() -> None:
    model = inject(build("llama"), PrefixTuning(num_virtual_tokens=N), modules_to_save=["lm_head"])
    factors = PrefixTuning().learning_rate_factors(adapters(model, "default"))
    head = {"lm_head.adapters.default.weight"}
    assert {name for name, p in trainable_parameters(model).items() if p not in factors} == head
    assert set(factors.values()) == {0.03}
    assert len(factors) == 3 + 2 * 2
    free = inject(build("llama"), PrefixTuning(reparameterize=False))
    assert PrefixTuning().learning_rate_factors(adapters(free, "default")) == {}


def test_encoders_of_images_take_a_prefix_too() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=16, patch_size=8))
    inject(vit, PTuningV2(num_virtual_tokens=N))
    output = logits(vit, pixel_values=torch.randn(2, 3, 16, 16))
    (output * torch.randn_like(output)).sum().backward()
    assert len(adapters(vit, "default")) == 2
    assert all(parameter.grad.abs().max() > 0 for parameter in trainable_parameters(vit).values())


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_s_adapters_are_trained_in_fp32_over_bf16(name: str) -> None:
    model = inject(build(name).bfloat16(), PTuningV2(num_virtual_tokens=N))
    output = logits(model, **inputs(name))
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert {(p.dtype, p.grad.dtype) for p in trainable_parameters(model).values()} == {(torch.float32, torch.float32)}
