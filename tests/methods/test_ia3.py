"""(IA)³: the formula written out, what is scaled where nothing is named, and the same training and files as HF peft."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from lightning_peft import IA3, PEFTError, inject, merge, trainable_parameters, unmerge
from lightning_peft.injection import adapters
from lightning_peft.methods._ia3_layers import LayerScaling
from tests.methods.models import MODELS, TINY
from tests.methods.test_parameter_counts import count, llama_7b

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "linear": (lambda: nn.Linear(6, 5), (3, 4, 6), 6, 5),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (3, 6), 6, 5),
    "conv1D": (lambda: Conv1D(5, 6), (3, 4, 6), 6, 5),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 9), 4, 6),
    "conv2d reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 6), 4, 6),
    "conv2d in groups": (lambda: nn.Conv2d(6, 9, (3, 1), groups=3, dilation=2), (2, 6, 7, 6), 6, 9),
    "conv2d without batch": (lambda: nn.Conv2d(4, 6, 3, bias=False), (4, 7, 6), 4, 6),
    "depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4, padding="same"), (2, 4, 7), 4, 8),
    "conv3d": (lambda: nn.Conv3d(3, 5, (2, 3, 1)), (2, 3, 4, 5, 3), 3, 5),
}


def on_one(layer: nn.Module, on_input: bool = False) -> nn.Module:
    """The layer in a model of its own, its vectors away from 1."""
    method = IA3(target_modules=["0"], feedforward_modules=["0"] if on_input else [])
    return moved(inject(nn.Sequential(layer), method))


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def by_channel(vector: Tensor, layer: nn.Module) -> Tensor:
    """The vector in the shape that multiplies the layer's inputs or outputs, without a batch."""
    return vector.reshape(-1, *[1] * (layer.weight.dim() - 2 if isinstance(layer, nn.modules.conv._ConvNd) else 0))


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_the_bare_layer_between_products(name: str, on_input: bool) -> None:
    make, shape, features_in, features_out = LAYERS[name]
    base = make().double()
    model = on_one(copy.deepcopy(base), on_input)
    (vector,) = trainable_parameters(model).values()
    assert vector.shape == ((1, features_in) if on_input else (features_out, 1))
    x, same_x = (torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(2))
    with torch.no_grad():
        same_x.copy_(x)
    y = model(x)
    scale = by_channel(vector, base)
    expected = base(same_x * scale) if on_input else base(same_x) * scale
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(out, [i, vector], grad) for out, i in ((y, x), (expected, same_x)))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    merge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    unmerge(model)
    assert all(
        torch.equal(ours, own)
        for ours, own in zip(model[0]._parameters.values(), base._parameters.values(), strict=True)
        if own is not None
    )
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("kdim", [None, 6])
def test_attention_scales_its_keys_and_values(kdim: int | None) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True, kdim=kdim, vdim=kdim, add_bias_kv=True).double()
    nn.init.normal_(layer.in_proj_bias)
    base = copy.deepcopy(layer)
    model = on_one(layer)
    l_k, l_v = (p.flatten() for p in trainable_parameters(model).values())
    q, kv = torch.randn(3, 5, 8).double(), torch.randn(3, 4, kdim or 8).double()

    def attention() -> Tensor:
        if kdim is None:
            weights = base.in_proj_weight.chunk(3)
        else:
            weights = (base.q_proj_weight, base.k_proj_weight, base.v_proj_weight)
        query, key, value = (
            F.linear(x, W, b) for x, W, b in zip((q, kv, kv), weights, base.in_proj_bias.chunk(3), strict=True)
        )
        key = torch.cat([key, base.bias_k.expand(3, -1, -1)], 1) * l_k
        value = torch.cat([value, base.bias_v.expand(3, -1, -1)], 1) * l_v
        heads = [x.unflatten(-1, (2, 4)).transpose(1, 2) for x in (query, key, value)]
        return base.out_proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))

    y = layer(q, kv, kv)[0]
    expected = attention()
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(y)
    vectors = list(trainable_parameters(model).values())
    found, wanted = (torch.autograd.grad(output, vectors, grad) for output in (y, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
        assert one.abs().min() > 0
    merge(model)
    torch.testing.assert_close(layer(q, kv, kv)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("on_input", [False, True])
def test_an_attention_s_output_layer_is_scaled_though_it_is_never_called(on_input: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    base = copy.deepcopy(attention)
    method = IA3(target_modules=["out_proj"], feedforward_modules=["out_proj"] if on_input else [])
    model = moved(inject(nn.ModuleDict({"attention": attention}), method))
    (vector,) = trainable_parameters(model).values()
    out = base.out_proj
    scaled = {"out_proj.weight": out.weight * vector, "out_proj.bias": out.bias * (1 if on_input else vector.flatten())}
    x = torch.randn(3, 5, 8).double()
    expected = functional_call(base, scaled, (x, x, x))[0]
    torch.testing.assert_close(attention(x, x, x)[0], expected, rtol=1e-12, atol=1e-12)
    merge(model)
    torch.testing.assert_close(attention(x, x, x)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_input", [False, True])
def test_outputs_at_the_start_are_the_base_s_bit_for_bit(on_input: bool, dtype: torch.dtype) -> None:
    layer = nn.Linear(64, 64).to(dtype)
    x = torch.randn(32, 64).to(dtype)
    expected = layer(x)
    model = inject(nn.Sequential(layer), IA3(target_modules=["0"], feedforward_modules=["0"] if on_input else []))
    assert torch.equal(model(x), expected)
    assert next(iter(trainable_parameters(model).values())).dtype == torch.float32


def test_a_change_that_bf16_can_not_hold_beside_1_still_acts() -> None:
    layer = nn.Linear(64, 64).bfloat16()
    x = torch.randn(512, 64).bfloat16()
    base = layer(x).double()
    model = inject(nn.Sequential(layer), IA3(target_modules=["0"]))
    (vector,) = trainable_parameters(model).values()
    with torch.no_grad():
        vector.fill_(1.003)
    assert vector.bfloat16()[0, 0] == 1
    assert (model(x).double().abs().sum() / base.abs().sum()).item() == pytest.approx(1.003, abs=5e-4)


@pytest.mark.parametrize("on_input", [False, True])
def test_nothing_is_kept_for_the_backward_pass_but_what_is_scaled(on_input: bool) -> None:
    model = on_one(nn.Linear(48, 80).bfloat16(), on_input)
    x = torch.randn(100, 48).bfloat16()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert model(x).dtype == torch.bfloat16
    once = 100 * (48 if on_input else 80) * 2
    weight, vector = 48 * 80 * 2, 80 * 2
    assert sum(kept.values()) <= once + weight + vector


def test_an_input_that_is_given_by_name_is_scaled() -> None:
    model = on_one(nn.Linear(6, 5), on_input=True)
    x = torch.randn(3, 6)
    assert torch.equal(model[0](input=x), model[0](x))


@pytest.mark.slow
def test_compiled_in_one_graph_both_kinds_compute_the_same() -> None:
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    model = moved(inject(base, IA3(target_modules=["0", "2"], feedforward_modules=["2"])))
    x = torch.randn(4, 6)
    expected = model(x)
    wanted = torch.autograd.grad(expected.sum(), [*trainable_parameters(model).values()])
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, expected)
    for one, other in zip(torch.autograd.grad(y.sum(), [*trainable_parameters(model).values()]), wanted, strict=True):
        torch.testing.assert_close(one, other)


FOUND: dict[str, tuple[Callable[[], nn.Module], str, list[str], list[str]]] = {
    "llama": (MODELS["llama"], "model.layers.{}.", ["self_attn.k_proj", "self_attn.v_proj"], ["mlp.down_proj"]),
    "bert": (
        MODELS["bert"],
        "bert.encoder.layer.{}.",
        ["attention.self.key", "attention.self.value"],
        ["output.dense"],
    ),
    "gpt2": (MODELS["gpt2"], "transformer.h.{}.", ["attn.c_attn"], ["mlp.c_proj"]),
    "vit": (MODELS["vit"], "vit.layers.{}.", ["attention.k_proj", "attention.v_proj"], ["mlp.fc2"]),
    "mixtral": (MODELS["mixtral"], "model.layers.{}.", ["self_attn.k_proj", "self_attn.v_proj"], []),
    "distilbert": (
        lambda: transformers.DistilBertForSequenceClassification(
            transformers.DistilBertConfig(vocab_size=48, dim=32, n_heads=4, n_layers=2, hidden_dim=40)
        ),
        "distilbert.transformer.layer.{}.",
        ["attention.k_lin", "attention.v_lin"],
        ["ffn.lin2"],
    ),
    "gpt neox": (
        lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**TINY)),
        "gpt_neox.layers.{}.",
        ["attention.query_key_value"],
        ["mlp.dense_4h_to_h"],
    ),
    "modernbert": (
        lambda: transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**TINY, pad_token_id=0)),
        "model.layers.{}.",
        ["attn.Wqkv"],
        ["mlp.Wo"],
    ),
    "torch": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12), 2, enable_nested_tensor=False),
        "layers.{}.",
        ["self_attn"],
        ["linear2"],
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_keys_values_and_feed_forward_blocks_are_found(name: str) -> None:
    build, layer, outputs, inputs = FOUND[name]
    found = adapters(inject(build(), IA3()), "default")
    assert {*found} == {layer.format(i) + end for i in range(2) for end in (*outputs, *inputs)}
    on_input = {path for path, adapter in found.items() if isinstance(adapter, LayerScaling) and adapter.on_input}
    assert on_input == {layer.format(i) + end for i in range(2) for end in inputs}


def test_what_is_found_can_be_left_out() -> None:
    found = adapters(inject(MODELS["llama"](), IA3(exclude_modules=["layers.0.mlp.down_proj", "k_proj"])), "default")
    ends = ["layers.0.self_attn.v_proj", "layers.1.self_attn.v_proj", "layers.1.mlp.down_proj"]
    assert [*found] == [f"model.{end}" for end in ends]


def test_parameter_counts() -> None:
    model = inject(llama_7b(), IA3())
    assert count(model) == 32 * (4096 + 4096 + 11008) == 614_400
    assert all(p.is_meta and p.dtype == torch.float32 for p in trainable_parameters(model).values())
    for make, _, features_in, features_out in LAYERS.values():
        assert count(on_one(make())) == features_out
        assert count(on_one(make(), on_input=True)) == features_in
    assert count(inject(nn.Sequential(nn.MultiheadAttention(12, 3, kdim=8)), IA3())) == 2 * 12


EMPTY = "target_modules: is empty; name at least one, or leave it out for keys, values and feed-forward blocks"
WRONG_FIELDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no targets": ({"target_modules": []}, [EMPTY]),
    "empty target": ({"target_modules": ""}, [EMPTY]),
    "feed-forward alone": (
        {"feedforward_modules": ["fc2"]},
        ["feedforward_modules: is some of target_modules, which are not given; name both or neither"],
    ),
    "expressions": (
        {"target_modules": "*k", "feedforward_modules": "a(", "exclude_modules": "b)"},
        [
            "target_modules: '*k' is not a regular expression (nothing to repeat at position 0)",
            "feedforward_modules: 'a(' is not a regular expression (missing ), unterminated subpattern at position 1)",
            "exclude_modules: 'b)' is not a regular expression (unbalanced parenthesis at position 1)",
        ],
    ),
}


@pytest.mark.parametrize("fault", WRONG_FIELDS)
def test_wrong_fields_are_told(fault: str) -> None:
    fields, expected = WRONG_FIELDS[fault]
    with pytest.raises(PEFTError) as caught:
        IA3(**fields)
    assert caught.value.faults == tuple(f"IA3.{one}" for one in expected)


@pytest.mark.parametrize(
    ("build", "fields", "faults"),
    [
        (
            lambda: nn.ModuleDict({"body": nn.Linear(3, 3), "out": nn.Conv2d(3, 3, 1), "act": nn.Tanh()}),
            {},
            [
                "target_modules: ModuleDict has no layer that is known for a key, value or feed-forward projection; "
                "name them; names that can be: body, out"
            ],
        ),
        (
            lambda: nn.ModuleDict({"act": nn.Tanh()}),
            {},
            [
                "target_modules: ModuleDict has no layer that is known for a key, value or feed-forward projection, "
                "and none that can be scaled"
            ],
        ),
        (
            MODELS["bert"],
            {"target_modules": ["keyy", "LayerNorm", "value"], "feedforward_modules": ["valeu", "value"]},
            [
                "target_modules: 'keyy' matches nothing; did you mean 'key'?",
                "target_modules: 'LayerNorm' matches bert.embeddings.LayerNorm, a LayerNorm, which can not be adapted; "
                "names that can be: query, key, value, dense, classifier",
                "feedforward_modules: 'valeu' matches no targeted module; did you mean 'value'?",
            ],
        ),
        (
            lambda: nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8)}),
            {"target_modules": ["attn"], "feedforward_modules": "at.*"},
            ["feedforward_modules: attn is a MultiheadAttention, whose keys and values are scaled, not its inputs"],
        ),
        (
            lambda: nn.ModuleDict({"up": nn.LazyLinear(8), "down": parametrized()}),
            {"target_modules": ["up", "down"]},
            [
                "target_modules: up: LazyLinear has no shape yet; run one batch through the model first",
                "target_modules: down: ParametrizedLinear computes its weight, by a parametrization say; remove that "
                "first (torch.nn.utils.parametrize.remove_parametrizations) or exclude the module",
            ],
        ),
        (
            lambda: nn.ModuleDict({"act": nn.Tanh()}),
            {"target_modules": "all-linear"},
            ["target_modules: 'all-linear' matches nothing; ModuleDict has no linear layer that can be adapted"],
        ),
    ],
)
def test_what_does_not_fit_a_model_is_told_at_once(
    build: Callable[[], nn.Module], fields: dict[str, Any], faults: list[str]
) -> None:
    with pytest.raises(PEFTError) as caught:
        inject(build(), IA3(**fields))
    assert caught.value.faults == tuple(f"IA3.{fault}" for fault in faults)


def parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    model = MODELS["bert"]()
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {*adapters(inject(model, IA3(target_modules="all-linear")), "default")} == linear - {"classifier"}


def test_a_layer_with_two_names_is_scaled_once() -> None:
    layer = nn.Linear(4, 4)
    model = inject(nn.ModuleDict({"one": layer, "two": layer}), IA3(target_modules=["one", "two"]))
    assert count(model) == 4
