"""Where prefixes go, what their fields may be, how many parameters they have, and where positions begin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_peft import PEFTError, PrefixTuning, PTuningV2, inject, trainable_parameters
from lightning_peft.injection import adapters
from lightning_peft.methods._prefix import IMPLEMENTATION, FreePrefix, is_attention, key_shape
from lightning_peft.methods._prefix_targets import PositionShift
from tests.methods.models import MODELS
from tests.methods.prefix_models import ENDS, GROUPED, SIZES, build, inputs
from tests.methods.test_parameter_counts import count, llama_7b

METHODS = (PTuningV2, PrefixTuning)
every_method = pytest.mark.parametrize("method", METHODS)


def kinds(model: nn.Module, kind: type) -> list[str]:
    return [path for path, adapter in adapters(model, "default").items() if isinstance(adapter, kind)]


def faults_of(make: Callable[[], Any]) -> tuple[str, ...]:
    with pytest.raises(PEFTError) as error:
        make()
    return error.value.faults


@every_method
def test_wrong_fields_are_told_at_once(method: type[PTuningV2]) -> None:
    name = method.__name__
    assert faults_of(lambda: method(num_virtual_tokens=0, target_modules=[], exclude_modules="(")) == (
        f"{name}.num_virtual_tokens: 0 is no number of them; at least 1",
        f"{name}.target_modules: is empty; name attention modules, or leave it out for all of them",
        f"{name}.exclude_modules: '(' is not a regular expression (missing ), unterminated subpattern at position 0)",
    )
    assert faults_of(lambda: method(num_virtual_tokens=2.5, target_modules="*")) == (  # type: ignore[arg-type]
        f"{name}.num_virtual_tokens: 2.5 is no number of them; at least 1",
        f"{name}.target_modules: '*' is not a regular expression (nothing to repeat at position 0)",
    )


def test_a_hidden_size_that_is_none_is_told() -> None:
    assert faults_of(lambda: PrefixTuning(hidden_size=0)) == (
        "PrefixTuning.hidden_size: 0 is not a width; it must be 1 or more",
    )


def test_defaults_are_the_papers() -> None:
    assert (PTuningV2().num_virtual_tokens, PrefixTuning().num_virtual_tokens) == (20, 30)
    assert (PrefixTuning().reparameterize, PrefixTuning().hidden_size) == (True, 512)


LAYERS = [f"model.layers.{layer}.self_attn" for layer in range(2)]
T5 = [f"encoder.block.{layer}.layer.0.SelfAttention" for layer in range(2)] + [
    f"decoder.block.{layer}.layer.{part}" for layer in range(2) for part in ("0.SelfAttention", "1.EncDecAttention")
]


@every_method
@pytest.mark.parametrize(
    ("name", "fields", "paths"),
    [
        ("llama", {}, LAYERS),
        ("llama", {"target_modules": ["layers.1.self_attn"]}, LAYERS[1:]),
        ("llama", {"target_modules": r".*attn"}, LAYERS),
        ("llama", {"exclude_modules": ["layers.0.self_attn"]}, LAYERS[1:]),
        ("t5", {}, T5),
        ("t5", {"target_modules": ["EncDecAttention"]}, [T5[3], T5[5]]),
        ("bert", {}, [f"bert.encoder.layer.{layer}.attention.self" for layer in range(2)]),
    ],
)
def test_what_patterns_mean(method: type[PTuningV2], name: str, fields: dict[str, Any], paths: list[str]) -> None:
    model = inject(build(name), method(num_virtual_tokens=3, **fields))
    assert [path for path in adapters(model, "default") if path not in kinds(model, PositionShift)] == paths


@every_method
@pytest.mark.parametrize(
    ("name", "fields", "faults"),
    [
        (
            "llama",
            {"target_modules": ["self_atn"]},
            ["target_modules: 'self_atn' matches nothing; did you mean 'self_attn'?"],
        ),
        (
            "llama",
            {"target_modules": ["q_proj", "zzz"]},
            [
                "target_modules: 'q_proj' matches model.layers.0.self_attn.q_proj, a Linear that calls no attention "
                "function of transformers, which can not be adapted; names that can be: self_attn",
                "target_modules: 'zzz' matches nothing; names that can be: self_attn",
            ],
        ),
        (
            "llama",
            {"exclude_modules": ["self_attn"]},
            ["target_modules: all that '.*' matches is left out by exclude_modules or modules_to_save"],
        ),
        (
            "resnet",
            {},
            ["target_modules: ResNetForImageClassification has no attention that can take a prefix"],
        ),
        (
            "attention",
            {},
            [
                "target_modules: Toy has no attention that can take a prefix; MultiheadAttention computes it without "
                "transformers' attention functions"
            ],
        ),
    ],
)
def test_what_can_not_be_is_told(method: type[PTuningV2], name: str, fields: dict[str, Any], faults: list[str]) -> None:
    model = MODELS[name]()
    keys = [*model.state_dict()]
    assert faults_of(lambda: inject(model, method(**fields))) == tuple(f"{method.__name__}.{f}" for f in faults)
    assert [*model.state_dict()] == keys


def test_attention_that_is_fused_away_is_refused_once_for_all_layers() -> None:
    model = build("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert faults_of(lambda: inject(model, PTuningV2())) == (
        "PTuningV2.target_modules: model.layers.0.self_attn: its mask under 'flash_attention_2' can't be widened for a "
        "prefix; call model.set_attn_implementation('sdpa') before",
    )


class Heads(nn.Module):
    """Attention by its looks, of which nothing tells how wide its heads are."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.k_proj = nn.Linear(8, 8)

    forward = transformers.models.llama.modeling_llama.LlamaAttention.forward


def test_attention_of_unknown_shape_is_refused() -> None:
    model = nn.ModuleDict({"attention": Heads(build("llama").config)})
    assert faults_of(lambda: inject(model, PTuningV2())) == (
        "PTuningV2.target_modules: attention: Heads has none of head_dim, attention_head_size, key_value_proj_dim, "
        "head_size, and so the width of its keys is not known",
    )


GPT2 = {**ENDS, "vocab_size": 48, "n_embd": 32, "n_layer": 1, "n_head": 4}
SHAPES: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, int, int]]]] = {
    "grouped": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)), [(2, 8, 8)] * 2),
    "fused": (
        lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**SIZES, **ENDS, num_key_value_heads=2)),
        [(2, 8, 8)] * 2,
    ),
    "fused by heads": (lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES)), [(4, 8, 8)] * 2),
    "one head of keys": (
        lambda: transformers.GPTBigCodeForCausalLM(transformers.GPTBigCodeConfig(**GPT2)), [(1, 8, 8)]
    ),
    "cross-attention of GPT-2": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, add_cross_attention=True)), [(4, 8, 8)] * 2
    ),
    "latent": (
        lambda: transformers.DeepseekV3ForCausalLM(
            transformers.DeepseekV3Config(
                **SIZES, **ENDS, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
                qk_nope_head_dim=8, v_head_dim=6, first_k_dense_replace=2, moe_intermediate_size=16, n_routed_experts=4,
            )
        ),
        [(4, 12, 6)] * 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SHAPES)
def test_the_shape_of_keys_is_told_and_is_the_one_that_runs(kind: str) -> None:
    make, shapes = SHAPES[kind]
    model = make()
    assert [tuple(key_shape(module)) for module in model.modules() if is_attention(module)] == shapes
    inject(model, PTuningV2(num_virtual_tokens=3))
    ids = inputs("llama")["input_ids"]
    crossed = {"encoder_hidden_states": torch.randn(3, 4, 32)} if kind.startswith("cross") else {}
    model(input_ids=ids, **crossed).logits.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in trainable_parameters(model).values())


def test_a_prefix_that_does_not_fit_the_keys_says_both_shapes() -> None:
    model = inject(build("llama"), PTuningV2(num_virtual_tokens=3))
    adapter = model.model.layers[0].self_attn.adapters["default"]
    adapter.shape = adapter.shape._replace(heads=4, key_width=4, value_width=4)
    assert faults_of(lambda: model(**inputs("llama"))) == (
        "LlamaAttention: the prefix's keys (rows, heads, tokens, width) are (1, 4, 3, 4), and can't stand before keys "
        "(3, 2, 7, 8)",
    )


@every_method
@pytest.mark.parametrize("n", [1, 20])
def test_llama_7b(method: type[PTuningV2], n: int) -> None:
    model = inject(llama_7b(), method(num_virtual_tokens=n))
    free = 32 * 2 * n * 4096
    mlp = n * 4096 + (4096 * 512 + 512) + 32 * (512 * 2 * 4096 + 2 * 4096)
    assert count(model) == (free if method is PTuningV2 else mlp)
    assert {(p.device.type, p.dtype) for p in trainable_parameters(model).values()} == {("meta", torch.float32)}


def test_counts_written_out() -> None:
    assert count(inject(llama_7b(), PTuningV2())) == 5_242_880
    assert count(inject(llama_7b(), PrefixTuning())) == 136_700_416
    assert count(inject(llama_7b(), PrefixTuning(reparameterize=False))) == 7_864_320
    assert count(inject(llama_7b(), PTuningV2(target_modules=r".*layers\.[0-3]\.self_attn"))) == 5_242_880 // 8


def test_the_start_is_normal_and_the_mlp_s_as_torch_has_it() -> None:
    free = inject(build("llama"), PTuningV2(num_virtual_tokens=2000))
    for adapter in adapters(free, "default").values():
        for table in adapter.parameters():
            assert abs(table.mean()) < 0.02
            assert abs(table.std() - 1) < 0.02
    made = inject(build("llama"), PrefixTuning(num_virtual_tokens=2000, hidden_size=64))
    adapter = made.model.layers[0].self_attn.adapters["default"]
    assert abs(adapter.prefix_embedding.std() - 1) < 0.02
    for tensor, bound in ((adapter.hidden_weight, 16**-0.5), (adapter.output_weight, 64**-0.5)):
        assert tensor.abs().max() <= bound
        assert abs(tensor.std() - bound / 3**0.5) < 0.05 * bound


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("llama", ["model.rotary_emb"]),
        ("gpt2", ["transformer.wpe"]),
        ("bert", ["bert.embeddings.position_embeddings"]),
        ("modernbert", ["model.rotary_emb"]),
        ("t5", []),
        ("bart", []),
    ],
)
def test_positions_are_shifted_where_hf_peft_s_are(name: str, paths: list[str]) -> None:
    model = inject(build(name), PTuningV2(num_virtual_tokens=3))
    assert kinds(model, PositionShift) == paths


@pytest.mark.parametrize(("name", "limit"), [("gpt2", 64), ("bert", 512), ("roberta", 31)])
def test_sequences_that_leave_no_position_for_the_prefix_are_refused(name: str, limit: int) -> None:
    model = inject(build(name), PTuningV2(num_virtual_tokens=4))
    model(input_ids=torch.full((1, limit - 4), 7))
    assert faults_of(lambda: model(input_ids=torch.full((1, limit - 3), 7))) == (
        f"{limit - 3} tokens and 4 virtual ones are more than the model's {limit} positions; cut sequences to "
        f"{limit - 4} tokens",
    )
    assert faults_of(lambda: inject(build(name), PTuningV2(num_virtual_tokens=limit))) == (
        f"PTuningV2.num_virtual_tokens: {limit} leaves no position for a token; the model has {limit}",
    )


@every_method
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(names=st.lists(st.text(max_size=12), min_size=1, max_size=3, unique=True))
def test_garbage_names_are_refused_each_by_its_name(method: type[PTuningV2], names: list[str]) -> None:
    faults = faults_of(lambda: inject(MODELS["llama"](), method(target_modules=names)))
    assert len(faults) == len(names)
    for garbage, fault in zip(names, faults, strict=True):
        assert fault.startswith(f"{method.__name__}.target_modules: {garbage!r} matches ")


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(n=st.integers(1, 9), rows=st.integers(1, 3), length=st.integers(1, 7))
def test_any_number_of_tokens_and_rows(n: int, rows: int, length: int) -> None:
    model = inject(build("llama"), PTuningV2(num_virtual_tokens=n))
    output = model(input_ids=torch.full((rows, length), 5)).logits
    assert output.shape == (rows, length, 48)
    assert all(
        adapter.prefix_keys.shape == (n, 16)
        for adapter in adapters(model, "default").values()
        if isinstance(adapter, FreePrefix)
    )


def test_transformers_has_what_a_prefix_needs() -> None:
    """Attention's forward looks up `ALL_ATTENTION_FUNCTIONS` of its module, and falls back on an eager one there."""
    inject(build("llama"), PTuningV2())
    assert IMPLEMENTATION in transformers.AttentionInterface().valid_keys()
    assert IMPLEMENTATION not in transformers.AttentionMaskInterface().valid_keys()
    for name in ("bert", "gpt2", "t5", "llama", "vit"):
        assert sum(is_attention(module) for module in MODELS[name]().modules()) >= 2
