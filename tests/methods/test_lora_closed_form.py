"""LoRA and DoRA on every kind of layer, against the same layer in float64 on a weight that is written out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from lightning_peft import DoRA, LoRA, inject, merge, unmerge

R, ALPHA = 4, 6.0
SCALE = ALPHA / R


def delta_matrix(A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    """s·BA in the shape of a Linear's weight."""
    return SCALE * B @ A


def delta_transposed(A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    """s·BA in the shape of a Conv1D's or Embedding's weight (in, out)."""
    return SCALE * (B @ A).T


def delta_conv(A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    """s·BA in the shape of a convolution's weight, channel by channel of the output; each reads its group's ranks."""
    out_channels, ranks_in_group = B.shape[:2]
    groups = A.shape[0] // ranks_in_group
    rows = []
    for channel in range(out_channels):
        first = channel // (out_channels // groups) * ranks_in_group
        rows.append(sum(B[channel, k].sum() * A[first + k] for k in range(ranks_in_group)))
    return SCALE * torch.stack(rows)


def last(weight: Tensor) -> Tensor:
    """‖row‖ over the inputs, shaped to divide a weight (…, out, in)."""
    return weight.square().sum(-1, keepdim=True).sqrt()


def first(weight: Tensor) -> Tensor:
    """‖column‖ over the inputs, shaped to divide a weight (…, in, out)."""
    return weight.square().sum(-2, keepdim=True).sqrt()


def all_but_channel(weight: Tensor) -> Tensor:
    """‖filter‖, shaped to divide a convolution's weight."""
    return weight.square().flatten(1).sum(1).sqrt().view(-1, *[1] * (weight.dim() - 1))


@dataclass
class Case:
    """One layer, an input, and what its weight becomes."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    delta: Callable[[Tensor, Tensor, Tensor], Tensor] = delta_matrix
    norm: Callable[[Tensor], Tensor] = last
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    kwargs: dict[str, Any] = field(default_factory=dict)


def conv(
    dim: int, channels_in: int, channels_out: int, kernel: int, shape_A: Any, shape_B: Any, **options: Any
) -> Case:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
    return Case(
        lambda: kind(channels_in, channels_out, kernel, **options),
        lambda: (torch.randn(2, channels_in, *[9, 8, 7][:dim]),),
        delta_conv,
        all_but_channel,
        {"weight": (shape_A, shape_B)},
    )


class ScaledEmbedding(nn.Embedding):
    """As transformers' Gemma has it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("embed_scale", torch.tensor(3.5), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale.to(self.weight.dtype)


def attention(**options: Any) -> Case:
    kdim, vdim = options.get("kdim", 12), options.get("vdim", 12)
    shapes: dict[str, Any] = {"in_proj_weight": ((R, 12), (36, R))}
    if (kdim, vdim) != (12, 12):
        shapes = {f"{n}_proj_weight": ((R, d), (12, R)) for n, d in (("q", 12), ("k", kdim), ("v", vdim))}
    return Case(
        lambda: nn.MultiheadAttention(12, 3, **options),
        lambda: (torch.randn(5, 2, 12), torch.randn(7, 2, kdim), torch.randn(7, 2, vdim)),
        shapes={**shapes, "out_proj.weight": ((R, 12), (12, R))},
    )


CASES = {
    "linear": Case(lambda: nn.Linear(10, 7), lambda: (torch.randn(3, 5, 10),), shapes={"weight": ((R, 10), (7, R))}),
    "linear-one-row": Case(lambda: nn.Linear(10, 7, bias=False), lambda: (torch.randn(10),)),
    "linear-no-row": Case(lambda: nn.Linear(10, 7), lambda: (torch.randn(0, 10),)),
    "conv1D": Case(
        lambda: Conv1D(7, 10), lambda: (torch.randn(3, 5, 10),), delta_transposed, first, {"weight": ((R, 10), (7, R))}
    ),
    "conv1d": conv(1, 6, 10, 3, (R, 6, 3), (10, R, 1), stride=2, padding=1),
    "conv1d-dilated-same": conv(1, 6, 10, 3, (R, 6, 3), (10, R, 1), dilation=2, padding="same"),
    "conv2d": conv(2, 6, 10, 3, (R, 6, 3, 3), (10, R, 1, 1), stride=(2, 1), padding=(1, 0), bias=False),
    "conv2d-1x1": conv(2, 6, 10, 1, (R, 6, 1, 1), (10, R, 1, 1)),
    "conv2d-groups": conv(2, 6, 10, 3, (R, 3, 3, 3), (10, R // 2, 1, 1), groups=2),
    "conv2d-depthwise": conv(2, 4, 8, 3, (R, 1, 3, 3), (8, 1, 1, 1), groups=4, padding=1),
    "conv2d-dilated-circular": conv(
        2, 6, 10, 3, (R, 6, 3, 3), (10, R, 1, 1), dilation=2, padding=2, padding_mode="circular"
    ),
    "conv2d-reflect": conv(2, 6, 10, 3, (R, 6, 3, 3), (10, R, 1, 1), padding=(2, 1), padding_mode="reflect"),
    "conv2d-replicate": conv(2, 6, 10, 3, (R, 6, 3, 3), (10, R, 1, 1), padding=1, padding_mode="replicate", stride=2),
    "conv3d": conv(3, 4, 6, (2, 3, 2), (R, 4, 2, 3, 2), (6, R, 1, 1, 1), padding=1, stride=2),
    "conv3d-groups-dilated": conv(3, 4, 6, 2, (R, 2, 2, 2, 2), (6, R // 2, 1, 1, 1), groups=2, dilation=2),
    "embedding": Case(
        lambda: nn.Embedding(11, 7),
        lambda: (torch.randint(0, 11, (3, 5)),),
        delta_transposed,
        first,
        {"weight": ((R, 11), (7, R))},
    ),
    "embedding-scaled": Case(
        lambda: ScaledEmbedding(11, 7), lambda: (torch.randint(0, 11, (3, 5)),), delta_transposed, first
    ),
    "attention": attention(),
    "attention-kdim-vdim": attention(kdim=8, vdim=10),
    "attention-bias-kv": attention(bias=False, add_bias_kv=True, add_zero_attn=True),
}
METHODS = {"LoRA": LoRA, "DoRA": DoRA}


def adapted(case: Case, method: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, nn.Module]:
    """A model of the one layer, every tensor of its adapter moved from its start; and the bare layer from before."""
    base = case.make().to(dtype)
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.5)  # Conv1D's and attention's biases start as zero
    model = inject(nn.Sequential(copy.deepcopy(base)), METHODS[method](r=R, alpha=ALPHA, target_modules=["0"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model, base


def by_weight(layer: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Adapter tensors (A, B, magnitude) by the name of the weight that they adapt."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in layer.named_parameters():
        before, is_adapter, after = name.partition("adapters.default.")
        if is_adapter:
            *weight, tensor = after.split(".")
            found.setdefault(before + ".".join(weight or ["weight"]), {})[tensor] = parameter
    return found


def effective_weights(case: Case, base: nn.Module, tensors: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    weights = {}
    for name, own in tensors.items():
        W = base.get_parameter(name)
        moved = W.detach() + case.delta(own["lora_A"], own["lora_B"], W)
        if "lora_magnitude_vector" in own:
            norm = case.norm(moved).detach()
            moved = own["lora_magnitude_vector"].reshape(norm.shape) * moved / norm
        weights[name] = moved
    return weights


def outputs_of(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_layer_equals_the_same_layer_on_the_adapted_weight(name: str, method: str) -> None:
    case = CASES[name]
    model, base = adapted(case, method)
    layer = model[0]
    inputs = tuple(x.double() if x.is_floating_point() else x for x in case.inputs())
    ours = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    oracle = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    tensors = by_weight(layer)
    for weight, (shape_A, shape_B) in case.shapes.items():
        assert (tuple(tensors[weight]["lora_A"].shape), tuple(tensors[weight]["lora_B"].shape)) == (shape_A, shape_B)

    output = outputs_of(layer(*ours))
    expected = outputs_of(functional_call(base, effective_weights(case, base, tensors), tuple(oracle)))
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-11)

    grad = torch.randn_like(output)
    flat = [t for own in tensors.values() for t in own.values()]
    found = torch.autograd.grad(output, [*flat, *(x for x in ours if x.requires_grad)], grad)
    wanted = torch.autograd.grad(expected, [*flat, *(x for x in oracle if x.requires_grad)], grad)
    assert len(found) == len(wanted) == len(flat) + sum(x.is_floating_point() for x in inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_merged_weight_is_the_adapted_weight(name: str, method: str) -> None:
    case = CASES[name]
    model, base = adapted(case, method)
    expected = effective_weights(case, base, by_weight(model[0]))
    merge(model)
    for key, weight in expected.items():
        torch.testing.assert_close(dict(model[0].named_parameters())[key], weight, rtol=1e-12, atol=1e-12)
    unmerge(model)
    after = dict(model[0].named_parameters())
    assert all(torch.equal(after[key], weight) for key, weight in base.named_parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [n for n in CASES if n != "linear-no-row"])
def test_bf16_base_with_fp32_adapters_stays_near_float64(name: str, method: str) -> None:
    case = CASES[name]
    model, base = adapted(case, method, torch.bfloat16)
    layer = model[0]
    inputs = tuple(x.bfloat16() if x.is_floating_point() else x for x in case.inputs())
    tensors = by_weight(layer)
    assert {t.dtype for own in tensors.values() for t in own.values()} == {torch.float32}
    output = outputs_of(layer(*inputs))
    assert output.dtype == torch.bfloat16
    exact = {key: {n: t.detach().double().requires_grad_() for n, t in own.items()} for key, own in tensors.items()}
    base = base.double()
    doubles = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    expected = outputs_of(functional_call(base, effective_weights(case, base, exact), doubles))
    # a bf16 number is within 2**-9 of the exact one; a few roundings stand in a row
    assert (output.double() - expected).norm() <= 2**-6 * expected.norm()
    grad = torch.randn_like(output)
    found = torch.autograd.grad(output, [t for own in tensors.values() for t in own.values()], grad)
    wanted = torch.autograd.grad(expected, [t for own in exact.values() for t in own.values()], grad.double())
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        # attention's softmax and second product round again
        assert (one.double() - other).norm() <= (2**-4 if name.startswith("attention") else 2**-5) * other.norm()


@pytest.mark.filterwarnings("error:merge")
def test_merging_a_layer_by_itself_warns_of_no_tie() -> None:
    model, base = adapted(CASES["linear"], "LoRA")
    expected = effective_weights(CASES["linear"], base, by_weight(model[0]))["weight"]
    merge(model[0])
    torch.testing.assert_close(model[0].weight, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm_type", [2.0, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_embedding_bounds_the_norm_of_adapted_rows(method: str, norm_type: float) -> None:
    case = Case(lambda: nn.Embedding(11, 7, max_norm=1.5, norm_type=norm_type), lambda: (), delta_transposed, first)
    model, base = adapted(case, method)
    layer = model[0]
    ids = torch.randint(0, 11, (3, 5))
    tensors = by_weight(layer)
    rows = effective_weights(case, base, tensors)["weight"][ids]
    norm = (rows.abs() ** norm_type).sum(-1, keepdim=True) ** (1 / norm_type)
    expected = torch.where(norm > 1.5, 1.5 * rows / (norm + 1e-7), rows)
    frozen = layer.weight.clone()
    output = layer(ids)
    assert (norm > 1.5).any()
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.weight, frozen)
    flat = list(tensors["weight"].values())
    grad = torch.randn_like(output)
    for one, other in zip(
        torch.autograd.grad(output, flat, grad), torch.autograd.grad(expected, flat, grad), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_padding_row_gets_no_update(method: str) -> None:
    case = Case(lambda: nn.Embedding(11, 7, padding_idx=2), lambda: (), delta_transposed, first)
    layer = adapted(case, method)[0][0]
    layer(torch.tensor([[2, 3, 2, 5]])).sum().backward()
    grad = layer.adapters["default"].lora_A.grad
    assert torch.equal(grad[:, 2], torch.zeros(R, dtype=torch.float64))
    assert grad[:, 3].abs().min() > 0


class Experts(nn.Module):
    """Three experts whose outputs are added; stored (experts, out, in), or (experts, in, out) as gpt-oss has them."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.weight = nn.Parameter(torch.randn(3, 5, 7) if transposed else torch.randn(3, 7, 5))
        self.gate = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        stack = [W.T if self.is_transposed else W for W in self.weight]
        return sum(F.linear(x, W) * g for W, g in zip(stack, (x @ self.gate.T).unsqueeze(-1).unbind(-2), strict=True))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_experts_and_loose_weights_equal_the_adapted_weight(method: str, transposed: bool) -> None:
    base = Experts(transposed).double()
    model = nn.ModuleDict({"experts": copy.deepcopy(base)})
    inject(
        model,
        METHODS[method](r=R, alpha=ALPHA, target_modules=[], target_parameters=["experts.weight", "experts.gate"]),
    )
    layer = model["experts"]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    tensors = by_weight(layer)
    own = tensors["weight"]
    assert tuple(own["lora_A"].shape) == (3, R, 5)
    assert tuple(own["lora_B"].shape) == (3, 7, R)
    assert {name: tuple(t.shape) for name, t in tensors["gate"].items() if name != "lora_magnitude_vector"} == {
        "lora_A": (R, 5),
        "lora_B": (3, R),
    }
    stack = torch.stack([SCALE * B @ A for A, B in zip(own["lora_A"], own["lora_B"], strict=True)])
    stack = (base.weight.detach().mT if transposed else base.weight.detach()) + stack
    gate = base.gate.detach() + SCALE * tensors["gate"]["lora_B"] @ tensors["gate"]["lora_A"]
    if method == "DoRA":
        stack = own["lora_magnitude_vector"][..., None] * stack / last(stack).detach()
        gate = tensors["gate"]["lora_magnitude_vector"][..., None] * gate / last(gate).detach()
    x = torch.randn(4, 5, dtype=torch.float64)
    output = layer(x)
    expected = functional_call(base, {"weight": stack.mT if transposed else stack, "gate": gate}, (x,))
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    flat = [t for one in tensors.values() for t in one.values()]
    grad = torch.randn_like(output)
    for one, other in zip(
        torch.autograd.grad(output, flat, grad), torch.autograd.grad(expected, flat, grad), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["linear", "conv1D", "conv2d", "embedding", "attention"])
def test_dora_row_of_zeros_stays_finite(name: str) -> None:
    case = CASES[name]
    base = case.make()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.zero_()
    model = inject(nn.Sequential(base), DoRA(r=R, target_modules=["0"]))
    output = outputs_of(model[0](*case.inputs()))
    assert torch.equal(output, torch.zeros_like(output))
    output.sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
