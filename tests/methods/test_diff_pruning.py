"""Diff pruning against closed forms, brute force, and a few lines that apply its diff by hand."""

from __future__ import annotations

import copy
import math
import pickle
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_peft import DiffPruning, PEFTError, inject, merge, trainable_parameters
from lightning_peft.injection import adapters
from lightning_peft.methods._diff_layers import Diff, Diffs, all_diffs, prune
from lightning_peft.methods._hard_concrete import gates, open_probability, seeded
from tests.invariants.cases import Case, Tied, batch, bert, cnn, gpt2, llama, logits, mixtral, t5
from tests.methods.test_parameter_counts import count, llama_7b

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def small(**layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Tanh(), nn.Linear(10, 4))


def attached(model: nn.Module) -> Mapping[str, Diffs]:
    return adapters(model, "default")  # type: ignore[return-value]


def diffs(model: nn.Module) -> list[Diff]:
    return all_diffs(attached(model))


def seen(model: nn.Module, name: str) -> Tensor:
    """The parameter as the model's forward reads it."""
    path, _, own = name.rpartition(".")
    value: Tensor = getattr(model.get_submodule(path), own)
    return value


@torch.no_grad()
def moved(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for diff in diffs(model):
        for parameter in diff.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


# the gates


def mean_gate(alpha: float) -> float:
    """E[z] = ∫₀¹ P(z > t) dt = 3·∫ (1 − x) / (1 − x + x·exp(−α)) dx from x = 1/2 to 5/6."""
    k = math.exp(-alpha) - 1

    def antiderivative(x: float) -> float:
        return x - x * x / 2 if k == 0 else -x / k + (1 + 1 / k) / k * math.log(1 + k * x)

    return 3 * (antiderivative(5 / 6) - antiderivative(1 / 2))


@pytest.mark.parametrize("alpha", [-3.0, -0.7, 0.0, 1.0, 5.0])
def test_gates_have_the_mean_and_the_probabilities_of_the_closed_form(alpha: float) -> None:
    draws = 400_000
    z = gates(torch.full((draws,), alpha, dtype=torch.float64), seeded(3, torch.device("cpu")))
    assert 0 <= z.min() <= z.max() <= 1
    four_deviations = 4 * 0.5 / math.sqrt(draws)
    assert z.mean().item() == pytest.approx(mean_gate(alpha), abs=four_deviations)
    opened = 1 / (1 + math.exp(-alpha))
    assert (z != 0).double().mean().item() == pytest.approx(opened, abs=four_deviations)
    assert open_probability(torch.tensor(alpha, dtype=torch.float64)).item() == pytest.approx(opened, abs=1e-12)
    # s·3 − 1.5 is 1 and more where s is 5/6 and more
    assert (z == 1).double().mean().item() == pytest.approx(1 / (1 + 5 * math.exp(-alpha)), abs=four_deviations)


def open_gate(alpha: float) -> float:
    return min(1.0, max(0.0, 3 / (1 + math.exp(-alpha)) - 1.5))


def test_gates_in_evaluation_are_a_stretched_sigmoid() -> None:
    alpha = torch.linspace(-4, 4, 33, dtype=torch.float64)
    by_hand = [open_gate(a) for a in alpha.tolist()]
    torch.testing.assert_close(gates(alpha, None), torch.tensor(by_hand, dtype=torch.float64), atol=1e-12, rtol=0)


def test_a_gate_that_draws_zero_is_shut_and_has_no_gradient() -> None:
    alpha = torch.ones(3, requires_grad=True)
    z = gates(alpha, torch.zeros_like)
    z.sum().backward()
    assert z.tolist() == [0, 0, 0]
    assert alpha.grad is not None
    assert alpha.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("structured", [False, True])
def test_in_training_weights_and_gradients_are_those_of_the_equation(structured: bool) -> None:
    model = small().double()
    inject(model, DiffPruning(structured=structured, alpha_init=1.5, target=0.1, target_modules=["3"]))
    moved(model).train()
    frozen = model[3]._parameters["weight"]
    diff = attached(model)["3"].diffs()["weight"]
    torch.manual_seed(9)
    effective = model[3].weight
    torch.manual_seed(9)
    generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
    leaves = [parameter.detach().clone().requires_grad_() for parameter in diff.parameters()]
    w, alpha, *group = leaves
    z: Tensor = torch.ones(())
    for location in (alpha, *group):
        u = torch.rand(location.shape, generator=generator, dtype=torch.float64)
        z = z * ((u.log() - (1 - u).log() + location).sigmoid() * 3 - 1.5).clamp(0, 1)
    expected = frozen + z * w
    assert len(group) == structured
    torch.testing.assert_close(effective, expected, atol=1e-12, rtol=0)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (effective * weights).sum().backward()
    (expected * weights).sum().backward()
    for ours, theirs in zip(diff.parameters(), leaves, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=0)
        assert ours.grad.abs().max() > 0
    assert not torch.equal(model[3].weight, effective)
    # what stands for the gates in evaluation is the same each time
    model.eval()
    assert torch.equal(model[3].weight, model[3].weight)


def test_of_a_weight_nothing_but_its_parameters_is_kept_for_the_backward_pass() -> None:
    model = inject(small(), DiffPruning(target=0.1)).train()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        _ = model[0].weight, DiffPruning().penalty(attached(model))
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert [tuple(tensor.shape) for tensor in kept if tensor.numel() > 1 and tensor.data_ptr() not in own] == []


# the penalty


@pytest.mark.parametrize("structured", [False, True])
def test_the_penalty_is_the_expected_number_of_open_gates(structured: bool) -> None:
    method = DiffPruning(l0_weight=0.01, structured=structured, target=0.1)
    model = moved(inject(Tied(), method))
    own = {id(diff): diff for adapter in attached(model).values() for diff in adapter.diffs().values()}
    assert len(own) == 3  # the embedding's, which is the head's too, and the layer's two
    expected, leaves = 0.0, []
    for diff in own.values():
        leaf = diff.alpha.detach().clone().requires_grad_()
        leaves.append((diff.alpha, leaf))
        term = (1 / (1 + torch.exp(-leaf))).sum()
        expected = expected + (term / (1 + torch.exp(-diff.group_alpha)) if structured else term)
    penalty = method.penalty(attached(model))
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.01 * expected.item(), rel=1e-6)
    penalty.backward()
    (0.01 * expected).backward()
    for alpha, leaf in leaves:
        torch.testing.assert_close(alpha.grad, leaf.grad, atol=1e-8, rtol=1e-4)


def test_there_is_no_penalty_where_its_weight_is_zero_or_it_is_pruned() -> None:
    model = inject(small(), DiffPruning(target=0.1))
    assert DiffPruning(l0_weight=0).penalty(attached(model)) is None
    assert DiffPruning().penalty(attached(model)) is not None
    prune(diffs(model), 3)
    assert DiffPruning().penalty(attached(model)) is None


# pruning


def magnitudes(model: nn.Module) -> list[float]:
    """|z·w| of every entry, in the order of the parameters."""
    found = []
    for diff in diffs(model):
        group = (
            1.0
            if diff.group_alpha is None
            else min(1.0, max(0.0, 3 * float(diff.group_alpha.detach().sigmoid()) - 1.5))
        )
        for w, alpha in zip(diff.w.flatten().tolist(), diff.alpha.flatten().tolist(), strict=True):
            found.append(abs(w) * open_gate(alpha) * group)
    return found


@quick
@given(target=st.floats(0.02, 0.97), structured=st.booleans(), seed=st.integers(0, 99))
def test_exactly_the_largest_stay_by_brute_force(target: float, structured: bool, seed: int) -> None:
    method = DiffPruning(target=target, structured=structured, alpha_init=1.0, prune_at=0.7)
    model = inject(small(), method)
    moved(model, seed)
    sizes = magnitudes(model)
    assert len(sizes) == 6 * 10 + 10 + 10 + 10 + 10 * 4 + 4
    number = round(target * len(sizes))
    largest = sorted(range(len(sizes)), key=lambda place: -sizes[place])[:number]
    method.after_step(attached(model), 69, 100)
    assert not any(diff.is_pruned for diff in diffs(model))
    method.after_step(attached(model), 70, 100)
    kept = torch.cat([diff.mask.flatten() for diff in diffs(model)])
    assert kept.nonzero().flatten().tolist() == sorted(largest)
    left = torch.cat([diff.w.flatten() for diff in diffs(model)]).abs().tolist()
    assert left == pytest.approx([size if place in largest else 0.0 for place, size in enumerate(sizes)], rel=1e-4)
    assert method.report(attached(model)) == {"kept_share": pytest.approx(number / len(sizes))}


def test_of_equal_entries_the_earlier_stay_and_the_number_is_exact() -> None:
    model = inject(small(), DiffPruning(target=0.1))
    with torch.no_grad():
        diffs(model)[0].w[3:5] = 1.0
        diffs(model)[-1].w[:2] = -2.0
    prune(diffs(model), 9)
    assert [diff.mask.flatten().nonzero().flatten().tolist() for diff in diffs(model)] == [
        [*range(18, 25)], [], [], [], [], [0, 1],
    ]  # fmt: skip
    others = inject(small(), DiffPruning(target=0.1))
    prune(diffs(others), 9)  # all are zero
    assert sum(int(diff.mask.sum()) for diff in diffs(others)) == 9


def test_where_too_few_gates_are_open_the_largest_of_the_others_are_opened() -> None:
    model = inject(small(), DiffPruning(target=0.1, target_modules=["3"], structured=False))
    weight, bias = diffs(model)
    with torch.no_grad():
        weight.w.copy_(torch.arange(40).view(4, 10))
        weight.alpha.fill_(-5)
        weight.alpha[0, 2:4] = 5
    prune(diffs(model), 4)
    assert weight.mask.flatten().nonzero().flatten().tolist() == [2, 3, 38, 39]
    assert weight.w[weight.mask].tolist() == [2, 3, 0, 0]
    assert not bias.mask.any()


def test_what_was_cut_stays_at_the_base_whatever_the_optimizer_remembers() -> None:
    method = DiffPruning(target=0.2, alpha_init=1.0, structured=True, prune_at=0.7)
    model = small()
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    inject(model, method).train()
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.05, weight_decay=0.1)
    x, masks = torch.randn(8, 6), []
    for step in range(1, 11):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        method.after_step(attached(model), step, 8)
        masks.append([diff.mask.clone() for diff in diffs(model)])
    assert sum(int(mask.sum()) for mask in masks[5]) == round(0.2 * 134)
    assert all(torch.equal(a, b) for a, b in zip(masks[5], masks[-1], strict=True))
    assert all(diff.alpha.grad is None for diff in diffs(model))
    number = 0
    for name, before in base.items():
        path, _, own = name.rpartition(".")
        changed = seen(model, name) != before
        number += int(changed.sum())
        assert not (changed & ~attached(model)[path].diffs()[own].mask).any()
    assert number == 27


# what it stands on


@pytest.mark.parametrize("build", [llama, bert, gpt2, t5, cnn, mixtral("eager")])
def test_by_default_every_parameter_is_trained_each_tied_one_once(build: object) -> None:
    model = build()  # type: ignore[operator]
    own = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    inject(model, DiffPruning(structured=True))
    assert count(model) == sum(2 * parameter.numel() + 1 for parameter in own)
    assert {diff.shape for diff in diffs(model)} == {parameter.shape for parameter in own}


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_experts_are_pruned_as_any_parameter(experts: str) -> None:
    case = Case("mixtral", mixtral(experts), lambda: torch.randint(1, 24, (4, 5)), call=logits)
    torch.manual_seed(0)
    model = case.build().eval()
    before = case.call(model, batch(case, 0)).detach()
    method = DiffPruning(target_modules=["experts"], target=0.1, alpha_init=0.5, l0_weight=0)
    inject(model, method)
    assert torch.equal(case.call(model, batch(case, 0)).detach(), before)
    moved(model)
    case.call(model, batch(case, 0)).sum().backward()
    assert [diff.w.grad.dim() for diff in diffs(model)] == [3, 3]
    method.after_step(attached(model), 1, 1)
    values = case.call(model, batch(case, 0)).detach()
    assert (values - before).abs().max() > 1e-3
    merge(model)
    torch.testing.assert_close(case.call(model, batch(case, 0)).detach(), values, atol=1e-5, rtol=1e-5)


def test_an_attention_has_its_output_layer_too() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    found = inject(model, DiffPruning(target_modules=["attention"], target=0.1))
    assert [*attached(found)] == ["attention", "attention.out_proj"]
    other = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    inject(other, DiffPruning(target_modules=["attention"], exclude_modules=["out_proj"], target=0.1))
    assert [*attached(other)] == ["attention"]


def test_a_recurrent_layer_can_be_copied_in_the_middle_of_training() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 4, bidirectional=True)})
    inject(model, DiffPruning(target=0.1)).train()
    x = torch.randn(5, 2, 3)
    model["lstm"](x)[0].sum().backward()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.eval()
        assert torch.equal(copied["lstm"](x)[0], model.eval()["lstm"](x)[0])
        model.train()
    model["lstm"](x)[0].sum().backward()


def test_a_llama_7b_has_two_numbers_for_each_targeted_entry() -> None:
    start = time.perf_counter()
    model = inject(llama_7b(), DiffPruning(target_modules=["q_proj", "v_proj"], structured=False))
    assert count(model) == 2 * 32 * 2 * 4096 * 4096
    model = inject(llama_7b(), DiffPruning())
    assert count(model) == 2 * 6_738_415_616 + (2 + 32 * 9 + 1)
    assert time.perf_counter() - start < 20
    assert all(p.is_meta and p.dtype == torch.float32 for p in trainable_parameters(model).values())


# what is refused


def faults_of(**fields: object) -> tuple[str, ...]:
    with pytest.raises(PEFTError) as error:
        DiffPruning(**fields)  # type: ignore[arg-type]
    return error.value.faults


@pytest.mark.parametrize("target", [0, 1, 1.5, -0.1, math.nan])
def test_a_target_of_nothing_or_all_is_refused(target: float) -> None:
    assert faults_of(target=target) == (
        f"DiffPruning.target: {target} is no share to keep; it must be above 0, which would keep nothing, and below 1, "
        "which would keep all",
    )


def test_all_wrong_fields_are_told_at_once() -> None:
    wrong = {"target": 2, "l0_weight": -1, "alpha_init": math.inf, "prune_at": 1, "total_steps": 0}
    assert faults_of(**wrong, target_modules=[], exclude_modules="(") == (
        "DiffPruning.target: 2 is no share to keep; it must be above 0, which would keep nothing, and below 1, which "
        "would keep all",
        "DiffPruning.l0_weight: -1 is no weight of a penalty; it must be 0 or more",
        "DiffPruning.alpha_init: inf is no number to start from; it must be finite",
        "DiffPruning.prune_at: 1 is no share of the steps to prune after; it must be above 0 and below 1, so that what "
        "is kept trains on",
        "DiffPruning.target_modules: is empty; name at least one, or leave it out for every module with parameters",
        "DiffPruning.total_steps: 0 is no number of steps; it must be 1 or more",
        "DiffPruning.exclude_modules: '(' is not a regular expression (missing ), unterminated subpattern at position "
        "0)",
    )


def inject_faults(model: nn.Module, **fields: object) -> tuple[str, ...]:
    with pytest.raises(PEFTError) as error:
        inject(model, DiffPruning(**fields))  # type: ignore[arg-type]
    return error.value.faults


def test_a_target_that_keeps_no_entry_or_all_of_them_is_refused() -> None:
    rule = "it must keep one at least, and leave one out at least"
    assert inject_faults(small(), target=0.003) == (
        f"DiffPruning.target: 0.003 of the 134 targeted entries is 0; {rule}",
    )
    assert inject_faults(small(), target=0.999) == (
        f"DiffPruning.target: 0.999 of the 134 targeted entries is 134; {rule}",
    )
    inject(small(), DiffPruning(target=0.004))


def test_layers_that_can_not_be_adapted_are_told_at_once() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(9, 4, sparse=True), "lazy": nn.LazyLinear(3), "act": nn.Tanh()})
    assert inject_faults(model, target=0.1, target_modules=["table", "lazy", "act"]) == (
        "DiffPruning.target_modules: 'act' matches act, a Tanh without parameters of its own, which can not be "
        "adapted; names that can be: table, lazy",
        "DiffPruning.target_modules: table: Embedding has sparse gradients, which no gate can take; build it without",
        "DiffPruning.target_modules: lazy: LazyLinear has no shape yet; run one batch through the model first",
    )
    assert inject_faults(model, target=0.1, target_modules=["tabel"]) == (
        "DiffPruning.target_modules: 'tabel' matches nothing; did you mean 'table'?",
    )


def test_the_spec_of_a_checkpoint_can_hold_the_fields(tmp_path: Path) -> None:
    fields = DiffPruning(target_modules=["a"]).fields()
    torch.save(fields, tmp_path / "fields")
    assert DiffPruning(**torch.load(tmp_path / "fields", weights_only=True)).fields() == fields
