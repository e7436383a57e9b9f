"""Every method over a base that bitsandbytes has packed: what its weights stand for, what trains, what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft import (
    IA3,
    METHODS,
    BitFit,
    DoRA,
    HFPeft,
    Hybrid,
    LoRA,
    Method,
    PEFTError,
    inject,
    trainable_parameters,
)
from lightning_peft.methods import _quantized
from lightning_peft.methods._quantized import dense_weight, features, is_quantized, packed
from lightning_peft.quantization import Quantization, dequantize, quantize
from tests.methods.models import MODELS, inputs_of

KINDS = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The levels of the 4-bit NormalFloat, QLoRA (arXiv 2305.14314), appendix E."""
FP4 = (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
"""The magnitudes of bitsandbytes' 4-bit float; the code's first bit is the sign."""


def stack(kind: str | Quantization, *shapes: tuple[int, int], bias: bool = True) -> nn.Sequential:
    torch.manual_seed(4)
    return quantize(nn.Sequential(*(nn.Linear(*shape, bias=bias) for shape in shapes)), kind)


def unpacked_by_hand(layer: Any) -> Tensor:
    """The weight (out, in) by the definition of its format."""
    weight = layer.weight
    shape = layer.out_features, layer.in_features
    if weight.dtype == torch.int8:
        return weight.data.float() * weight.SCB[:, None] / 127
    state = weight.quant_state
    codes = weight.data.view(torch.uint8).flatten()
    levels = torch.tensor(NF4 if state.quant_type == "nf4" else (*FP4, *(-value for value in FP4)))
    values = levels[torch.stack([codes >> 4, codes & 15], 1).long()].flatten()[: math.prod(shape)]
    scales = state.absmax
    if state.nested:
        outer = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(scales)]
        scales = state.state2.code[scales.long()] * outer + state.offset
    return (values * scales.repeat_interleave(state.blocksize)[: len(values)]).view(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 48), (40, 33), (7, 50), (300, 130)])
def test_a_packed_weight_stands_for_what_its_format_says(
    kind: str, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(*shape, dtype=dtype)
    dense = layer.weight.detach().clone()
    quantize(nn.Sequential(layer), kind)
    W = dense_weight(layer)
    assert (W.dtype, W.shape) == (torch.float32, dense.shape)
    torch.testing.assert_close(W, unpacked_by_hand(layer), rtol=1e-6, atol=1e-8)
    assert (W - dense).norm() < (0.02 if kind == "int8" else 0.2) * dense.norm()
    assert dense_weight(layer, dtype=torch.float16).equal(W.to(torch.float16))
    found = packed(layer)
    assert found is not None
    assert (found.kind, tuple(found.shape)) == (kind, tuple(dense.shape))
    assert found.dtype == (None if kind == "int8" else dtype)
    for chunk in (1, 700, 10**9):
        monkeypatch.setattr(_quantized, "CHUNK", chunk)
        rows = list(found.rows())
        assert torch.equal(torch.cat([part for _, part in rows]), W)
        assert [index for part, _ in rows for index in range(part.start, part.stop)] == list(range(len(dense)))


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16"])
def test_a_weight_is_the_same_in_whatever_dtype_its_codes_are_stored(storage: str) -> None:
    W = dense_weight(stack("nf4-dq", (64, 48))[0])
    model = stack(Quantization("nf4", double_quantization=True, storage_dtype=storage), (64, 48))
    assert model[0].weight.dtype == getattr(torch, storage)
    assert torch.equal(dense_weight(model[0]), W)
    inject(model, Hybrid(methods=[DoRA(r=4, target_modules=["0"]), IA3(target_modules=["0"])]))
    assert {parameter.dtype for parameter in trainable_parameters(model).values()} == {torch.float32}


def test_what_is_packed_is_told_from_what_is_not() -> None:
    layer, dense = stack("nf4", (64, 48))[0], nn.Linear(64, 48)
    assert [is_quantized(module) for module in (layer, dense, nn.ReLU())] == [True, False, False]
    assert dense_weight(dense) is dense.weight
    assert dense_weight(layer, "bias") is layer.bias
    # a sharded weight is a plain parameter
    W = dense_weight(layer)
    layer._parameters["weight"] = nn.Parameter(layer.weight.data.as_subclass(Tensor), requires_grad=False)
    assert torch.equal(dense_weight(layer), W)
    # and one that is dense again, as after a merge, is no packed one
    layer._parameters["weight"] = nn.Parameter(W, requires_grad=False)
    assert not is_quantized(layer)
    unquantized = bitsandbytes.nn.Linear4bit(8, 4)
    assert not is_quantized(unquantized)
    assert dense_weight(unquantized).shape == (4, 8)
    conv = quantize(nn.Sequential(Conv1D(5, 12)), "int8")[0]
    assert [features(module) for module in (layer, dense, Conv1D(5, 12), conv)] == [
        (64, 48),
        (64, 48),
        (12, 5),
        (12, 5),
    ]


OPTIONS: dict[str, dict[str, Any]] = {
    "LoRA": {"r": 4, "dropout": 0.0},
    "DoRA": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "AdaLoRA": {"target_modules": ["q_proj", "v_proj"]},
    "BitFit": {"add_missing": True},
    "Compacter": {"reduction": 8},
    "HFPeft": {"config": {"peft_type": "VERA", "r": 4, "target_modules": ["q_proj", "down_proj"]}},
    "Hybrid": {"methods": [LoRA(r=4), IA3()]},
    "PromptTuning": {"num_virtual_tokens": 2},
    "PTuning": {"num_virtual_tokens": 2},
}


def made(name: str) -> Method:
    return METHODS[name](**OPTIONS.get(name, {}))


def moved(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    y = run()
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(7))).sum().backward()
    return {name: p.grad.flatten() for name, p in trainable_parameters(model).items() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("kind", ["nf4-dq", "int8"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "DiffPruning"])
def test_outputs_and_gradients_are_those_over_the_weights_that_are_packed(name: str, kind: str) -> None:
    torch.manual_seed(0)
    quantized = quantize(MODELS["llama"]().eval(), kind)
    dense = dequantize(copy.deepcopy(quantized), torch.float32)
    inputs = inputs_of("llama")
    with torch.no_grad():
        base = logits(quantized, inputs)
    ours, reference = (moved(_seeded(model, made(name))) for model in (quantized, dense))
    with torch.no_grad():  # after which bitsandbytes' own layer would have no gradient, on some CPUs
        y, expected = logits(ours, inputs), logits(reference, inputs)
    assert (y - base).abs().max() > 1e-3
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    found = gradients(ours.train(), lambda: logits(ours, inputs))
    wanted = gradients(reference.train(), lambda: logits(reference, inputs))
    assert found.keys() == wanted.keys() == trainable_parameters(ours).keys()
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert [name for name in found if not _aligned(found[name], wanted[name])] == []


def _aligned(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours, theirs) or torch.cosine_similarity(ours, theirs, dim=0).item() >= 0.9999


def _seeded(model: nn.Module, method: Method) -> nn.Module:
    torch.manual_seed(3)
    return inject(model, method)


@pytest.mark.parametrize("method", [LoRA(r=4, target_modules=["0"]), BitFit(target_modules=["0"])])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_layers_that_others_packed_are_guarded(kind: str, method: Method) -> None:
    layer: Any = bitsandbytes.nn.Linear8bitLt(64, 48, has_fp16_weights=False).to("cpu")
    if kind == "nf4":
        layer = bitsandbytes.nn.LinearNF4(64, 48).to("cpu")
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(48, 8)).eval()
    W, x = dense_weight(layer), torch.randn(5, 64)
    inject(model, method)
    with torch.no_grad():
        model(x)
        layer(x.bfloat16())  # bitsandbytes casts a bias to the dtype of its input, once for all
    for name, parameter in trainable_parameters(model).items():
        assert parameter.dtype == torch.float32, name
    moved(model)
    reference = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), copy.deepcopy(model[2]))
    reference[0].load_state_dict({"weight": W, "bias": layer._parameters["bias"]})
    moved(_seeded(reference, method))
    for name, own in trainable_parameters(reference).items():
        own.data.copy_(model.get_parameter(name))
    found, wanted = (gradients(each, lambda each=each: each(x)) for each in (model, reference))
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4-dq", "int8"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora_keeps_nothing_but_x_A_and_B(kind: str, dropout: float) -> None:
    model = inject(stack(kind, (64, 48)), LoRA(r=4, dropout=dropout, target_modules=["0"]))
    adapter: Any = model[0].adapters["default"]
    x = torch.randn(6, 64, requires_grad=True)
    names = {x.data_ptr(): "x", adapter.lora_A.data_ptr(): "A", adapter.lora_B.data_ptr(): "B"}
    frozen = {model[0].weight.data_ptr(), model[0].weight.SCB.data_ptr() if kind == "int8" else 0}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in frozen:
            kept.append(names.get(tensor.data_ptr(), tuple(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    assert sorted(kept) == ["A", "B", "x"]
    y.sum().backward()


@pytest.mark.parametrize("kind", ["nf4-dq", "int8"])
def test_the_norm_of_dora_is_that_of_the_sum_and_unpacks_a_part_at_a_time(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = moved(inject(stack(kind, (64, 48)), DoRA(r=4, target_modules=["0"])))
    adapter: Any = model[0].adapters["default"]
    expected = (dense_weight(model[0]) + adapter.scale * adapter.lora_B @ adapter.lora_A).norm(dim=1)
    x = torch.randn(5, 64)
    whole = model(x)
    monkeypatch.setattr(_quantized, "CHUNK", 1)
    torch.testing.assert_close(adapter.row_norm(packed(model[0])), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model(x), whole, rtol=1e-6, atol=1e-6)
    unpacked: list[int] = []
    monkeypatch.setattr(_quantized.PackedWeight, "dense", lambda *_: unpacked.append(1))
    adapter.row_norm(packed(model[0]))
    assert unpacked == []


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("kind", ["nf4-dq", "int8"])
def test_starts_from_the_weight_are_taken_from_what_it_stands_for(kind: str, init: str) -> None:
    model = stack(kind, (64, 48))
    W, x = dense_weight(model[0]), torch.randn(5, 64)
    before = model(x)
    inject(model, LoRA(r=4, target_modules=["0"], init=init))
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    adapter: Any = model[0].adapters["default"]
    start = adapter.scale * adapter.lora_B @ adapter.lora_A
    if init == "olora":
        Q, R = torch.linalg.qr(W)
        expected = adapter.scale * Q[:, :4] @ R[:4]
    else:
        U, S, Vh = torch.linalg.svd(W)
        expected = U[:, :4] * S[:4] @ Vh[:4]
    torch.testing.assert_close(start, expected, rtol=1e-3, atol=1e-3)


def test_diff_pruning_is_refused_with_the_reason() -> None:
    model = quantize(MODELS["llama"](), "nf4")
    message = (
        "DiffPruning.target_modules: model.layers.0.self_attn.q_proj and 13 more are quantized, and a trained "
        "difference to every weight would be as large as the model in full precision: nothing would be saved; leave "
        "quantization out, exclude them (exclude_modules), or choose LoRA"
    )
    with pytest.raises(PEFTError) as error:
        inject(model, METHODS["DiffPruning"]())
    assert error.value.faults == (message,)
    with pytest.raises(PEFTError, match=r"target_modules: .*0.self_attn.q_proj is quantized") as error:
        inject(model, METHODS["DiffPruning"](target_modules=r".*layers\.0\.self_attn\.q_proj"))
    inject(model, METHODS["DiffPruning"](target_modules=["norm", "embed_tokens"]))


def test_what_can_not_be_trained_over_codes_is_refused() -> None:
    model = stack("nf4", (64, 48), (48, 8))
    with pytest.raises(PEFTError) as error:
        inject(model, LoRA(r=4, target_modules=["0"]), modules_to_save=["1"])
    assert error.value.faults == (
        "modules_to_save: 1 is quantized, and can't be trained whole; name it in skip_modules of the quantization",
    )
    with pytest.raises(PEFTError) as error:
        inject(model, LoRA(r=4, target_modules=["0"], target_parameters=["1.weight"]))
    assert error.value.faults == (
        "LoRA.target_parameters: 1: the weight of this Linear4bit is quantized, and would be read as its codes; adapt "
        "the layer itself (target_modules), or leave it out of quantization (skip_modules)",
    )
    attention = nn.Sequential(nn.MultiheadAttention(64, 2))
    attention[0].out_proj = bitsandbytes.nn.LinearNF4(64, 64).to("cpu")  # type: ignore[assignment]
    for method in (LoRA(r=4, target_modules=["out_proj"]), IA3(target_modules=["out_proj"])):
        with pytest.raises(PEFTError, match=r"is quantized, and .*skip_modules"):
            inject(attention, method)


PEFTS = ("VERA", "OFT", "BOFT", "MISS", "HIRA", "ROAD", "RANDLORA")


@pytest.mark.parametrize("kind", ["nf4-dq", "int8"])
@pytest.mark.parametrize("name", PEFTS)
def test_layers_of_peft_for_packed_weights_compute_what_those_for_dense_ones_do(name: str, kind: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    quantized = quantize(base.eval(), kind)
    dense = dequantize(copy.deepcopy(quantized), torch.float32)
    config = {"peft_type": name, "target_modules": ["2"], **({"oft_block_size": 4, "r": 0} if name == "OFT" else {})}
    ours, reference = (moved(_seeded(model, HFPeft(config=config))) for model in (quantized, dense))
    x = torch.randn(5, 32)
    torch.testing.assert_close(ours(x), reference(x), rtol=1e-5, atol=1e-5)
    assert {parameter.dtype for parameter in trainable_parameters(ours).values()} == {torch.float32}
    names = [{name: tuple(p.shape) for name, p in trainable_parameters(model).items()} for model in (ours, reference)]
    assert names[0] == names[1]


def test_layers_of_peft_that_would_take_codes_for_weights_are_refused() -> None:
    message = (
        "HFPeft.config: LOHA: 0: it is quantized, and peft's Linear takes its codes for weights; leave it out of "
        "quantization (skip_modules), or choose a type that peft has for quantized layers (VERA, OFT, …)"
    )
    for kind in ("nf4", "int8"):
        with pytest.raises(PEFTError) as error:
            inject(stack(kind, (64, 48)), HFPeft(config={"peft_type": "LOHA", "target_modules": ["0"]}))
        assert error.value.faults == (message,)
