"""Conversion in place: which layers, what stays, how much memory, and what is refused before anything is touched."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from bitsandbytes import functional
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft import LoRA, PEFTError, inject, remove
from lightning_peft.quantization import Quantization, dequantize, guard, quantize
from lightning_peft.quantization.layers import Linear4bit, Linear8bit, PackedLinear
from tests.methods.models import MODELS, Toy, inputs_of

KINDS = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")
LLAMA = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    given = model(**inputs)
    return given if isinstance(given, Tensor) else given.logits


def packed_paths(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, PackedLinear)}


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert not packed_paths(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before if not before[name].is_meta)


# which layers, and what they compute


OTHERS = ("linear", "conv1D", "attention", "llama", "bert", "t5", "vit", "mixtral")


@pytest.mark.parametrize(
    ("kind", "name"), [*((kind, "gpt2") for kind in KINDS), *((kind, name) for name in OTHERS for kind in KINDS[1::3])]
)
@pytest.mark.filterwarnings("ignore:quantization:UserWarning")
def test_outputs_are_those_of_the_dequantized_weights(kind: str, name: str) -> None:
    model, inputs = MODELS[name]().eval(), inputs_of(name)
    names = [path for path, _ in model.named_modules()]
    modules = [id(module) for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    assert quantize(model, kind) is model
    assert [path for path, _ in model.named_modules()] == names
    assert [id(module) for module in model.modules()] == modules
    y = output(model, inputs)
    dense = dequantize(copy.deepcopy(model), torch.float32)
    assert [type(module) for module in dense.modules()] == classes
    torch.testing.assert_close(y, output(dense, inputs), rtol=1e-5, atol=1e-5)
    # the same bits, through a state dict, in another model of the kind
    other = quantize(MODELS[name]().eval(), kind)
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other, inputs), y)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_checkpoint_loads_into_a_quantized_model_with_the_bits_of_conversion(kind: str) -> None:
    dense, other = MODELS["gpt2"](), quantize(MODELS["gpt2"](), kind)
    other.load_state_dict(dense.state_dict())
    expected = quantize(dense, kind).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())


def test_all_of_gpt2s_layers_are_packed_but_not_its_head() -> None:
    model = quantize(MODELS["gpt2"](), "nf4")
    expected = {
        f"transformer.h.{layer}.{name}"
        for layer in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert packed_paths(model) == expected
    assert model.lm_head.weight is model.transformer.wte.weight


def test_heads_embeddings_norms_and_the_named_are_left() -> None:
    model = quantize(MODELS["bert"](), Quantization(skip_modules=["layer.0"]), skip=["layer.1.attention", "pooler"])
    assert packed_paths(model) == {
        "bert.encoder.layer.1.intermediate.dense",
        "bert.encoder.layer.1.output.dense",
    }


def test_what_transformers_keeps_in_fp32_is_left() -> None:
    model = quantize(MODELS["t5"](), "nf4")
    assert {path.rpartition(".")[2] for path in packed_paths(model)} == {"q", "k", "v", "o", "wi"}


def test_biases_buffers_hooks_and_modes_stay() -> None:
    model = Toy(up=nn.Linear(64, 32, dtype=torch.bfloat16), norm=nn.BatchNorm1d(32), head=nn.Linear(32, 5)).eval()
    up = model.layers["up"]
    bias, calls = up.bias, []
    up.register_forward_hook(lambda *_: calls.append("hook"))
    up.register_forward_pre_hook(lambda *_: calls.append("pre"))
    up.note = "mine"
    before = bits(model)
    quantize(model, "nf4")
    assert model.layers["up"] is up
    assert up.bias is bias
    assert bias.dtype == torch.bfloat16
    assert bias.requires_grad
    assert not up.training
    assert up.note == "mine"
    up(torch.randn(2, 64, dtype=torch.bfloat16))
    assert calls == ["pre", "hook"]
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if "weight" not in name)


def test_weights_that_are_used_twice_are_left() -> None:
    model = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("a", "b", "c", "d")})
    model["b"].weight = model["a"].weight
    model["e"] = nn.Embedding(16, 16)
    model["e"].weight = nn.Parameter(model["c"].weight.data)  # another parameter over the same numbers
    model["again"] = model["d"]
    quantize(model, "nf4")
    assert packed_paths(model) == {"d"}
    assert model["again"] is model["d"]
    assert model["b"].weight is model["a"].weight


def test_subclasses_parametrized_and_empty_layers_are_left() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(Scaled(8, 8), normed, nn.Linear(8, 8), nn.Linear(8, 0), nn.Linear(0, 8), nn.Bilinear(8, 8, 8))
    assert packed_paths(quantize(model, "nf4", skip=["5"])) == {"2"}


def test_the_root_may_be_the_layer() -> None:
    layer = nn.Linear(64, 32)
    assert quantize(layer, "int8") is layer
    assert isinstance(layer, Linear8bit)


def test_it_may_be_done_twice() -> None:
    model = quantize(MODELS["llama"](), "nf4-dq")
    before = bits(model)
    quantize(model, "nf4-dq")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("masked", [False, True])
def test_torchs_fused_encoder_calls_its_packed_layers(kind: str, masked: bool) -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 5, 32)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]]) if masked else None
    fused = [(part.activation_relu_or_gelu, model.use_nested_tensor) for part in model.layers]
    quantize(model, kind)
    assert packed_paths(model) == {f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
    with_gradient = model(x, src_key_padding_mask=padding)
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), with_gradient)
    dequantize(model, torch.float32)
    assert [(part.activation_relu_or_gelu, model.use_nested_tensor) for part in model.layers] == fused
    kept = ... if padding is None else ~padding
    torch.testing.assert_close(model(x, src_key_padding_mask=padding)[kept], with_gradient[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_gives_the_class_and_dtype_back(dtype: torch.dtype) -> None:
    model = Toy(up=Conv1D(20, 12), act=nn.Tanh(), head=nn.Linear(20, 5, dtype=torch.bfloat16))
    attributes = [sorted(vars(module)) for module in model.modules()]
    printed = str(model)
    quantize(model, "nf4")
    dequantize(model, dtype)
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert str(model) == printed
    assert model.layers["up"].weight.shape == (12, 20)
    assert model.layers["up"].weight.is_contiguous()
    assert {layer.weight.dtype for layer in (model.layers["up"], model.layers["head"])} == {dtype}
    assert model.layers["head"].bias.dtype == torch.bfloat16


# memory


def resident(peak: bool = False) -> int:
    """Bytes of memory that the process has, or has had since the peak was reset."""
    key = "VmHWM" if peak else "VmRSS"
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith(key))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(
    ("kind", "dtype", "make"), [("nf4-dq", torch.bfloat16, nn.Linear), ("int8", torch.float32, Conv1D)]
)
def test_the_peak_over_the_resident_model_is_one_layer(
    kind: str, dtype: torch.dtype, make: Callable[[int, int], nn.Module]
) -> None:
    quantize(nn.Linear(64, 64), kind)  # what bitsandbytes allocates once
    model = nn.Sequential(*(make(3072, 3072).to(dtype) for _ in range(2)))
    one = 3072 * 3072 * dtype.itemsize
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident()
    quantize(model, kind)
    assert resident(peak=True) - before <= one
    assert sum(value.numel() * value.element_size() for value in model.state_dict().values()) < 2 * one * 0.3


def test_the_dense_weight_is_freed_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    alive = [weakref.ref(layer.weight) for layer in model]
    counts = []
    original = functional.quantize_4bit

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts.append(sum(weight() is not None for weight in alive))
        return original(*args, **kwargs)

    monkeypatch.setattr(functional, "quantize_4bit", counted)
    quantize(model, "nf4")
    assert counts == [4, 3, 2, 1]


# gradients after a forward without them


def lowest_cosine(model: nn.Module, kind_of_pass: str) -> float:
    """The lowest cosine between an adapter gradient of `model`, after validation, and the one over dense weights."""
    inject(model, LoRA(r=4, init="gaussian"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    reference = remove(copy.deepcopy(model))
    dequantize(reference, torch.float32)
    inject(reference, LoRA(r=4))
    reference.load_state_dict({k: v for k, v in model.state_dict().items() if ".lora_" in k}, strict=False)
    ids = inputs_of("llama")["input_ids"]
    for run in (model, reference):
        run.eval()
        with torch.no_grad():
            run(input_ids=ids, labels=ids)
        run.train(kind_of_pass == "train")
        run(input_ids=ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    assert len(expected) == 28
    cosines = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            cosines.append(torch.cosine_similarity(parameter.grad.flatten(), expected[name].flatten(), 0).item())
            assert parameter.grad.norm().item() == pytest.approx(expected[name].norm().item(), rel=1e-2)
    assert len(cosines) == 28
    return min(cosines)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_validation_leaves_every_adapter_gradient_right(kind: str, mode: str) -> None:
    assert lowest_cosine(quantize(llama(), kind), mode) >= 0.9999


@pytest.mark.parametrize("take_over", ["guard", "quantize"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_transformers_quantized_is_taken_over(kind: str, take_over: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    config = Quantization.of(kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config.bits_and_bytes_config(), dtype=torch.float32
    )
    before = bits(model)
    layers = {path: module for path, module in model.named_modules() if "_proj" in path}
    guard(model) if take_over == "guard" else quantize(model, kind)
    assert packed_paths(model) == layers.keys()
    assert all(type(module) is (Linear8bit if kind == "int8" else Linear4bit) for module in layers.values())
    after = model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items() if not name.endswith("format"))
    assert not isinstance(model.lm_head, PackedLinear)
    if take_over == "quantize" and kind != "int8":
        assert all(module.compute_dtype is None for module in layers.values())
    assert lowest_cosine(model, "train") >= 0.9999


def test_a_gpt2_that_transformers_quantized_is_taken_over_and_dequantized(tmp_path: Path) -> None:
    MODELS["gpt2"]().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=Quantization.of("nf4").bits_and_bytes_config(), dtype=torch.float32
    )
    inputs = inputs_of("gpt2")
    y = output(guard(model), inputs)
    assert len(packed_paths(model)) == 8
    dequantize(model, torch.float32)
    assert type(model.transformer.h[0].mlp.c_fc) is Conv1D
    assert model.transformer.h[0].mlp.c_fc.weight.shape == (32, 128)
    torch.testing.assert_close(output(model, inputs), y)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_layer_that_was_repacked_gets_its_codes_back(nested: bool, storage: torch.dtype) -> None:
    layer = bitsandbytes.nn.Linear4bit(128, 64, compress_statistics=nested, quant_type="nf4", quant_storage=storage).to(
        "cpu"
    )
    dense = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    codes = layer.weight.data.clone().view(torch.uint8)
    # what a forward without gradients does on a CPU with AVX512-BF16
    layer.weight.data, _ = functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    guard(layer)
    assert torch.equal(layer.weight.data.view(torch.uint8), codes)
    x = torch.randn(3, 128)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, layer.bias), rtol=0, atol=2e-2)
    scales = functional.quantize_4bit(dense, quant_type="nf4")[1].absmax
    torch.testing.assert_close(layer.weight.quant_state.absmax, scales, rtol=2**-8, atol=0)
    other = bitsandbytes.nn.Linear4bit(128, 64, quant_type="nf4", quant_storage=storage).to("cpu")
    guard(other).load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_a_layer_of_bitsandbytes_that_was_never_moved_is_packed() -> None:
    model = nn.Sequential(
        bitsandbytes.nn.LinearNF4(64, 32), bitsandbytes.nn.Linear8bitLt(32, 8, has_fp16_weights=False)
    )
    expected = [quantize(nn.Linear(64, 32), "nf4-dq"), quantize(nn.Linear(32, 8), "int8")]
    for layer, of in zip(model, expected, strict=True):
        of.load_state_dict({"weight": layer.weight.data, "bias": layer.bias})
    guard(model)
    for layer, of in zip(model, expected, strict=True):
        assert type(layer) is type(of)
        assert torch.equal(layer.weight, of.weight)


def test_guard_leaves_other_models_alone() -> None:
    model = MODELS["linear"]()
    before = bits(model)
    assert guard(model) is model
    assert_untouched(model, before)


def test_guard_keeps_adapters_and_subclasses() -> None:
    class Own(bitsandbytes.nn.Linear4bit):
        pass

    model = nn.Sequential(bitsandbytes.nn.LinearNF4(64, 32), nn.Tanh(), Own(32, 8)).to("cpu")
    inject(model, LoRA(r=2, target_modules=["0"]))
    classes = [type(module) for module in model]
    guard(model)
    assert [type(module) for module in model] == classes
    assert not model[0].support_avx512bf16_for_cpu
    assert not model[2].support_avx512bf16_for_cpu


# what stays dense


def test_much_that_stays_dense_is_told() -> None:
    model = MODELS["mixtral"]()
    with pytest.warns(UserWarning, match="quantization:") as warned:
        quantize(model, "nf4")
    experts = [model.model.layers[0].mlp.experts.gate_up_proj, model.model.layers[0].mlp.experts.down_proj]
    sizes = [2 * parameter.numel() * 4 / 1e6 for parameter in experts]
    message = str(warned[0].message)
    assert f"MixtralExperts.gate_up_proj {sizes[0]:.1f} MB, MixtralExperts.down_proj {sizes[1]:.1f} MB" in message
    assert message.endswith("; only Linear and Conv1D layers can be packed")
    assert warned[0].filename == __file__


def test_what_the_user_named_or_is_no_weight_is_not_told(recwarn: pytest.WarningsRecorder) -> None:
    quantize(Toy(embed=nn.Embedding(64, 32), up=nn.Linear(32, 16), head=nn.Linear(16, 64)), "nf4", skip=["head"])
    quantize(llama(), "nf4")
    assert not [warning for warning in recwarn if "quantization" in str(warning.message)]


# refusals


def shaped(storage: str) -> Quantization:
    return Quantization(storage_dtype=storage)


class WQLinear(nn.Module):
    """Named and placed as the layer of another library."""

    __module__ = "awq.modules.linear.gemm"


def refused(model: nn.Module, config: Any, **options: Any) -> tuple[str, ...]:
    before, classes = bits(model), [type(module) for module in model.modules()]
    with pytest.raises(PEFTError) as error:
        quantize(model, config, **options)
    assert [type(module) for module in model.modules()] == classes
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if not value.is_meta)
    return error.value.faults


def test_names_that_match_nothing() -> None:
    model = Toy(encoder=nn.Linear(16, 8), head=nn.Linear(8, 4))
    faults = refused(model, Quantization(skip_modules=["encodr"]), skip=["haed", "head"])
    assert faults == (
        "skip_modules: 'encodr' matches nothing; did you mean 'encoder'?",
        "skip: 'haed' matches nothing; did you mean 'head'?",
    )
    assert refused(model, "nf4", skip="head") == ("skip: 'head' is a string; give a list, ['head']",)


def test_an_unknown_name() -> None:
    assert refused(nn.Linear(8, 8), "nf8")[0].startswith("quantization: 'nf8' is none of nf4")


def test_nothing_to_quantize() -> None:
    assert refused(MODELS["conv2d"](), "nf4") == (
        "quantization: Toy has no linear layer that can be quantized; leave it out",
    )


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = MODELS["linear"]()
    assert refused(model, "nf4") == (
        "quantization: the model is on the meta device; load_base(model, path, quantization=...), or base_weights of "
        "the callback, fills it from safetensors and quantizes on the way",
    )


def test_layers_that_cannot_be_packed_are_told_together() -> None:
    class Tagged(Tensor):
        pass

    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("fp8", "tagged", "moved", "good")})
    model["fp8"].weight = nn.Parameter(model["fp8"].weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    model["tagged"].weight = nn.Parameter(torch.randn(8, 8).as_subclass(Tagged))
    model["moved"].forward = lambda x: x
    model["lazy"] = nn.LazyLinear(8)
    with pytest.raises(PEFTError) as error:
        quantize(model, "nf4")
    assert error.value.faults == (
        "fp8: its weight is in float8_e4m3fn, which can't be packed; name it in skip_modules",
        "tagged: its weight is a Tagged, which can't be packed; quantize before it is made one",
        "moved: has a forward of its own set on it, as accelerate's dispatch does; load the model without device_map, "
        "or with quantization_config",
        "lazy: LazyLinear has no shape yet; run one batch through the model first",
    )
    assert not packed_paths(model)


def test_codes_that_no_storage_dtype_can_hold() -> None:
    assert refused(nn.Sequential(nn.Linear(7, 3)), shaped("bfloat16")) == (
        "0: its 21 weights take 11 bytes, no whole number of bfloat16s; use storage_dtype 'uint8', or name it in "
        "skip_modules",
    )


def test_adapters_stand_on_it() -> None:
    model = inject(MODELS["linear"](), LoRA(r=2))
    told = ("quantization: adapters stand on the model; quantize it first, and attach them after",)
    assert refused(model, "nf4") == told
    import peft

    wrapped = peft.get_peft_model(MODELS["linear"](), peft.LoraConfig(r=2, target_modules=["up"]))
    assert refused(wrapped, "nf4") == told
    quantized = inject(quantize(MODELS["linear"](), "nf4"), LoRA(r=2))
    with pytest.raises(PEFTError, match="dequantize: adapters stand on the quantized layers; remove"):
        dequantize(quantized, torch.float32)


def test_another_kind_of_quantization_is_not_mixed_in() -> None:
    assert refused(quantize(nn.Sequential(nn.Linear(8, 8)), "nf4-dq"), "int8") == (
        "quantization: 0 is nf4-dq already, which can't become int8; leave quantization out to use it as it is, or "
        "load the model as it was before",
    )


def test_layers_of_other_libraries_are_named() -> None:
    model = nn.ModuleDict({"up": nn.Linear(8, 8), "down": WQLinear()})
    assert refused(model, "nf4") == (
        "quantization: down is quantized by AWQ (WQLinear), which can't be packed again; leave quantization out, or "
        "load the model as it was before",
    )
    dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(PEFTError, match=r"quantization: 0 is quantized by torch.ao \(Linear\), which can't be packed"):
        quantize(dynamic, "nf4")


def test_int8_with_dense_weights_beside_is_refused() -> None:
    model = nn.Sequential(bitsandbytes.nn.Linear8bitLt(8, 8))
    with pytest.raises(PEFTError) as error:
        guard(model)
    assert str(error.value) == (
        "quantization: 0 is a Linear8bitLt with has_fp16_weights=True, which keeps a dense weight beside the codes; "
        "load the model with it set to False (llm_int8_has_fp16_weight)"
    )


@pytest.mark.parametrize(("kind", "value"), [("nf4", math.inf), ("fp4-dq", math.nan), ("int8", 1e5)])
def test_numbers_that_no_code_stands_for(kind: str, value: float) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[3, 4] = value
    before = model[0].weight
    with pytest.raises(PEFTError) as error:
        quantize(model, kind)
    what = "are beyond 65504 or " if kind == "int8" else ""
    assert (
        str(error.value) == f"0: has weights that {what}are not finite, which can't be packed; name it in skip_modules"
    )
    assert model[0].weight is before
    assert type(model[0]) is nn.Linear
