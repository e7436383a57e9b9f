"""Packed layers: what their codes stand for, what they compute in, and how they load, move and are copied."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft import LoRA, PEFTError, inject
from lightning_peft.quantization import Quantization, dequantize, quantize
from lightning_peft.quantization.layers import Linear4bit, Linear8bit, PackedLinear
from tests.methods.models import Toy

KINDS = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")
FOUR_BIT = KINDS[:4]
# QLoRA, arXiv 2305.14314, appendix E
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# sign, two bits of exponent, one of mantissa, scaled so that the largest is 1
FP4 = (0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12)


def layer(features_in: int, features_out: int, kind: str | Quantization, bias: bool = True) -> PackedLinear:
    made = quantize(nn.Linear(features_in, features_out, bias=bias), kind)
    assert isinstance(made, PackedLinear)
    return made


def decoded(packed: PackedLinear) -> Tensor:
    """The matrix that the codes stand for, in fp64, by the papers' tables."""
    shape = (packed.out_features, packed.in_features)
    if isinstance(packed, Linear8bit):
        return packed.weight.double() * packed.weight.SCB.double().unsqueeze(1) / 127  # type: ignore[union-attr]
    state = packed.weight.quant_state
    codes = packed.weight.view(torch.uint8).flatten().int()
    scales = state.absmax
    if state.nested:
        blocks = state.state2.absmax.double().repeat_interleave(256)[: scales.numel()]
        scales = state.state2.code.double()[scales.long()] * blocks + state.offset
    values = torch.stack([codes >> 4, codes & 15], 1).flatten()[: math.prod(shape)]
    table = torch.tensor(NF4 if state.quant_type == "nf4" else (*FP4, *(-value for value in FP4)), dtype=torch.float64)
    return (table[values] * scales.double().repeat_interleave(64)[: values.numel()]).reshape(shape)


def parts(packed: nn.Module) -> dict[str, Tensor]:
    """All that the layer's state dict holds, on its own."""
    return {name: value.clone() for name, value in packed.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert value.shape == other[name].shape
        # as bytes: codes that are stored as floating-point numbers may be no number
        flat = [tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (value, other[name])]
        assert torch.equal(*flat), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_the_whole_matrix_at_once(kind: str, dtype: torch.dtype) -> None:
    dense = nn.Linear(200, 600, dtype=dtype)  # more than is packed at once, in rows that end within a block
    weight = dense.weight.detach().clone()
    packed = quantize(dense, kind)
    if kind == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        assert torch.equal(packed.weight, codes)
        assert torch.equal(packed.weight.SCB, scales)
        return
    codes, state = functional.quantize_4bit(weight, quant_type=kind[:3], compress_statistics=kind.endswith("dq"))
    assert torch.equal(packed.weight, codes)
    assert_same(
        {name: value for name, value in state.as_dict(packed=True).items() if isinstance(value, Tensor)},
        {name.removeprefix("weight."): value for name, value in parts(packed).items() if name.startswith("weight.")},
    )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 140),
    st.integers(1, 70),
    st.sampled_from(KINDS),
    st.booleans(),
    st.lists(st.integers(0, 3), max_size=2),
)
def test_any_shape_computes_with_what_its_codes_stand_for(
    features_in: int, features_out: int, kind: str, bias: bool, batch: list[int]
) -> None:
    packed = layer(features_in, features_out, kind, bias)
    W = decoded(packed)
    x = torch.randn(*batch, features_in, requires_grad=True)
    y = packed(x)
    expected = x.double() @ W.T + (packed.bias.double() if bias else 0)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), upstream.double() @ W, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(packed.eval()(x), y)


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation_give_the_same(kind: str) -> None:
    packed, x = layer(64, 32, kind), torch.randn(5, 64)
    assert torch.equal(packed.train()(x), packed.eval()(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_bias_gets_its_gradient(kind: str) -> None:
    packed, x = layer(64, 32, kind), torch.randn(2, 3, 64)
    packed(x).pow(2).sum().backward()
    assert packed.bias.grad is not None
    torch.testing.assert_close(packed.bias.grad, 2 * packed(x).detach().sum((0, 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_in_the_dtype_of_each_input(kind: str) -> None:
    packed = layer(64, 32, kind)
    x = torch.randn(3, 64)
    W, b = decoded(packed), packed.bias.double()
    for dtype, tolerance in (
        (torch.float32, 1e-5),
        (torch.bfloat16, 3e-2),
        (torch.float16, 5e-3),
        (torch.float64, 1e-5),
    ):
        y = packed(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), x.to(dtype).double() @ W.T + b, rtol=0, atol=tolerance)
    assert packed.bias.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_chooses_the_dtype(kind: str) -> None:
    packed, x = layer(64, 32, kind), torch.randn(3, 64)
    low = packed(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(x), low)


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_a_compute_dtype_is_kept_and_the_output_is_the_inputs(kind: str) -> None:
    options = Quantization.of(kind).fields()
    packed, x = layer(64, 32, Quantization(**options | {"compute_dtype": "bfloat16"})), torch.randn(3, 64)
    y = packed(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, packed(x.bfloat16()).float())


@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_refused(kind: str) -> None:
    packed = layer(64, 32, kind)
    with pytest.raises(PEFTError) as error:
        packed(torch.randn(3, 64).to(packed.weight.dtype))
    assert str(error.value) == (
        f"a quantized Linear was given {'int8' if kind == 'int8' else 'uint8'}: the model casts its input to the dtype "
        "of the layer's weight; name the layer in skip_modules"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads(kind: str) -> None:
    one, other = layer(72, 40, kind), layer(72, 40, kind)
    kept = other.weight
    saved = parts(one)
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.weight is kept
    assert_same(parts(other), saved)
    x = torch.randn(3, 72)
    assert torch.equal(other(x), one(x))
    one.load_state_dict(saved)
    assert_same(parts(one), saved)
    assert torch.equal(other(x), one(x))
    # what was loaded from is not shared
    for value in saved.values():
        value.zero_()
    assert torch.equal(other(x), one(x))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_assigned(kind: str) -> None:
    one, other = layer(72, 40, kind), layer(72, 40, kind)
    other.load_state_dict(one.state_dict(), assign=True)
    assert other.weight.data_ptr() == one.weight.data_ptr()
    assert_same(parts(other), parts(one))


@pytest.mark.parametrize("make", [lambda: nn.Linear(72, 40), lambda: Conv1D(40, 72)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_weight_is_packed_as_it_loads(kind: str, make: Callable[[], nn.Module]) -> None:
    dense, other = make(), quantize(make(), kind)
    other.load_state_dict(dense.state_dict())
    assert_same(parts(other), parts(quantize(dense, kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_that_does_not_fit_is_refused_and_nothing_changes(kind: str) -> None:
    packed, other = layer(72, 40, kind), layer(40, 72, kind)
    before = parts(packed)
    with pytest.raises(RuntimeError, match=r"weight: is .*\(72, 40\).* layer (has|is) \(40, 72\)"):
        packed.load_state_dict({**other.state_dict(), "bias": packed.bias})
    with pytest.raises(RuntimeError, match=r"weight: is \(3, 3\) in float32, without scales"):
        packed.load_state_dict({"weight": torch.ones(3, 3), "bias": packed.bias})
    with pytest.raises(RuntimeError, match=r"weight: is .* without scales"):
        packed.load_state_dict({"weight": packed.weight.detach(), "bias": packed.bias})
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        packed.load_state_dict({"bias": packed.bias})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"extra"'):
        packed.load_state_dict({**packed.state_dict(), "extra": torch.ones(1)})
    assert_same(parts(packed), before)


def test_garbled_codes_are_refused() -> None:
    packed = layer(72, 40, "nf4")
    state = packed.state_dict()
    with pytest.raises(RuntimeError, match="weight: has 100 bytes of codes, and the layer 1440"):
        packed.load_state_dict({**state, "weight": state["weight"][:100]})


@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "with LoRA"])
@pytest.mark.parametrize("kind", [*KINDS, "bfloat16 storage"])
def test_copies_are_the_layer_again(kind: str, adapted: bool) -> None:
    config = Quantization("nf4", True, storage_dtype="bfloat16") if "storage" in kind else kind
    model: nn.Module = quantize(nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 5)), config)
    if adapted:
        inject(model, LoRA(r=2, init="gaussian"))
        nn.init.normal_(model[0].adapters["default"].lora_B)
    x = torch.randn(3, 64)
    expected, saved = model(x), parts(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected)
        assert_same(parts(other), saved)
        first, its = other[0], model[0]
        assert isinstance(first, Linear8bit if kind == "int8" else Linear4bit)
        assert type(first.weight) is type(its.weight)
        assert first.weight.data_ptr() != its.weight.data_ptr()
        if kind != "int8":
            assert first.quant_state is first.weight.quant_state
            assert first.quant_state is not its.quant_state
        else:
            assert first.state.SCB is first.weight.SCB
            assert first.weight.CB.data_ptr() == first.weight.data_ptr()


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16", "int8"])
def test_casts_and_moves_leave_the_codes_alone(storage: str) -> None:
    config = Quantization.of("int8") if storage == "int8" else Quantization(storage_dtype=storage)
    packed = layer(64, 32, config)
    codes = packed.weight.view(torch.uint8).clone()
    x = torch.randn(3, 64)
    expected = packed.to("cpu")(x)
    casts: list[Callable[[nn.Module], nn.Module]] = [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.float16),
        lambda m: nn.Sequential(m).float()[0],
    ]
    for cast in casts:
        assert cast(packed) is packed
        assert packed.weight.dtype == getattr(torch, storage)
        assert torch.equal(packed.weight.view(torch.uint8), codes)
        assert torch.equal(packed.state_dict()["weight"].view(torch.uint8), codes)
    torch.testing.assert_close(packed(x), expected, rtol=0, atol=1e-3)  # the bias was rounded
    assert packed.bias.dtype == torch.float32


def test_storage_dtypes_hold_the_same_codes() -> None:
    dense = nn.Linear(64, 32)
    plain = quantize(copy.deepcopy(dense), "nf4")
    stored = quantize(dense, Quantization(storage_dtype="bfloat16"))
    assert stored.weight.dtype == torch.bfloat16
    assert torch.equal(stored.weight.view(torch.uint8).flatten(), plain.weight.flatten())
    x = torch.randn(2, 64)
    assert torch.equal(stored(x), plain(x))
    plain.load_state_dict(stored.state_dict())
    assert plain.weight.dtype == torch.uint8
    stored.load_state_dict(plain.state_dict())
    assert stored.weight.dtype == torch.bfloat16
    assert torch.equal(stored(x), plain(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_weight_in_its_place_is_a_linear(kind: str) -> None:
    packed, dense = layer(64, 32, kind), nn.Linear(64, 32)
    original = packed.weight
    packed._parameters["weight"] = dense.weight
    x = torch.randn(3, 64)
    assert torch.equal(packed(x), nn.functional.linear(x, dense.weight, packed.bias))
    assert packed.state_dict().keys() == {"weight", "bias"}
    packed.to(torch.float32)
    packed._parameters["weight"] = original
    assert packed.is_packed()


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_lost_its_scales_takes_the_layers(kind: str) -> None:
    packed, x = layer(64, 32, kind), torch.randn(3, 64)
    expected = packed(x)
    packed.weight = nn.Parameter(packed.weight.data, requires_grad=False)  # as sharding leaves it
    assert torch.equal(packed(x), expected)


def test_libraries_know_the_layers_by_their_classes() -> None:
    four, eight = layer(64, 32, "nf4"), layer(64, 32, "int8")
    assert isinstance(four, bitsandbytes.nn.Linear4bit)
    assert isinstance(four.weight, bitsandbytes.nn.Params4bit)
    assert isinstance(eight, bitsandbytes.nn.Linear8bitLt)
    assert isinstance(eight.weight, bitsandbytes.nn.Int8Params)
    assert not eight.state.has_fp16_weights
    assert isinstance(four, nn.Linear)
    assert not four.weight.requires_grad
    assert not eight.weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_peft_adapts_them(kind: str) -> None:
    import peft

    model = quantize(Toy(up=nn.Linear(64, 48), head=nn.Linear(48, 5)), kind)
    x = torch.randn(3, 64)
    expected = model(x)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up"]))
    assert torch.equal(adapted(x), expected)
    adapted(x).sum().backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_weights_are_what_the_codes_stand_for(kind: str) -> None:
    packed = layer(100, 30, kind)
    expected = decoded(packed)
    dense = dequantize(packed, torch.float32)
    assert type(dense) is nn.Linear
    torch.testing.assert_close(dense.weight.double(), expected, rtol=1e-6, atol=1e-7)
