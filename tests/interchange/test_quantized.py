"""Over a quantized base: merging, a model of its own, HF peft's directories, and the identity of the base."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_peft import (
    IA3,
    AdaLoRA,
    BitFit,
    DoRA,
    HFPeft,
    Hybrid,
    LoRA,
    Method,
    PEFTError,
    disable_adapters,
    export_adapter,
    import_adapter,
    inject,
    merge,
    remove,
    trainable_parameters,
    unmerge,
)
from lightning_peft.interchange.standalone import save_merged
from lightning_peft.methods._quantized import dense_weight, is_quantized
from lightning_peft.quantization import Quantization, dequantize, quantize
from lightning_peft.state import base_fingerprint
from tests.interchange.peft_oracle import loaded_by_peft
from tests.methods.models import MODELS, inputs_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no tokenizer or processor is written"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:Merge lora module to .-bit linear"),
]
KINDS = ("nf4-dq", "int8")
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "bert": ["query", "dense"], "t5": ["q", "wo"]}
HEADS = ["lm_head", "classifier"]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def base_of(name: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name]().eval()


def moved(model: nn.Module, method: Method) -> nn.Module:
    torch.manual_seed(3)
    inject(model, method)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def logits(model: nn.Module, name: str) -> Tensor:
    torch.manual_seed(2)
    return model(**inputs_of(name)).logits.float()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    assert [
        key for key in ours if ours[key].dtype != theirs[key].dtype or not torch.equal(ours[key], theirs[key])
    ] == []


def methods(name: str) -> Iterator[Method]:
    targets = TARGETS[name]
    yield LoRA(r=4, target_modules=targets)
    yield DoRA(r=4, target_modules=targets)
    yield AdaLoRA(target_modules=targets)
    yield IA3(target_modules=targets, feedforward_modules=targets[1:])
    yield Hybrid(methods=[LoRA(r=4, target_modules=targets), IA3(target_modules=targets)])
    yield HFPeft(config={"peft_type": "VERA", "r": 4, "target_modules": targets})
    if name != "llama":
        yield BitFit(target_modules=targets)


MERGED = [(name, method) for name in ("llama", "gpt2") for method in methods(name)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "method"), MERGED, ids=[f"{name}-{type(m).__name__}" for name, m in MERGED])
def test_merged_weights_are_dense_and_compute_what_the_dequantized_base_does(
    name: str, method: Method, kind: str
) -> None:
    quantized = quantize(base_of(name), kind)
    before, classes = bits(quantized), [type(module) for module in quantized.modules()]
    reference = logits(moved(dequantize(copy.deepcopy(quantized), torch.float32), method), name)
    base = logits(quantized, name)
    model = moved(quantized, method)
    adapted, state = logits(model, name), bits(model)
    torch.testing.assert_close(adapted, reference, **TOLERANCE)
    assert (adapted - base).abs().max() > 1e-3

    merge(model)
    torch.testing.assert_close(logits(model, name), reference, **TOLERANCE)
    hosts = [module for module in model.modules() if hasattr(module, "merged_from") and module.merged_from]
    for host in hosts:
        dense = "weight" in host.merged_from
        assert is_quantized(host) is not dense
        assert host.weight.dtype == torch.float32 or not dense
    with pytest.raises(PEFTError, match="merge: it is merged already"):
        merge(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied, name), logits(model, name))
        assert_same(bits(remove(copied)), before)
        assert torch.equal(logits(copied, name), base)

    unmerge(model)
    assert_same(bits(model), state)
    assert torch.equal(logits(model, name), adapted)
    with disable_adapters(model):
        assert torch.equal(logits(model, name), base)
    assert_same(bits(remove(merge(model))), before)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(logits(model, name), base)


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_is_taken_in_fp32_and_stored_as_asked(kind: str) -> None:
    base = base_of("bert").to(torch.bfloat16)
    model = moved(quantize(base, kind), LoRA(r=4, target_modules=["query"]))
    host: Any = model.bert.encoder.layer[0].attention.self.query
    adapter = host.adapters["default"]
    exact = (dense_weight(host) + adapter.scale * adapter.lora_B @ adapter.lora_A).detach()
    before, bias = bits(model), host.bias
    for dtype, stored in {None: torch.bfloat16, torch.float32: torch.float32, torch.float16: torch.float16}.items():
        merge(model, dtype=dtype)
        assert torch.equal(host.weight, exact.to(stored))
        assert host.bias.dtype == stored
        x = torch.randn(3, 32, dtype=stored)
        torch.testing.assert_close(host(x), nn.functional.linear(x, exact.to(stored), bias.to(stored)))
        unmerge(model)
        assert host.bias is bias
        assert_same(bits(model), before)
    for wrong in (torch.int8, "float32"):
        with pytest.raises(PEFTError) as error:
            merge(model, dtype=wrong)  # type: ignore[arg-type]
        assert error.value.faults == (
            f"merge: dtype {wrong!r} is no floating-point dtype; give one such as torch.bfloat16",
        )


def test_a_base_of_quantized_layers_alone_is_unpacked_to_what_was_packed() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = quantize(nn.Sequential(nn.Linear(64, 48, bias=False, dtype=dtype)), "nf4")
        merge(inject(model, LoRA(r=4, target_modules=["0"])))
        assert model[0].weight.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_layer_may_move_before_it_is_unmerged(kind: str) -> None:
    model = moved(quantize(nn.Sequential(nn.Linear(64, 48)), kind), LoRA(r=4, target_modules=["0"]))
    x, before, codes = torch.randn(5, 64), bits(model), model[0].weight
    y = model(x)
    merge(model).to("meta")
    assert model[0].weight.is_meta
    unmerge(model)
    assert model[0].weight.is_meta
    assert model[0].weight.shape == codes.shape
    assert type(model[0].weight) is type(codes)
    again = moved(quantize(nn.Sequential(nn.Linear(64, 48)), kind), LoRA(r=4, target_modules=["0"]))
    again.load_state_dict(before)
    torch.testing.assert_close(unmerge(merge(again).to(torch.float64).to(torch.float32))(x), y)


def transformers_quantized(base: nn.Module, kind: str, folder: Path) -> nn.Module:
    base.save_pretrained(folder)
    config = Quantization.of(kind).bits_and_bytes_config(HEADS)
    return type(base).from_pretrained(folder, quantization_config=config, device_map={"": "cpu"}).eval()


@pytest.mark.parametrize("by", ["transformers", "us"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_model_of_its_own_is_written_in_full_and_says_nothing_of_a_quantization(
    name: str, kind: str, by: str, tmp_path: Path
) -> None:
    base = base_of(name)
    if by == "transformers":
        base = transformers_quantized(base, kind, tmp_path / "base")
    else:
        quantize(base, kind)
    model = moved(base, LoRA(r=4, target_modules=TARGETS[name]))
    adapted, state, config = logits(model, name), bits(model), model.config.to_dict()
    save_merged(model, tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in written
    assert written["dtype"] == "float32"
    loaded, report = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(logits(loaded.eval(), name), adapted, **TOLERANCE)
    assert not any(is_quantized(module) for module in loaded.modules())
    # nothing of the model has changed
    assert_same(bits(model), state)
    assert model.config.to_dict() == config
    assert torch.equal(logits(model, name), adapted)
    # what is merged already is written as it stands
    save_merged(merge(model), tmp_path / "again")
    first, again = (load_file(tmp_path / folder / "model.safetensors") for folder in ("merged", "again"))
    assert_same(first, again)
    unmerge(model)
    save_merged(model, tmp_path / "half", dtype=torch.bfloat16)
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert_same(half, {key: tensor.to(torch.bfloat16) for key, tensor in first.items()})
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def wide(name: str) -> nn.Module:
    """A model whose rows of weights are whole blocks of 64: of others bitsandbytes' kernel for some CPUs takes a wrong
    scale for a part, and HF peft runs its layers."""
    torch.manual_seed(1)
    if name == "llama":
        sizes = {"vocab_size": 48, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=64, n_layer=1, n_head=4, n_positions=16)).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [LoRA, DoRA, AdaLoRA, IA3])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_hf_peft_computes_the_same_of_the_directory_over_the_same_quantized_model(
    name: str, method: type[Method], kind: str, tmp_path: Path
) -> None:
    base = transformers_quantized(wide(name), kind, tmp_path / "base")
    theirs = copy.deepcopy(base)
    for module in theirs.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    options: dict[str, Any] = {"target_modules": TARGETS[name]}
    model = moved(copy.deepcopy(base), method(**options, **({} if method in (AdaLoRA, IA3) else {"r": 4})))
    adapted = logits(model, name)
    export_adapter(model, tmp_path / "adapter")
    loaded = loaded_by_peft(theirs, tmp_path / "adapter")
    if kind == "int8":
        # in evaluation bitsandbytes' own layer rounds its inputs to 8 bits
        for module in loaded.modules():
            module.training = isinstance(module, bitsandbytes.nn.Linear8bitLt)
    torch.testing.assert_close(logits(loaded, name), adapted, **TOLERANCE)
    back = import_adapter(copy.deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(back, name), adapted, **TOLERANCE)


def fingerprint(quantization: Any, change: float = 1.0) -> dict[str, str]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 8))
    model[0].weight.data *= change
    return base_fingerprint(inject(quantize(model, quantization), LoRA(target_modules=["0"])), "default")


@pytest.mark.parametrize("kind", KINDS)
def test_the_identity_of_a_packed_base_is_that_of_its_scales(kind: str) -> None:
    first = fingerprint(kind)
    assert fingerprint(kind) == first
    # twice the weight has the same codes
    other = fingerprint(kind, change=2.0)
    assert {name for name in first if first[name] != other[name]} == {"values"}
    different = fingerprint("nf4")
    assert {name for name in first if first[name] != different[name]} == {"values", "dtypes"}
    if kind != "int8":
        stored = Quantization("nf4", double_quantization=True, storage_dtype="bfloat16")
        assert fingerprint(stored) == first


@pytest.mark.parametrize("kind", KINDS)
def test_the_identity_stays_through_merges_copies_and_training(kind: str) -> None:
    model = moved(quantize(nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 8)), kind), LoRA(r=4, target_modules=["0"]))
    first = base_fingerprint(model, "default")
    assert (
        first["structure"]
        == base_fingerprint(
            inject(nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 8)), LoRA(r=4, target_modules=["0"])), "default"
        )["structure"]
    )
    model(torch.randn(5, 64)).sum().backward()
    for other in (model, merge(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model)), unmerge(model)):
        assert base_fingerprint(other, "default") == first
