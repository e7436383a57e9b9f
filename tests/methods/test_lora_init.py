"""How A and B start: their statistics, and the part of the weight that PiSSA and OLoRA take, by numpy in float64."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft import DoRA, LoRA, inject, merge, remove


def conv1d(features_out: int, features_in: int) -> nn.Module:
    layer = Conv1D(features_out, features_in)
    nn.init.normal_(layer.weight)
    return layer


LAYERS = {
    "linear": lambda: nn.Linear(24, 40),
    "wide": lambda: nn.Linear(40, 24, bias=False),
    "conv1D": lambda: conv1d(40, 24),
    "conv": lambda: nn.Conv2d(5, 40, 3),
    "embedding": lambda: nn.Embedding(40, 24),
    "attention": lambda: nn.MultiheadAttention(24, 2),
}


def one(base: nn.Module, **fields: object) -> tuple[nn.Module, nn.Module]:
    """The adapted layer, and its low-rank part; of attention, that of `in_proj_weight`."""
    model = inject(nn.Sequential(base), LoRA(target_modules=["0"], **fields))  # type: ignore[arg-type]
    return model[0], part_of(model[0])


def part_of(layer: nn.Module) -> nn.Module:
    adapter = layer.adapters["default"]
    return adapter.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else adapter


def matrix(layer: nn.Module) -> np.ndarray:
    """The frozen weight as (out, in), in float64."""
    if isinstance(layer, nn.MultiheadAttention):
        return layer._parameters["in_proj_weight"].detach().double().numpy()
    weight = layer._parameters["weight"].detach().double().numpy()
    return weight.T if isinstance(layer, (nn.Embedding, Conv1D)) else weight.reshape(len(weight), -1)


def product(part: nn.Module) -> np.ndarray:
    """s·BA as (out, in), in float64."""
    A, B = (tensor.detach().double().flatten(1).numpy() for tensor in (part.lora_A, part.lora_B))
    return part.scale * B @ A


def uniform_bound(A: Tensor, fan_in: int) -> None:
    """Kaiming-uniform with a = √5 is uniform in ±1/√fan_in: all inside, the edge nearly reached, variance a third."""
    bound = 1 / math.sqrt(fan_in)
    assert A.abs().max() <= bound
    assert A.abs().max() > 0.99 * bound
    assert A.var().item() == pytest.approx(bound**2 / 3, rel=0.1)
    assert abs(A.mean().item()) < 4 * bound / math.sqrt(3 * A.numel())


@pytest.mark.parametrize(
    ("base", "fan_in"),
    [
        (nn.Linear(200, 30), 200),
        (Conv1D(30, 200), 200),
        (nn.Conv2d(20, 30, (3, 5)), 20 * 15),
        (nn.Conv3d(20, 32, 2, groups=4), 5 * 8),
        (nn.MultiheadAttention(200, 4), 200),
    ],
)
def test_default_is_kaiming_uniform_and_zero(base: nn.Module, fan_in: int) -> None:
    _, part = one(copy.deepcopy(base), r=16)
    uniform_bound(part.lora_A, fan_in)
    assert torch.count_nonzero(part.lora_B) == 0


def test_each_expert_starts_as_a_layer_of_its_own() -> None:
    model = nn.ModuleDict({"experts": nn.Module()})
    model["experts"].weight = nn.Parameter(torch.randn(3, 30, 200))
    inject(model, LoRA(r=16, target_modules=[], target_parameters=["experts.weight"]))
    A, B = (getattr(model["experts"].adapters["default"].weight, f"lora_{name}") for name in "AB")
    assert (tuple(A.shape), tuple(B.shape)) == ((3, 16, 200), (3, 30, 16))
    for expert in A:
        uniform_bound(expert, 200)
    assert torch.count_nonzero(B) == 0


@pytest.mark.parametrize("r", [4, 32])
def test_gaussian_has_deviation_one_over_r(r: int) -> None:
    for base in (nn.Linear(2000, 30), nn.Conv1d(500, 30, 4)):
        _, part = one(base, r=r, init="gaussian")
        count = part.lora_A.numel()
        assert part.lora_A.std().item() == pytest.approx(1 / r, rel=4 / math.sqrt(2 * count))
        assert abs(part.lora_A.mean().item()) < 4 / r / math.sqrt(count)
        # a normal's fourth moment is three times its variance squared; a uniform's 1.8
        assert ((part.lora_A * r) ** 4).mean().item() == pytest.approx(3, rel=0.2)
        assert torch.count_nonzero(part.lora_B) == 0


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_embedding_starts_with_a_zero_lookup_and_normal_rows(init: str) -> None:
    _, part = one(nn.Embedding(50, 300), r=16, init=init)
    assert torch.count_nonzero(part.lora_A) == 0
    assert part.lora_B.std().item() == pytest.approx(1, rel=4 / math.sqrt(2 * part.lora_B.numel()))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_pissa_starts_from_the_truncated_svd(kind: str, rslora: bool) -> None:
    layer, part = one(LAYERS[kind](), r=6, alpha=9, rslora=rslora, init="pissa")
    assert part.scale == pytest.approx(9 / math.sqrt(6) if rslora else 9 / 6)
    U, S, Vt = np.linalg.svd(matrix(layer), full_matrices=False)
    np.testing.assert_allclose(product(part), (U[:, :6] * S[:6]) @ Vt[:6], atol=2e-5 * S[0])
    # both factors carry the root of the singular values, which no sign changes
    A, B = (tensor.detach().double().flatten(1).numpy() for tensor in (part.lora_A, part.lora_B))
    np.testing.assert_allclose(A @ A.T, np.diag(S[:6] / part.scale), atol=1e-5 * S[0])
    np.testing.assert_allclose(B.T @ B, np.diag(S[:6] / part.scale), atol=1e-5 * S[0])


def test_pissa_by_iteration_is_near_the_svd() -> None:
    base = nn.Linear(96, 80)
    layer, part = one(base, r=8, init="pissa_niter_16")
    U, S, Vt = np.linalg.svd(matrix(layer), full_matrices=False)
    best = (U[:, :8] * S[:8]) @ Vt[:8]
    # a random weight's singular values lie close together, the hardest case: near in what is left, not in every entry
    left, least = np.linalg.norm(matrix(layer) - product(part)), np.linalg.norm(matrix(layer) - best)
    assert least <= left <= 1.005 * least
    decaying = nn.Linear(96, 80)
    with torch.no_grad():
        decaying.weight.copy_(torch.from_numpy((U * 2.0 ** -np.arange(80)) @ Vt))
    layer, part = one(decaying, r=8, init="pissa_niter_16")
    np.testing.assert_allclose(product(part), (U[:, :8] * 2.0 ** -np.arange(8)) @ Vt[:8], atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_olora_starts_from_the_first_columns_of_qr(kind: str) -> None:
    layer, part = one(LAYERS[kind](), r=6, alpha=9, init="olora")
    W = matrix(layer)
    Q, R = np.linalg.qr(W)
    np.testing.assert_allclose(product(part), part.scale * Q[:, :6] @ R[:6], atol=2e-5 * np.abs(W).max() * 6)
    B = part.lora_B.detach().double().flatten(1).numpy()
    np.testing.assert_allclose(B.T @ B, np.eye(6), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize("init", ["default", "gaussian", "pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("kind", LAYERS)
def test_start_is_the_frozen_model_and_keeps_its_bits(
    kind: str, init: str, method: type[LoRA], dtype: torch.dtype
) -> None:
    base = nn.Sequential(LAYERS[kind]().to(dtype))
    before = copy.deepcopy(base)
    x = torch.randn(3, 24, dtype=dtype)
    x = {"wide": torch.randn(3, 40, dtype=dtype), "conv": torch.randn(2, 5, 6, 6, dtype=dtype)}.get(kind, x)
    inputs = [torch.arange(40)] if kind == "embedding" else [x]
    inputs = inputs * 3 if kind == "attention" else inputs
    expected = before[0](*inputs)
    inject(base, method(r=6, init=init, target_modules=["0"]))
    output = base[0](*inputs)
    if kind == "attention":
        output, expected = output[0], expected[0]
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    distance = ((output - expected).abs().max() / expected.abs().max()).item()
    assert distance <= (0 if init in ("default", "gaussian") and method is LoRA else 2 * tolerance)
    for name, tensor in before.state_dict().items():
        found = base.state_dict()[name]
        assert found.dtype == dtype
        assert torch.equal(found, tensor)
    assert {p.dtype for p in base.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_starting_tensors_stay_while_the_trained_move(init: str) -> None:
    base = nn.Linear(24, 40)
    model = inject(nn.Sequential(base), LoRA(r=6, init=init, target_modules=["0"]))
    part = model[0].adapters["default"]
    assert set(model.state_dict()) == {
        "0.weight",
        "0.bias",
        *(f"0.adapters.default.lora_{name}" for name in ("A", "B", "A0", "B0")),
    }
    start = part.lora_A.detach().clone(), part.lora_B.detach().clone()
    frozen = base.weight.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 24)).square().sum().backward()
        optimizer.step()
    assert torch.equal(part.lora_A0, start[0])
    assert torch.equal(part.lora_B0, start[1])
    assert (part.lora_A - start[0]).abs().mean() > 0.01
    moved = part.scale * (part.lora_B.double() @ part.lora_A.double() - start[1].double() @ start[0].double())
    merge(model)
    torch.testing.assert_close(model[0].weight.double(), frozen.double() + moved, rtol=1e-5, atol=1e-5)
    remove(model)
    assert torch.equal(base.weight, frozen)
    assert type(base) is nn.Linear


def test_rank_may_be_as_large_as_the_weight_allows() -> None:
    layer, part = one(nn.Linear(24, 40), r=24, init="pissa")
    np.testing.assert_allclose(product(part), matrix(layer), atol=1e-5)
    layer, part = one(nn.Linear(24, 40), r=24, alpha=24, init="olora")
    np.testing.assert_allclose(product(part), matrix(layer), atol=1e-5)


def test_magnitude_starts_as_the_rows_norm() -> None:
    for kind, make in LAYERS.items():
        model = inject(nn.Sequential(make()), DoRA(r=4, target_modules=["0"]))
        magnitude = part_of(model[0]).lora_magnitude_vector
        norms = np.linalg.norm(matrix(model[0]), axis=1)
        np.testing.assert_allclose(magnitude.detach().numpy(), norms, rtol=1e-6, err_msg=kind)


def test_start_follows_the_seed() -> None:
    starts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        starts.append(one(nn.Linear(24, 40), r=4)[1].lora_A)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
