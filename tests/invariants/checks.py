"""What is compared before and after: bits, ties, classes and attributes, outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import PEFTError, trainable_parameters
from lightning_peft.methods._host import hosts

Result = tuple[Tensor, dict[str, Tensor]]


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    assert [t.dtype for t in ours.values()] == [t.dtype for t in theirs.values()]
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def ties(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one tensor."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def frame(model: nn.Module) -> dict[str, object]:
    """All that is not a tensor's value: classes, attributes, modes, what trains."""
    return {
        path: (
            type(module),
            sorted(vars(module)),
            module.training,
            [(n, p.requires_grad) for n, p in module.named_parameters()],
        )
        for path, module in model.named_modules()
    }


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> Result:
    """The output, and the trainable parameters' gradients of a sum of it with fixed weights."""
    model.zero_grad()
    y = run()
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    (y.to(torch.promote_types(y.dtype, torch.float32)) * weights).sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in trainable_parameters(model).items() if p.grad is not None}


def assert_same(ours: Result, theirs: Result, tolerance: float) -> None:
    assert ours[1].keys() == theirs[1].keys()
    assert ours[1]
    torch.testing.assert_close(ours[0], theirs[0], atol=tolerance, rtol=tolerance)
    for name in ours[1]:
        size = max(1.0, theirs[1][name].abs().max().item())
        difference = (ours[1][name] - theirs[1][name]).abs().max().item()
        assert difference <= tolerance * size, f"{name}: {difference}"


def assert_aligned(ours: Result, theirs: Result) -> None:
    """Output and gradients point the same way, as far as bf16 can tell."""
    assert ours[1].keys() == theirs[1].keys()
    pairs = [(ours[0], theirs[0]), *((ours[1][name], theirs[1][name]) for name in ours[1])]
    cosines = [torch.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0).item() for a, b in pairs]
    assert min(cosines) > 0.95, cosines


def merged_result(model: nn.Module, base: nn.Module, run: Callable[[nn.Module], Tensor]) -> Result:
    """As `gradients`, but of the bare `base` run with the merged weights of `model`, through which they flow back.

    Skips where the method's adapters can't be merged.
    """
    try:
        merged = {f"{path}.{name}": tensor for path, host in hosts(model)
                  for name, tensor in host.adapters["default"].merged(host).items()}  # fmt: skip
    except PEFTError as error:
        pytest.skip(str(error))

    class WithMerged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = base

        def forward(self) -> Tensor:
            return run(self.base)

    inner = {f"base.{name}": tensor for name, tensor in merged.items()}
    return gradients(model, lambda: torch.func.functional_call(WithMerged(), inner, (), tie_weights=False))
