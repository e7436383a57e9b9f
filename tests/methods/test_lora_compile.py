"""Adapted layers under torch.compile: the same outputs and gradients as without it, dropout included."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft import DoRA, LoRA, inject

LAYERS = {
    "linear": (lambda: nn.Linear(16, 8), (4, 6, 16)),
    "conv1D": (lambda: Conv1D(8, 16), (4, 6, 16)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 7)),
    "embedding": (lambda: nn.Embedding(16, 8), None),
    "attention": (lambda: SelfAttention(16, 2), (5, 3, 16)),
}


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_and_input(kind: str, method: type, **options: Any) -> tuple[nn.Sequential, Tensor]:
    make, shape = LAYERS[kind]
    model = inject(nn.Sequential(make(), nn.Tanh()), method(r=4, target_modules=["0"], **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model, torch.randint(0, 16, (3, 5)) if shape is None else torch.randn(*shape, requires_grad=True)


def outputs_and_gradients(model: nn.Module, x: Tensor, trained: nn.Module) -> list[Tensor]:
    output = model(x)
    wanted = [p for p in trained.parameters() if p.requires_grad] + ([x] if x.requires_grad else [])
    return [output, *torch.autograd.grad(output.square().sum(), wanted)]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-6) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize("kind", LAYERS)
def test_compiled_equals_eager_in_one_graph(kind: str, method: type) -> None:
    model, x = model_and_input(kind, method)
    expected = outputs_and_gradients(model, x, model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(outputs_and_gradients(compiled, x, model), expected)


@pytest.mark.parametrize("mode", ["bf16", "autocast"])
@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_compiled_equals_eager_in_bf16(kind: str, mode: str) -> None:
    model, x = model_and_input(kind, LoRA)
    if mode == "bf16":
        model[0].weight.data = model[0].weight.data.bfloat16()
        if getattr(model[0], "bias", None) is not None:
            model[0].bias.data = model[0].bias.data.bfloat16()
        x = x.detach().bfloat16().requires_grad_() if x.is_floating_point() else x
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        expected = outputs_and_gradients(model, x, model)
        found = outputs_and_gradients(torch.compile(model, backend="aot_eager", fullgraph=True), x, model)
    assert_same(found, expected, 2**-6)


def test_compiled_in_place_follows_the_adapter_and_the_batch() -> None:
    model, x = model_and_input("linear", LoRA)
    eager = copy.deepcopy(model)
    model.compile(backend="aot_eager")
    for batch in (x, torch.randn(2, 6, 16), torch.randn(7, 3, 16)):
        torch.testing.assert_close(model(batch), eager(batch), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        model[0].adapters["default"].lora_B.mul_(3)
        eager[0].adapters["default"].lora_B.mul_(3)
    torch.testing.assert_close(model(x), eager(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "fullgraph"),
    [
        ("linear", True),
        ("conv", False),
        ("conv", True),
    ],
)
def test_compiled_dropout_uses_one_mask_for_output_and_gradient(kind: str, fullgraph: bool) -> None:
    """The layer is made the identity, so that its output on ones, and x's gradient, are the mask itself."""
    p, width = 0.25, 12
    base = nn.Linear(width, width, bias=False) if kind == "linear" else nn.Conv1d(width, width, 1, bias=False)
    nn.init.zeros_(base.weight)
    model = inject(nn.Sequential(base), LoRA(r=width, alpha=width, dropout=p, target_modules=["0"]))
    for name in ("lora_A", "lora_B"):
        tensor = getattr(model[0].adapters["default"], name)
        tensor.data = torch.eye(width).view(tensor.shape)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    x = torch.ones(50, width, requires_grad=True) if kind == "linear" else torch.ones(5, width, 10, requires_grad=True)
    masks = [compiled(x) for _ in range(2)]
    for mask in masks:
        grad, grad_A = torch.autograd.grad(mask.sum(), [x, model[0].adapters["default"].lora_A])
        torch.testing.assert_close(grad, mask)
        channel = mask.sum(0) if kind == "linear" else mask.sum((0, 2))
        # d/dA of the sum over outputs and rows: every row of A gets the sum of its input column
        torch.testing.assert_close(grad_A.view(width, width), channel.expand(width, width))
        assert mask.detach().unique().tolist() == pytest.approx([0, 1 / (1 - p)])
        kept = (mask != 0).double().mean().item()
        assert abs(kept - (1 - p)) < 4 * (p * (1 - p) / mask.numel()) ** 0.5
    assert not torch.equal(*masks)
    compiled.eval()
    assert torch.equal(compiled(x), torch.ones_like(x))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ on a CPU")
def test_inductor_equals_eager() -> None:
    model, x = model_and_input("linear", LoRA)
    expected = outputs_and_gradients(model, x, model)
    found = outputs_and_gradients(torch.compile(model, backend="inductor", fullgraph=True), x, model)
    assert_same(found, expected, 1e-5)
