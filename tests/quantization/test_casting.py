"""A base in 16 bits: which tensors are cast, and what becomes of inputs that are not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import HFPeft, LoRA, PEFTError, inject, remove
from lightning_peft.quantization import cast_base
from lightning_peft.quantization.casting import CastInputs, base_dtype_of
from tests.invariants.cases import ROWS, Attention, Encoder, Recurrent, Subject, Tied, cnn, each, llama, t5

HALF = [torch.bfloat16, torch.float16]


def dtypes(model: nn.Module) -> dict[torch.dtype, set[str]]:
    """The names of all floating-point tensors, buffers that are not saved included, by dtype."""
    found: dict[torch.dtype, set[str]] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            found.setdefault(tensor.dtype, set()).add(name)
    return found


@pytest.mark.parametrize("dtype", HALF)
def test_all_of_a_decoder_is_cast_but_the_frequencies_of_its_positions(dtype: torch.dtype) -> None:
    found = dtypes(cast_base(llama(), dtype))
    assert found.keys() == {dtype, torch.float32}
    assert found[torch.float32] == {"model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"}


@pytest.mark.parametrize("dtype", HALF)
def test_a_model_computes_what_transformers_would_load_in_that_dtype(dtype: torch.dtype, tmp_path: Any) -> None:
    from transformers import LlamaForCausalLM

    model = llama().eval()
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    ids = torch.randint(1, 24, (2, 5))
    expected = loaded(ids).logits
    logits = cast_base(model, dtype)(ids).logits
    assert logits.dtype == dtype
    assert torch.equal(logits, expected)


def test_what_transformers_declares_to_need_fp32_keeps_it() -> None:
    # in float16 T5's `wo` overflows; what is strict is so in both, like the bias that chooses experts
    half = dtypes(cast_base(t5(), torch.float16))
    assert half[torch.float32] == {f"{half_}.block.0.layer.{n}.DenseReluDense.wo.weight" for half_, n in HALVES}
    assert dtypes(cast_base(t5(), torch.bfloat16)).keys() == {torch.bfloat16}
    strict = t5()
    strict.encoder._keep_in_fp32_modules_strict = {"final_layer_norm"}
    assert dtypes(cast_base(strict, torch.bfloat16))[torch.float32] == {"encoder.final_layer_norm.weight"}


HALVES = (("encoder", 1), ("decoder", 2))


def test_names_that_transformers_declares_are_there() -> None:
    from transformers import DeepseekV3PreTrainedModel, T5PreTrainedModel

    assert T5PreTrainedModel._keep_in_fp32_modules == ["wo"]
    assert DeepseekV3PreTrainedModel._keep_in_fp32_modules_strict == ["e_score_correction_bias"]


def test_a_normalization_with_statistics_stays_as_it_is_and_runs() -> None:
    model, x = cnn(), torch.randn(4, 3, 6, 6)
    expected = model(x)
    found = dtypes(cast_base(model, torch.bfloat16))
    norms = {f"{name}.{of}" for name in ("norm", "last") for of in ("weight", "bias", "running_mean", "running_var")}
    assert found[torch.float32] == norms
    assert found[torch.bfloat16] == {"layer.weight", "layer.bias", "conv.weight", "conv.bias"}
    y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.05)


def test_parameters_stay_the_same_objects_and_tied() -> None:
    model = Tied()
    before = dict(model.named_parameters(remove_duplicate=False))
    cast_base(model, torch.bfloat16)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in before.items())
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.dtype == torch.bfloat16


def test_what_is_to_be_skipped_is_left_with_all_that_is_in_it_and_under_its_other_names() -> None:
    model = cast_base(Tied(), torch.bfloat16, skip=["head"])
    assert dtypes(model) == {
        torch.float32: {"embedding.weight"},
        torch.bfloat16: {"layer.weight", "layer.bias"},
    }
    encoder = cast_base(Encoder(), torch.bfloat16, skip=["self_attn"])
    assert all("self_attn" in name for name in dtypes(encoder)[torch.float32])
    assert encoder(torch.randn(4, 5, 8)).isfinite().all()


def test_adapters_are_left_and_their_base_is_cast() -> None:
    model = inject(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), LoRA(r=2, target_modules=["0"]))
    found = dtypes(cast_base(model, torch.bfloat16))
    assert found == {
        torch.float32: {f"0.adapters.default.lora_{name}" for name in "AB"},
        torch.bfloat16: {"0.weight", "0.bias", "1.weight", "1.bias"},
    }


def test_casting_again_or_back_changes_no_more_than_the_dtype() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    exact = copy.deepcopy(model[0].weight.detach())
    cast_base(cast_base(model, torch.bfloat16), torch.bfloat16)
    assert len(model[0]._forward_pre_hooks) == 1
    cast_base(model, torch.float32)
    assert dtypes(model).keys() == {torch.float32}
    assert torch.equal(model[0].weight, exact.bfloat16().float())
    assert model(torch.randn(3, 8)).dtype == torch.float32


def test_a_model_on_the_meta_device_is_cast() -> None:
    with torch.device("meta"):
        model = cast_base(llama(), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.is_meta for p in model.parameters())


EXACT = {"atol": 0.0, "rtol": 0.0}
FLOAT_MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5)), (4, 6)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1)), (2, 3, 6, 6)),
    "norm": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5)), (4, 6)),
    "attention": (lambda: Attention(True), (2, 5, 8)),
    "encoder": (Encoder, (2, 5, 8)),
    "recurrent": (Recurrent, (2, 5, 6)),
}


@pytest.mark.parametrize("kind", FLOAT_MODELS)
def test_an_input_in_fp32_gives_what_one_in_16_bits_gives(kind: str) -> None:
    make, shape = FLOAT_MODELS[kind]
    model, x = make(), torch.randn(shape)
    plain = copy.deepcopy(model).bfloat16()
    expected = plain(x.bfloat16())
    for ready in (cast_base(model, torch.bfloat16), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = ready(x)
        assert found.dtype == torch.bfloat16
        # the encoder's own sum of its input and attention's output is in fp32, and only then rounded
        torch.testing.assert_close(found, expected, **({"atol": 0.02, "rtol": 0.02} if kind == "encoder" else EXACT))


def test_masks_and_states_in_fp32_are_taken_as_well() -> None:
    x, mask = torch.randn(2, 5, 8), torch.zeros(5, 5).fill_diagonal_(-1.0)
    attention = cast_base(nn.MultiheadAttention(8, 2, batch_first=True), torch.bfloat16)
    assert attention(x, x, x, attn_mask=mask)[0].dtype == torch.bfloat16
    lstm = cast_base(nn.LSTM(8, 4, batch_first=True), torch.bfloat16)
    output, (h, c) = lstm(x, (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)))
    assert {output.dtype, h.dtype, c.dtype} == {torch.bfloat16}


def test_an_input_that_has_the_dtype_is_handed_on_as_it_is() -> None:
    layer = cast_base(nn.Linear(6, 5), torch.bfloat16)
    (hook,) = layer._forward_pre_hooks.values()
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    assert isinstance(hook, CastInputs)
    assert hook(layer, (x,), {}) is None
    args, kwargs = hook(layer, (), {"input": x.float()})
    assert args == ()
    assert torch.equal(kwargs["input"], x)


@pytest.mark.parametrize("adapted", [False, True])
def test_an_image_in_fp32_is_kept_for_the_backward_pass_in_16_bits_alone(adapted: bool) -> None:
    model = cast_base(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 4, 1)), torch.bfloat16)
    model.requires_grad_(not adapted)
    if adapted:
        inject(model, LoRA(r=2, target_modules=["0", "2"]))
    x, kept = torch.randn(2, 3, 16, 16), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    assert kept
    activations = [tensor for tensor in kept if not isinstance(tensor, nn.Parameter)]
    assert {tensor.dtype for tensor in activations} == {torch.bfloat16}
    assert x.untyped_storage().data_ptr() not in {tensor.untyped_storage().data_ptr() for tensor in kept}


@each("bert")
def test_no_method_keeps_hidden_states_in_fp32(subject: Subject) -> None:
    if subject.method is HFPeft:
        pytest.skip("the tuners are HF peft's own, and cast as they do")
    model = subject.put(cast_base(subject.case.build(), torch.bfloat16))
    hidden: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() == 3 and len(tensor) == ROWS and tensor.shape[-1] in (16, 24):
            hidden.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        subject.run(model.train())
    assert hidden
    assert {tensor.dtype for tensor in hidden} == {torch.bfloat16}


def test_under_autocast_inputs_are_left_to_it_but_for_what_a_normalization_could_not_take() -> None:
    model = cast_base(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5)), torch.bfloat16)
    linear = cast_base(nn.Linear(6, 5), torch.bfloat16)
    seen: list[torch.dtype] = []
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(4, 6)).dtype == torch.bfloat16
        assert linear(torch.randn(4, 6)).dtype == torch.bfloat16
    assert seen == [torch.float32]


def test_a_removed_adapter_leaves_a_base_that_still_takes_fp32() -> None:
    model = inject(cast_base(nn.Sequential(nn.Linear(6, 5)), torch.bfloat16), LoRA(r=2, target_modules=["0"]))
    assert remove(model)(torch.randn(4, 6)).dtype == torch.bfloat16
    assert model.float()(torch.randn(4, 6)).dtype == torch.float32


def test_a_compiled_model_casts_as_well() -> None:
    model = cast_base(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5)), torch.bfloat16)
    x = torch.randn(4, 6)
    expected = model(x)
    model.compile(backend="eager", fullgraph=True)
    assert torch.equal(model(x), expected)


def test_names_of_dtypes() -> None:
    assert [base_dtype_of(name) for name in ("bfloat16", "float16", "float32")] == [*HALF, torch.float32]
    assert base_dtype_of(torch.bfloat16) == torch.bfloat16
    with pytest.raises(PEFTError) as error:
        base_dtype_of("bf16")
    assert (
        str(error.value)
        == "base_dtype: 'bf16' is none of bfloat16, float16, float32; did you mean 'bfloat16' or 'float16'?"
    )
