"""The autograd functions under LoRA: gradients against numerical and float64 ones, dropout, and use more than once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import DoRA, LoRA, inject
from lightning_peft.methods._low_rank import adapted_linear, linear_update

SCALE = 0.7


def plain(y: Tensor, x: Tensor, A: Tensor, B: Tensor, factor: Tensor | float = 1.0) -> Tensor:
    """y + s·B(A·(factor∘x)), with nothing but torch's own operations."""
    return y + SCALE * ((factor * x) @ A.T @ B.T)


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def update(y: Tensor, x: Tensor, A: Tensor, B: Tensor, p: float = 0.0, scale: float = SCALE) -> Tensor:
    return linear_update(y, x, A, B, scale=scale, p=p, training=True)


def with_layer(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, p: float = 0.0) -> Tensor:
    return adapted_linear(x, W, b, A, B, scale=SCALE, p=p, training=True)


def seeded(function: Callable[..., Tensor], p: float) -> Callable[..., Tensor]:
    """`function` with the same mask at every call."""

    def same(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return function(*tensors, p=p)

    return same


def layer(
    kind: str, dropout: float = 0.0, dtype: torch.dtype = torch.float64, method: type[LoRA] = LoRA
) -> nn.Sequential:
    """A model of one adapted layer whose B (embedding: A) is not zero."""
    base: nn.Module = {
        "linear": lambda: nn.Linear(5, 4),
        "conv": lambda: nn.Conv1d(3, 4, 3, padding=1),
        "embedding": lambda: nn.Embedding(6, 4),
    }[kind]()
    model = inject(nn.Sequential(base.to(dtype)), method(r=2, alpha=2 * SCALE, dropout=dropout, target_modules=["0"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
    return model


def layer_input(kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    if kind == "embedding":
        return torch.tensor([[0, 1, 2], [2, 5, 5]])
    return torch.randn(*((2, 3, 5) if kind == "linear" else (2, 3, 6)), dtype=dtype, requires_grad=True)


def in_layer(kind: str, dropout: float) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A layer as a function of x, A and B, its mask the same at every call, and where to take it."""
    model, x = layer(kind, dropout), layer_input(kind)
    names = ["0.adapters.default.lora_A", "0.adapters.default.lora_B"]
    A, B = (dict(model.named_parameters())[name].detach().clone().requires_grad_() for name in names)

    def function(*given: Tensor) -> Tensor:
        torch.manual_seed(3)
        *maybe_x, A, B = given
        adapter = model[0].adapters["default"]
        del adapter._parameters["lora_A"], adapter._parameters["lora_B"]
        adapter._parameters.update(lora_A=A, lora_B=B)
        return model(*maybe_x or [x])

    return function, [A, B] if kind == "embedding" else [x, A, B]


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_linear_update_passes_gradcheck_to_second_order(p: float) -> None:
    inputs = leaves((2, 3, 4), (2, 3, 5), (2, 5), (4, 2))
    assert torch.autograd.gradcheck(seeded(update, p), inputs)
    assert torch.autograd.gradgradcheck(seeded(update, p), inputs)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_adapted_linear_passes_gradcheck_to_second_order(p: float) -> None:
    inputs = leaves((2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))
    assert torch.autograd.gradcheck(seeded(with_layer, p), inputs)
    assert torch.autograd.gradgradcheck(seeded(with_layer, p), inputs)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_layers_pass_gradcheck(kind: str, p: float) -> None:
    function, inputs = in_layer(kind, p)
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_second_order_gradients_are_right_or_refused(kind: str) -> None:
    function, inputs = in_layer(kind, 0.0)
    try:
        assert torch.autograd.gradgradcheck(function, inputs)
    except RuntimeError as error:
        if "once_differentiable" not in str(error):
            raise


SHAPES = {"y": (4, 7, 48), "x": (4, 7, 64), "W": (48, 64), "b": (48,), "A": (8, 64), "B": (48, 8)}
ENTRIES = {
    "update": ("yxAB", update, plain),
    "with layer": ("xWbAB", with_layer, lambda x, W, b, A, B: plain(x @ W.T + b, x, A, B)),
}


def compared(entry: str, dtypes: dict[str, torch.dtype], frozen: str = "") -> list[tuple[torch.dtype, float]]:
    """dtype, and relative distance to float64's, of the output and then of every gradient."""
    names, function, formula = ENTRIES[entry]
    inputs = [
        torch.randn(SHAPES[name]).to(dtypes.get(name, torch.float32)).requires_grad_(name not in frozen)
        for name in names
    ]
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    output, expected = function(*inputs), formula(*exact)
    grad = torch.randn_like(output)
    found = torch.autograd.grad(output, [t for t in inputs if t.requires_grad], grad)
    wanted = torch.autograd.grad(expected, [t for t in exact if t.requires_grad], grad.double())
    assert len(found) == len(names) - len(frozen)
    return [
        (one.dtype, ((one.double() - other).norm() / other.norm()).item())
        for one, other in zip((output, *found), (expected, *wanted), strict=True)
    ]


@pytest.mark.parametrize("frozen", ["", "x", "Wb", "xWb", "A", "B", "y"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_fp32_gradients_agree_with_float64_autograd(entry: str, frozen: str) -> None:
    frozen = "".join(name for name in frozen if name in ENTRIES[entry][0])
    results = compared(entry, {}, frozen)
    assert {dtype for dtype, _ in results} == {torch.float32}
    assert max(distance for _, distance in results) < 1e-6


@pytest.mark.parametrize("x_dtype", ["of y", torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_output_with_fp32_adapters(dtype: torch.dtype, x_dtype: torch.dtype | str) -> None:
    x_dtype = dtype if isinstance(x_dtype, str) else x_dtype
    results = compared("update", {"y": dtype, "x": x_dtype})
    assert [found for found, _ in results] == [dtype, dtype, x_dtype, torch.float32, torch.float32]
    assert max(distance for _, distance in results) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_layer_with_fp32_adapters(dtype: torch.dtype) -> None:
    results = compared("with layer", dict.fromkeys("xWb", dtype))
    assert [found for found, _ in results] == [*[dtype] * 4, torch.float32, torch.float32]
    assert max(distance for _, distance in results) < torch.finfo(dtype).eps


def test_frozen_output_is_not_written_to() -> None:
    y, x, A, B = leaves((4, 5), (4, 5), (2, 5), (5, 2))
    before = y.detach().clone()
    assert not torch.equal(update(y, x, A, B, 0.5), before)
    assert torch.equal(y, before)


def as_mask(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """What dropout multiplies each element of `x` with, as seen in the output, and as seen in x's gradient."""
    width = x.shape[-1]
    eye = torch.eye(width, dtype=x.dtype)
    ones = torch.ones_like(x).requires_grad_()
    output = update(torch.zeros(x.shape, dtype=x.dtype), ones, eye, eye.clone().requires_grad_(), p, scale=1.0)
    return output.detach(), torch.autograd.grad(output.sum(), ones)[0]


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.zeros(6, 8), id="2-d"),
        pytest.param(torch.zeros(3, 6, 8), id="3-d"),
        pytest.param(torch.zeros(6, 3, 8).transpose(0, 1), id="batch second"),
        pytest.param(torch.zeros(6, 16)[:, ::2], id="strided"),
        pytest.param(torch.zeros(8, 6).T, id="transposed"),
        pytest.param(torch.zeros(1, 8, 6).mT, id="channels first"),
        pytest.param(torch.zeros(6, 8, dtype=torch.bfloat16), id="bf16"),
    ],
)
def test_backward_uses_the_mask_of_forward(x: Tensor) -> None:
    seen, in_gradient = as_mask(x, 0.5)
    assert set(seen.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(in_gradient, seen)


def test_dropout_is_the_plain_formula_under_its_mask() -> None:
    p = 0.3
    inputs = leaves((6, 9, 4), (6, 9, 16), (2, 16), (4, 2))
    torch.manual_seed(5)
    mask, _ = as_mask(inputs[1], p)
    torch.manual_seed(5)
    output = update(*inputs, p=p)
    expected = plain(*inputs, factor=mask)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(output)
    for one, other in zip(
        torch.autograd.grad(output, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_dropout_keeps_the_mean_and_drops_at_its_rate() -> None:
    p, width, rows = 0.3, 16, 40_000
    mask, _ = as_mask(torch.zeros(rows, width, dtype=torch.float64), p)
    count = rows * width
    kept = (mask != 0).sum().item() / count
    # four standard deviations of a mean of `count` draws
    assert abs(kept - (1 - p)) < 4 * math.sqrt(p * (1 - p) / count)
    assert abs(mask.mean().item() - 1) < 4 * math.sqrt(p / (1 - p) / count)
    assert mask.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    # no pattern by row or by column
    assert (mask.mean(0) - 1).abs().max() < 5 * math.sqrt(p / (1 - p) / rows)
    assert (mask[:-1] * mask[1:]).mean().item() == pytest.approx(1, abs=0.01)


def test_each_call_drops_anew_and_follows_the_global_seed() -> None:
    x = torch.zeros(16, 16)
    torch.manual_seed(1)
    one, other = as_mask(x, 0.5)[0], as_mask(x, 0.5)[0]
    torch.manual_seed(1)
    again = as_mask(x, 0.5)[0]
    assert torch.equal(one, again)
    assert 64 < (one != other).sum() < 192


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_eval_mode_has_no_dropout_and_draws_nothing(kind: str) -> None:
    with_dropout, x = layer(kind, 0.5), layer_input(kind)
    without = layer(kind, 0.0)
    without.load_state_dict(with_dropout.state_dict())
    state = torch.get_rng_state()
    assert torch.equal(with_dropout.eval()(x), without.eval()(x))
    assert torch.equal(without.train()(x), without.eval()(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(with_dropout.train()(x), without(x))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_two_uses_in_one_graph_add_their_gradients(kind: str, dropout: float) -> None:
    model = layer(kind, dropout)
    inputs = layer_input(kind), layer_input(kind)
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(9)
    one, other = model(inputs[0]), model(inputs[1])
    together = torch.autograd.grad(one.sin().sum() + (other**2).sum() + (one * other).sum(), trained)
    torch.manual_seed(9)
    one, other = model(inputs[0]), model(inputs[1])
    grads_one = torch.autograd.grad(one, trained, one.cos().detach() + other.detach())
    grads_other = torch.autograd.grad(other, trained, 2 * other.detach() + one.detach())
    for sum_, a, b in zip(together, grads_one, grads_other, strict=True):
        torch.testing.assert_close(sum_, a + b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_non_reentrant_checkpointing_changes_no_bit(kind: str, dropout: float) -> None:
    model = nn.Sequential(layer(kind, dropout), nn.Tanh())
    x = layer_input(kind)
    trained = [p for p in model.parameters() if p.requires_grad] + ([x] if x.requires_grad else [])
    torch.manual_seed(4)
    expected = model(x)
    wanted = torch.autograd.grad(expected.square().sum(), trained)
    torch.manual_seed(4)
    output = checkpoint(model, x, use_reentrant=False)
    torch.rand(3)  # the generator has moved on by the time of the backward pass
    found = torch.autograd.grad(output.square().sum(), trained)
    assert torch.equal(output, expected)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_autocast_computes_in_its_dtype_and_keeps_fp32_gradients(kind: str, method: type[LoRA]) -> None:
    model, x = layer(kind, dtype=torch.float32, method=method), layer_input(kind, torch.float32)
    exact = copy.deepcopy(model).double()
    x64 = x.detach().double() if x.is_floating_point() else x
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    expected = exact(x64)
    assert output.dtype == (torch.float32 if kind == "embedding" else torch.bfloat16)
    grad = torch.randn_like(output)
    output.backward(grad)
    expected.backward(grad.double())
    tolerance = 2**-7 if method is LoRA else 2**-6
    assert (output.double() - expected).norm() <= tolerance * expected.norm()
    for one, other in zip(model.parameters(), exact.parameters(), strict=True):
        if one.requires_grad:
            assert one.grad.dtype == torch.float32
            assert (one.grad.double() - other.grad).norm() <= tolerance * other.grad.norm()


class InFp32(nn.Linear):
    """A router that computes in fp32 whatever autocast says, as mixtures of experts have it."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def test_a_layer_that_computes_in_fp32_under_autocast_keeps_it() -> None:
    model = inject(nn.Sequential(InFp32(8, 4)), LoRA(r=2, target_modules=["0"]))
    nn.init.normal_(model[0].adapters["default"].lora_B)
    x = torch.randn(3, 8)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)


class Elementwise(nn.Module):
    """Multiplies by its weight without any operation that autocast casts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 7))

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-2) * self.weight).sum(-1)


def test_a_loose_weight_keeps_its_bits_under_autocast() -> None:
    base, x = nn.ModuleDict({"layer": Elementwise()}), torch.randn(3, 7)
    with torch.autocast("cpu", torch.bfloat16):
        expected = base["layer"](x)
        inject(base, LoRA(r=2, target_modules=[], target_parameters=["layer.weight"]))
        assert torch.equal(base["layer"](x), expected)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize("kind", ["given output", "layer", "layer with bias"])
def test_the_output_may_be_changed_in_place(shape: tuple[int, ...], kind: str) -> None:
    x, A, B, W = leaves(shape, (2, 5), (4, 2), (4, 5))
    W.requires_grad_(False)
    b = torch.randn(4, dtype=torch.float64) if kind == "layer with bias" else None
    y = x.detach() @ W.T
    keep = torch.rand(*shape[:-1], 4) > 0.5

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((out * torch.arange(4.0)).sum(), [x, A, B])

    given = kind == "given output"
    changed = update(y, x, A, B) if given else with_layer(x, W, b, A, B)
    changed[~keep] = 0
    changed.mul_(2)
    expected = 2 * keep * plain(y if given else x @ W.T + (0 if b is None else b), x, A, B)
    torch.testing.assert_close(changed, expected)
    for ours, theirs in zip(gradients(changed), gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs)
