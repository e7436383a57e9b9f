"""How many parameters train, against arithmetic written out by hand: nothing here asks the code under test."""

from __future__ import annotations

import time

import pytest
import torch
import transformers
from torch import nn

from lightning_peft import DoRA, LoRA, inject, trainable_parameters

WIDTH, INNER, LAYERS, WORDS = 4096, 11008, 32, 32000


def llama_7b() -> nn.Module:
    """Llama 2 7B without memory behind it: 6,738,415,616 parameters."""
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in trainable_parameters(model).values())


ALL_LINEAR = LAYERS * (
    4 * 8 * (4096 + 4096)  # q, k, v, o
    + 2 * 8 * (4096 + 11008)  # gate, up
    + 8 * (11008 + 4096)  # down
)
MAGNITUDES = LAYERS * (4 * 4096 + 2 * 11008 + 4096)


def test_the_sums_written_out() -> None:
    assert ALL_LINEAR == 19_988_480
    assert LAYERS * 2 * 8 * (4096 + 4096) == 4_194_304
    assert MAGNITUDES == 1_359_872


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (LoRA(r=8), 19_988_480),
        (LoRA(r=8, target_modules=["q_proj", "v_proj"]), 4_194_304),
        (LoRA(r=64), 8 * 19_988_480),
        (DoRA(r=8), 19_988_480 + 1_359_872),
        (DoRA(r=8, target_modules=["q_proj", "v_proj"]), 4_194_304 + 2 * LAYERS * 4096),
        (LoRA(r=8, target_modules=["embed_tokens", "lm_head"]), 2 * 8 * (32000 + 4096)),
        (
            LoRA(r=8, target_modules=r".*q_proj", rank_pattern={r"layers\.\d\.self_attn\.q_proj": 2}),
            8192 * (10 * 2 + 22 * 8),
        ),
        # layers 0 to 29 are left out
        (LoRA(r=8, target_modules=["q_proj"], exclude_modules=r".*layers\.[12]?\d\..*"), 2 * 8 * 8192),
    ],
)
def test_llama_7b_in_seconds(method: LoRA, expected: int) -> None:
    start = time.perf_counter()
    model = llama_7b()
    base = sum(parameter.numel() for parameter in model.parameters())
    inject(model, method)
    trained = count(model)
    assert time.perf_counter() - start < 20
    assert base == 6_738_415_616
    assert base == 2 * 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    assert trained == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == base + expected
    assert all(
        parameter.is_meta and parameter.dtype == torch.float32 for parameter in trainable_parameters(model).values()
    )


def test_grouped_queries_and_a_saved_head() -> None:
    """Llama 3 8B's attention, where k and v are a quarter as wide, and its head trained whole."""
    config = transformers.LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    inject(model, LoRA(r=16), modules_to_save=["lm_head"])
    per_layer = 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14_336))
    assert 32 * per_layer == 41_943_040
    assert count(model) == 41_943_040 + 128_256 * 4096


def test_experts() -> None:
    """Mixtral 8x7B: eight experts in a layer, each with a rank-4 update of its own on both of its stacked weights."""
    config = transformers.MixtralConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_local_experts=8
    )
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config)
    fields = {"r": 4, "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    plain = 32 * 8 * 4 * ((4096 + 2 * 14_336) + (14_336 + 4096))
    assert count(inject(model, LoRA(**fields))) == plain == 52_428_800
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config)
    assert count(inject(model, DoRA(**fields))) == plain + 32 * 8 * (2 * 14_336 + 4096)


@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_every_kind_of_layer(method: type[LoRA]) -> None:
    layers = {
        "linear": (nn.Linear(10, 7), 4 * (10 + 7), 7),
        "conv1D": (transformers.pytorch_utils.Conv1D(7, 10), 4 * (10 + 7), 7),
        "conv1d": (nn.Conv1d(6, 8, 5), 4 * 6 * 5 + 8 * 4, 8),
        "conv2d": (nn.Conv2d(6, 8, (3, 5)), 4 * 6 * 15 + 8 * 4, 8),
        "conv2d in groups": (nn.Conv2d(6, 8, 3, groups=2), 4 * 3 * 9 + 8 * 2, 8),
        "conv3d": (nn.Conv3d(6, 8, 2), 4 * 6 * 8 + 8 * 4, 8),
        "embedding": (nn.Embedding(50, 12), 4 * (50 + 12), 12),
        "attention": (nn.MultiheadAttention(12, 3), 4 * (12 + 36) + 4 * (12 + 12), 36 + 12),
        "attention of three widths": (
            nn.MultiheadAttention(12, 3, kdim=8, vdim=10),
            4 * (12 + 12) + 4 * (8 + 12) + 4 * (10 + 12) + 4 * (12 + 12),
            4 * 12,
        ),
    }
    for name, (layer, low_rank, rows) in layers.items():
        model = inject(nn.Sequential(layer), method(r=4, target_modules=["0"]))
        assert count(model) == low_rank + (rows if method is DoRA else 0), name


def test_saved_module_counts_once_and_its_original_not() -> None:
    model = nn.ModuleDict({"body": nn.Linear(10, 7), "head": nn.Linear(7, 3), "words": nn.Embedding(20, 10)})
    model["out"] = nn.Linear(10, 20, bias=False)
    model["out"].weight = model["words"].weight
    inject(model, LoRA(r=2, target_modules=["body"]), modules_to_save=["head", "words", "out"])
    # words and out share their weight, and so do their copies
    assert count(model) == 2 * (10 + 7) + (7 * 3 + 3) + 20 * 10
    for init in ("pissa", "olora"):
        model = inject(nn.Sequential(nn.Linear(10, 7)), LoRA(r=2, init=init))
        assert count(model) == 2 * (10 + 7)
