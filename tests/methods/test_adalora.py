"""AdaLoRA: the formulas written out, the allocation by brute force, exact budgets, and what is refused."""

from __future__ import annotations

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from lightning_peft import AdaLoRA, PEFTError, inject, merge, trainable_parameters, unmerge
from lightning_peft.injection import adapters
from lightning_peft.methods._host import Adapter
from tests.methods.models import MODELS, Toy
from tests.methods.test_parameter_counts import count, llama_7b

R, ALPHA = 5, 3.0
SCALE = ALPHA / (R + 1e-5)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(7, 6),
    "linear without bias": lambda: nn.Linear(7, 6, bias=False),
    "conv1D": lambda: Conv1D(6, 7),
}


def moved(model: nn.Module, deviation: float = 0.5) -> nn.Module:
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * deviation)
    return model


def triplets(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter, nn.Parameter]]:
    """A, E and B of each matrix."""
    by_name = trainable_parameters(model)
    stems = [name.removesuffix("lora_A") for name in by_name if name.endswith("lora_A")]
    return [(by_name[f"{s}lora_A"], by_name[f"{s}lora_E"], by_name[f"{s}lora_B"]) for s in stems]


def delta(A: Tensor, E: Tensor, B: Tensor) -> Tensor:
    return SCALE * sum(E[i] * torch.outer(B[:, i], A[i]) for i in range(len(E)))


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_the_formula_and_can_be_merged(name: str) -> None:
    base = LAYERS[name]().double()
    model = moved(inject(nn.Sequential(copy.deepcopy(base)), AdaLoRA(init_r=R, target_r=2, alpha=ALPHA)))
    ((A, E, B),) = triplets(model)
    assert (A.shape, E.shape, B.shape) == ((R, 7), (R, 1), (6, R))
    x, same_x = (torch.randn(3, 4, 7, dtype=torch.float64).requires_grad_() for _ in range(2))
    with torch.no_grad():
        same_x.copy_(x)
    y, expected = model(x), base(same_x) + same_x @ delta(A, E, B).T
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(out, [i, A, E, B], grad) for out, i in ((y, x), (expected, same_x)))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
        assert one.abs().max() > 0
    merge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    unmerge(model)
    assert torch.equal(model[0].weight, base.weight)


@pytest.mark.parametrize("kdim", [None, 6])
def test_attention_reads_adapted_weights(kdim: int | None) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=kdim, vdim=kdim).double()
    base = copy.deepcopy(attention)
    model = moved(inject(nn.ModuleDict({"a": attention}), AdaLoRA(init_r=R, target_r=2, alpha=ALPHA)))
    weights = [n for n, p in base.named_parameters() if n.endswith("proj_weight")] + ["out_proj.weight"]
    by_name = {name.replace("adapters.default.", "")[2:]: p for name, p in trainable_parameters(model).items()}
    factors = {name: [by_name[f"{name}.lora_{part}"] for part in "AEB"] for name in weights}
    changed = {name: base.get_parameter(name) + delta(*factors[name]) for name in weights}
    q, kv = torch.randn(3, 5, 8).double(), torch.randn(3, 4, kdim or 8).double()
    expected = functional_call(base, changed, (q, kv, kv))[0]
    torch.testing.assert_close(attention(q, kv, kv)[0], expected, rtol=1e-12, atol=1e-12)
    attached = adapters(model, "default")
    ranks = AdaLoRA(init_r=R, target_r=2).ranks(attached)
    assert ranks == dict.fromkeys([*(f"a.{name}" for name in weights)], R)


def test_dropout_is_on_the_way_to_a_alone() -> None:
    base = nn.Linear(40, 30).double()
    model = moved(inject(nn.Sequential(copy.deepcopy(base)), AdaLoRA(init_r=R, target_r=2, alpha=ALPHA, dropout=0.3)))
    x = torch.randn(4000, 40, dtype=torch.float64)
    ((A, E, B),) = triplets(model)
    expected = x @ delta(A, E, B).T
    update = model.train()(x) - base(x)
    assert (update - expected).abs().max() > 0.1
    ratio = (update * expected).sum() / expected.square().sum()
    assert ratio.item() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(model.eval()(x) - base(x), expected, rtol=1e-11, atol=1e-11)


def test_the_start_is_the_base_with_small_normal_factors() -> None:
    base = nn.Linear(300, 400)
    x = torch.randn(9, 300)
    expected = base(x)
    model = inject(nn.Sequential(base), AdaLoRA())
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)
    ((A, E, B),) = triplets(model)
    assert A.std().item() == pytest.approx(0.02, rel=0.05)
    assert B.std().item() == pytest.approx(0.02, rel=0.05)
    assert not E.any()


def stack(**fields: Any) -> tuple[nn.Module, AdaLoRA, dict[str, Adapter]]:
    """Three layers of different sizes, of which the first is the widest."""
    model = Toy(up=nn.Linear(12, 20), act=nn.Tanh(), gate=nn.Linear(20, 9), out=nn.Linear(9, 4)).double()
    method = AdaLoRA(init_r=R, target_r=2, alpha=ALPHA, target_modules=["up", "gate", "out"], **fields)
    inject(model, method)
    return model, method, adapters(model, "default")


def test_penalty_is_the_sum_of_squared_norms() -> None:
    model, method, attached = stack(orth_reg_weight=0.7)
    moved(model)
    penalty = method.penalty(attached)
    expected = torch.zeros((), dtype=torch.float64)
    for A, _, B in triplets(model):
        for rows in (A, B.T):
            for i in range(R):
                for j in range(R):
                    expected = expected + ((rows[i] * rows[j]).sum() - float(i == j)) ** 2
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.7 * expected.item(), rel=1e-12)
    factors = [tensor for A, _, B in triplets(model) for tensor in (A, B)]
    found, wanted = torch.autograd.grad(penalty, factors), torch.autograd.grad(0.7 * expected, factors)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    assert AdaLoRA(orth_reg_weight=0).penalty(attached) is None


def test_penalty_is_zero_where_both_are_orthonormal_and_not_rounded_under_autocast() -> None:
    model = inject(nn.Sequential(nn.Linear(48, 40)), AdaLoRA(orth_reg_weight=1.0))
    ((A, _, B),) = triplets(model)
    nn.init.orthogonal_(A)
    nn.init.orthogonal_(B)
    with torch.autocast("cpu", torch.bfloat16):
        penalty = AdaLoRA(orth_reg_weight=1.0).penalty(adapters(model, "default"))
    assert penalty is not None
    assert penalty.dtype == torch.float32
    assert penalty.item() < 1e-9


def train(model: nn.Module, method: AdaLoRA, attached: dict[str, Adapter], steps: int, seen: Any = None) -> None:
    """Steps of AdamW toward a random goal; `seen` is called after each, with the step."""
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.02)
    x = torch.randn(16, 12, dtype=torch.float64)
    goal = torch.randn(16, 4, dtype=torch.float64)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = (model(x) - goal).square().mean()
        penalty = method.penalty(attached)
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        before = [E.detach().clone() for _, E, _ in triplets(model)]
        method.after_step(attached, step, steps)
        if seen is not None:
            seen(step, before)


def test_each_allocation_is_the_one_by_brute_force() -> None:
    beta1, beta2, tinit, tfinal, delta_t, total = 0.6, 0.8, 3, 5, 2, 20
    model, method, attached = stack(beta1=beta1, beta2=beta2, tinit=tinit, tfinal=tfinal, delta_t=delta_t)
    mean: dict[tuple[int, int], Any] = defaultdict(float)
    deviation: dict[tuple[int, int], Any] = defaultdict(float)
    moves = []

    def check(step: int, before: list[Tensor]) -> None:
        parts = triplets(model)
        for index, (A, E, B) in enumerate(parts if step < total - tfinal else []):
            # E as it was before this step's allocation
            for place, (w, parameter) in enumerate(((A, A), (before[index], E), (B, B))):
                key = index, place
                now = np.abs(w.detach().numpy() * parameter.grad.numpy())
                mean[key] = beta1 * mean[key] + (1 - beta1) * now
                deviation[key] = beta2 * deviation[key] + (1 - beta2) * np.abs(now - mean[key])
        if step < total - tfinal and (step <= tinit or step % delta_t):
            assert [E.tolist() for _, E, _ in parts] == [E.tolist() for E in before]
            return
        scores = {}
        for index, i in itertools.product(range(3), range(R)):
            A, E, B = (mean[index, place] * deviation[index, place] for place in range(3))
            scores[index, i] = E[i, 0] + A[i].sum() / A.shape[1] + B[:, i].sum() / B.shape[0]
        left = 1 - (min(step, total - tfinal) - tinit) / (total - tfinal - tinit)
        budget = math.floor(3 * (R - 2) * left**3 + 3 * 2)
        kept = sorted(scores, key=lambda triplet: -scores[triplet])[:budget]
        for index, (_, E, _) in enumerate(parts):
            expected = [before[index][i].item() if (index, i) in kept else 0.0 for i in range(R)]
            assert E.flatten().tolist() == expected, step
        moves.append(frozenset(kept))

    train(model, method, attached, total, check)
    sizes = [len(kept) for kept in moves]
    # at steps 4, 6, …, 14, and at 15 and each one after it
    assert sizes == [12, 9, 7, 6, 6, 6] + 6 * [6]
    # once it was final, it stayed the same; before, ranks that were pruned came back
    assert len(set(moves[-6:])) == 1
    assert any(later - earlier for earlier, later in itertools.pairwise(moves))
    ranks = method.ranks(attached)
    assert sum(ranks.values()) == 6
    assert [*ranks] == ["layers.up", "layers.gate", "layers.out"]
    assert len(set(ranks.values())) > 1
    assert method.report(attached) == {"mean_rank": 2.0}
    assert [int((E != 0).sum()) for _, E, _ in triplets(model)] == [*ranks.values()]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_budget_is_kept_exactly_and_reached_before_the_last_phase(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 40), "total")
    tinit = data.draw(st.none() | st.integers(0, total - 1), "tinit")
    tfinal = data.draw(st.none() | st.integers(0, total - 1 - (tinit or 0)), "tfinal")
    target = data.draw(st.integers(1, R), "target_r")
    delta_t = data.draw(st.integers(1, 5), "delta_t")
    model, _, attached = stack()
    method = AdaLoRA(init_r=R, target_r=target, tinit=tinit, tfinal=tfinal, delta_t=delta_t)
    try:
        method.start(attached, total)
    except PEFTError:
        return
    after = int(0.3 * total + 1e-9) if tfinal is None else tfinal
    first = int(0.1 * total + 1e-9) if tinit is None else tinit
    kept = 3 * R
    for step in range(1, total + 1):
        for parameter in trainable_parameters(model).values():
            # ties in plenty, and some without a gradient
            parameter.grad = None if step % 3 == 0 else torch.randint(0, 2, parameter.shape).double()
            parameter.data.copy_(torch.randint(1, 3, parameter.shape))
        method.after_step(attached, step, total)
        if step >= total - after:
            kept = 3 * target
        elif step > first and step % delta_t == 0:
            kept = int(3 * (R - target) * (1 - (step - first) / (total - after - first)) ** 3 + 3 * target)
        allocated = step >= total - after or (step > first and step % delta_t == 0)
        assert sum(method.ranks(attached).values()) == kept
        assert sum(int((E != 0).sum()) for _, E, _ in triplets(model)) == (kept if allocated else 3 * R)


def test_equally_important_ranks_go_from_all_matrices_alike() -> None:
    _, method, attached = stack()
    method.after_step(attached, 1, 1)
    assert method.ranks(attached) == {"layers.up": 2, "layers.gate": 2, "layers.out": 2}


def test_nothing_is_kept_for_the_backward_pass_but_x_and_the_factors() -> None:
    model = moved(inject(nn.Sequential(nn.Linear(48, 80).bfloat16()), AdaLoRA(init_r=4, target_r=2)))
    x = torch.randn(1000, 48).bfloat16()
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}), t)[1], lambda t: t
    ):
        y = model(x)
    assert sum(kept.values()) <= 2 * (1000 * 48 + 48 * 80 + 80) + 4 * (2 * 4 * 48 + 4 + 4 * 80)
    assert y.dtype == torch.bfloat16


def test_parameter_counts() -> None:
    per_layer = 4 * 12 * (4096 + 4096) + 2 * 12 * (4096 + 11008) + 12 * (11008 + 4096)
    model = inject(llama_7b(), AdaLoRA())
    assert count(model) == 32 * (per_layer + 7 * 12) == 29_985_408
    assert all(p.is_meta and p.dtype == torch.float32 for p in trainable_parameters(model).values())
    assert count(inject(llama_7b(), AdaLoRA(init_r=6, target_r=4, target_modules=["q_proj", "v_proj"]))) == 64 * (
        6 * (4096 + 4096) + 6
    )


@pytest.mark.parametrize(
    ("fields", "faults"),
    [
        ({"init_r": 0, "target_r": 0}, [f"{n}: 0 is not a rank; it must be 1 or more" for n in ("init_r", "target_r")]),
        (
            {"init_r": 4},
            ["target_r: 8 is a budget larger than the start, init_r 4; it must be at most that"],
        ),
        (
            {"alpha": 0, "dropout": 1.0, "target_modules": []},
            [
                "alpha: 0 is not a scale; it must be above 0",
                "dropout: 1.0 is not a probability below 1; it must be in [0, 1)",
                "target_modules: is empty; name at least one",
            ],
        ),
        (
            {"tinit": -1, "tfinal": -2, "delta_t": 0, "total_steps": 0},
            [
                "tinit: -1 is no number of steps; it must be 0 or more",
                "tfinal: -2 is no number of steps; it must be 0 or more",
                "delta_t: 0 is no number of steps; it must be 1 or more",
                "total_steps: 0 is no number of steps; it must be 1 or more",
            ],
        ),
        (
            {"beta1": 1.0, "beta2": 0.0, "orth_reg_weight": -0.1},
            [
                "beta1: 1.0 is not a weight of the past; it must be in (0, 1)",
                "beta2: 0.0 is not a weight of the past; it must be in (0, 1)",
                "orth_reg_weight: -0.1 would drive A and B apart from orthogonality; it must be 0 or more",
            ],
        ),
        (
            {"target_modules": "*k", "exclude_modules": "b)"},
            [
                "target_modules: '*k' is not a regular expression (nothing to repeat at position 0)",
                "exclude_modules: 'b)' is not a regular expression (unbalanced parenthesis at position 1)",
            ],
        ),
        (
            {"total_steps": 100, "tinit": 40, "tfinal": 60},
            [
                "tinit: 40 steps before pruning and 60 after it (tfinal) leave none for it in 100 steps; tinit + "
                "tfinal must be below 100"
            ],
        ),
        (
            {"total_steps": 100, "tinit": 80},
            [
                "tinit: 80 steps before pruning and 30 after it (tfinal) leave none for it in 100 steps; tinit + "
                "tfinal must be below 100"
            ],
        ),
    ],
)
def test_wrong_fields_are_told(fields: dict[str, Any], faults: list[str]) -> None:
    with pytest.raises(PEFTError) as caught:
        AdaLoRA(**fields)
    assert caught.value.faults == tuple(f"AdaLoRA.{fault}" for fault in faults)


def test_a_training_without_an_end_or_too_short_is_refused() -> None:
    _, method, attached = stack()
    with pytest.raises(PEFTError) as caught:
        method.start(attached, math.inf)
    assert str(caught.value) == (
        "AdaLoRA.total_steps: nothing says how many steps the budget has to fall in; give total_steps, or the Trainer "
        "max_epochs or max_steps"
    )
    AdaLoRA(total_steps=10).start(attached, math.inf)
    with pytest.raises(PEFTError) as caught:
        AdaLoRA(tinit=3, tfinal=9).start(attached, 12)
    assert caught.value.faults == (
        "AdaLoRA.tinit: 3 steps before pruning and 9 after it (tfinal) leave none for it in 12 steps; tinit + tfinal "
        "must be below 12",
    )
    with pytest.warns(UserWarning, match="this training ends after step 6, and the budget is reached at step 7 of"):
        AdaLoRA(total_steps=10).start(attached, 6)


@pytest.mark.parametrize(
    ("build", "fields", "faults"),
    [
        (
            lambda: nn.ModuleDict({"conv": nn.Conv2d(3, 3, 1), "up": nn.Linear(3, 3), "words": nn.Embedding(4, 3)}),
            {"target_modules": ["conv", "upp", "words"]},
            [
                "target_modules: 'conv' matches conv, a Conv2d (AdaLoRA prunes singular values of linear layers only), "
                "which can not be adapted; names that can be: up",
                "target_modules: 'upp' matches nothing; did you mean 'up'?",
                "target_modules: 'words' matches words, a Embedding (AdaLoRA prunes singular values of linear layers "
                "only), which can not be adapted; names that can be: up",
            ],
        ),
        (
            lambda: nn.ModuleDict({"up": nn.LazyLinear(8), "attn": nn.MultiheadAttention(4, 2)}),
            {"target_modules": ["up", "attn"], "dropout": 0.1, "exclude_modules": ["out_proj"]},
            [
                "target_modules: up: LazyLinear has no shape yet; run one batch through the model first",
                "target_modules: attn: dropout: a MultiheadAttention multiplies its input with the weights itself, "
                "where dropout can't reach; set it to 0 or exclude the module",
            ],
        ),
    ],
)
def test_what_does_not_fit_a_model_is_told_at_once(
    build: Callable[[], nn.Module], fields: dict[str, Any], faults: list[str]
) -> None:
    with pytest.raises(PEFTError) as caught:
        inject(build(), AdaLoRA(**fields))
    assert caught.value.faults == tuple(f"AdaLoRA.{fault}" for fault in faults)


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    model = MODELS["bert"]()
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {*adapters(inject(model, AdaLoRA()), "default")} == linear - {"classifier"}
