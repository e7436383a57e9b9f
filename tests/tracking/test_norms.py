"""Norms of adapters, of their gradients and of what a step changes, against sums in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft import LoRA, inject
from lightning_peft.tracking.monitor.norms import CHUNK, StepNorms, adapter_norms, norms, trained_groups


def brute(*tensors: Tensor) -> float:
    return math.sqrt(sum(float((tensor.detach().double() ** 2).sum()) for tensor in tensors))


def adapted(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.ModuleDict({"q": nn.Linear(8, 4)}), "head": nn.Linear(4, 2)})
    inject(model, LoRA(r=2, target_modules=["a", "q"], **fields), modules_to_save=["head"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
    return model


def output(model: Any) -> Tensor:
    return model["head"](model["b"]["q"](model["a"](torch.ones(3, 8)))).square().sum()


class Reads(TorchDispatchMode):
    """Counts the times that the host asks a tensor for a number, as `item` and `float` do."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_an_adapter_s_norms_are_those_of_all_its_tensors() -> None:
    model = adapted()
    own = {path: model.get_submodule(f"{path}.adapters.default") for path in ("a", "b.q", "head")}
    assert adapter_norms(model) == {path: pytest.approx(brute(*own[path].parameters()), rel=1e-12) for path in own}
    inject(model, LoRA(r=1, target_modules=["a"]), adapter_name="other")
    other = model.get_submodule("a.adapters.other")
    # the one that doesn't train as well as the one that does
    assert adapter_norms(model, "other") == {"a": pytest.approx(brute(*other.parameters()))}
    assert list(adapter_norms(model)) == ["a", "b.q", "head"]
    assert adapter_norms(model, "none") == adapter_norms(nn.Linear(2, 2)) == {}


def test_a_shared_tensor_counts_once() -> None:
    tied = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    tied["head"].weight = tied["embed"].weight
    assert {path: len(own) for path, own in trained_groups(tied).items()} == {"embed": 1}
    inject(tied, LoRA(r=2, target_modules=["embed"]))
    assert list(trained_groups(tied)) == list(adapter_norms(tied)) == ["embed"]


def test_without_adapters_every_module_with_trained_parameters_is_a_group() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.body = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3).requires_grad_(False))

    root = Root()
    assert {path: [*map(id, own)] for path, own in trained_groups(root).items()} == {
        "(root)": [id(root.scale)],
        "body.0": [id(root.body[0].weight), id(root.body[0].bias)],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_accumulated_in_float64(dtype: torch.dtype) -> None:
    large = torch.randn(CHUNK + 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    tiny, huge = torch.full((3, 2), 1e-30).to(dtype), torch.full((2,), 1e30).to(dtype)
    scalar, none = torch.tensor(2.0, dtype=dtype), torch.zeros(0, dtype=dtype)
    transposed = torch.arange(6.0).reshape(2, 3).T.to(dtype)
    groups = {"large": [large, scalar], "tiny": [tiny], "huge": [huge], "none": [none], "transposed": [transposed]}
    assert norms(groups) == {name: pytest.approx(brute(*own), rel=1e-12) for name, own in groups.items()}
    # where float32 would add up to something else
    if dtype == torch.float32:
        assert abs(float(large.norm()) / brute(large) - 1) > 1e-9
        assert float(tiny.norm()) == 0
        assert math.isinf(float(huge.norm()))


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def test_a_step_of_two_optimizers_one_of_which_steps_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    groups = trained_groups(model)
    first = torch.optim.AdamW(groups["a"], lr=0.1)
    second = torch.optim.SGD([*groups["b.q"], *groups["head"]], lr=0.01)
    before = {path: [parameter.detach().clone() for parameter in own] for path, own in groups.items()}
    measured = StepNorms(groups)
    gradients = {}
    for optimizer in (first, second, second):
        model.zero_grad()
        output(model).backward()
        own = parameters_of(optimizer)
        measured.before(own)
        gradients |= {id(parameter): parameter.grad.clone() for parameter in own if parameter.grad is not None}
        optimizer.step()
    asked = []
    whole = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: asked.append(tensor.shape) or whole(tensor))
    with Reads() as reads:
        result = measured.after()
    # the host waits once for all
    assert reads.count == 0
    assert len(asked) == 1
    for path, own in groups.items():
        update = [parameter.double() - old.double() for parameter, old in zip(own, before[path], strict=True)]
        assert result.weight[path] == pytest.approx(brute(*before[path]), rel=1e-12)
        assert result.update[path] == pytest.approx(brute(*update), rel=1e-12)
        assert result.gradient[path] == pytest.approx(brute(*(gradients[id(p)] for p in own)), rel=1e-12)
        assert result.update_ratio()[path] == pytest.approx(brute(*update) / brute(*before[path]))
    values = [tensor for own in before.values() for tensor in own]
    totals = result.totals()
    assert totals["weight_norm"] == pytest.approx(brute(*values))
    assert totals["grad_norm"] == pytest.approx(brute(*gradients.values()))
    assert totals["update_ratio"] == pytest.approx(math.hypot(*result.update.values()) / brute(*values))
    assert measured.after().totals() == {}  # nothing is kept


def test_what_has_no_gradient_or_is_in_no_optimizer() -> None:
    zero, unused, foreign = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    embedding = nn.Embedding(5, 3, sparse=True)
    groups = {"zero": [zero], "unused": [unused], "foreign": [foreign], "sparse": [embedding.weight]}
    (zero.sum() * 3 + embedding(torch.tensor([1, 1, 2])).sum()).backward()
    assert embedding.weight.grad is not None
    gradient = embedding.weight.grad.to_dense()
    optimizer = torch.optim.SGD([zero, unused, embedding.weight], lr=0.5)
    measured = StepNorms(groups)
    measured.before(parameters_of(optimizer), scale=4.0)
    optimizer.step()
    result = measured.after()
    assert result.gradient == {"zero": pytest.approx(3 * 2**0.5 / 4), "sparse": pytest.approx(brute(gradient) / 4)}
    assert result.update == {
        "zero": pytest.approx(1.5 * 2**0.5),
        "unused": 0,
        "sparse": pytest.approx(brute(gradient) / 2, rel=1e-6),
    }
    assert list(result.update_ratio()) == ["unused", "sparse"]
