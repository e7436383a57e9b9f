"""Modules that are trained whole, beside every method: the copy trains, the original and its statistics stay."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_peft import disable_adapters, remove, set_adapter, trainable_parameters
from lightning_peft.injection import adapters
from lightning_peft.methods._host import own_tensors

from .cases import Subject, batch, each
from .checks import assert_same, assert_same_bits, bits, gradients

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def statistics(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensors[name].clone() for name in STATISTICS}


@each("batchnorm-cnn")
def test_frozen_statistics_do_not_move_in_train_mode(subject: Subject):
    model = subject.base()
    before = bits(model)
    subject.put(model)
    expected = subject.values(model)
    model.train()
    assert (model.training, model.layer.training, model.norm.training, model.last.training) == (
        True,
        True,
        False,
        False,
    )
    if torch.equal(subject.run(model), subject.run(model)):  # a method may draw random numbers in training
        torch.testing.assert_close(subject.run(model).detach(), expected, atol=1e-6, rtol=0)
    assert_same_bits({key: model.state_dict()[key] for key in before}, before)
    remove(model)
    assert model.norm.training
    subject.run(model)
    assert model.norm.num_batches_tracked.item() == before["norm.num_batches_tracked"].item() + 1


@each("batchnorm-cnn-saved")
def test_statistics_of_a_saved_norm_move_in_its_copy_alone(subject: Subject):
    model = subject.put(subject.base(), moved=False)
    seen: list[torch.Tensor] = []
    model.last.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    base = {path: statistics(own_tensors(model.get_submodule(path))) for path in ("norm", "last")}
    moved = adapters(model, "default")["last"]
    subject.run(model.train())
    x = seen[0].transpose(0, 1).flatten(1)
    mean = 0.9 * base["last"]["running_mean"] + 0.1 * x.mean(1)
    variance = 0.9 * base["last"]["running_var"] + 0.1 * x.var(1)
    torch.testing.assert_close(moved.running_mean, mean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(moved.running_var, variance, atol=1e-6, rtol=1e-5)
    assert moved.num_batches_tracked.item() == 1
    for path, before in base.items():
        assert_same_bits(statistics(own_tensors(model.get_submodule(path))), before)
    after = statistics(own_tensors(moved))
    with disable_adapters(model):
        subject.run(model)
    assert_same_bits(statistics(own_tensors(moved)), after)
    assert_same_bits(statistics(own_tensors(model.last)), base["last"])


@pytest.mark.parametrize("saved_by", ["first", "second"])
@each("batchnorm-cnn")
def test_of_two_adapters_the_one_that_saves_the_norm_moves_its_statistics(subject: Subject, saved_by: str):
    model = subject.base()
    for name in ("first", "second"):
        subject.put(model, name, moved=False, save=["last"] if name == saved_by else [])
    set_adapter(model, saved_by)
    subject.run(model.train())
    set_adapter(model, "first" if saved_by == "second" else "second")
    subject.run(model)
    assert adapters(model, saved_by)["last"].num_batches_tracked.item() == 1
    assert own_tensors(model.last)["num_batches_tracked"].item() == 0


@each("lstm-saved", "bert", "batchnorm-cnn-saved")
def test_at_the_start_a_copy_gets_the_gradient_that_its_original_would(subject: Subject):
    base, model = subject.base(), subject.put(subject.base(), moved=False)
    if not subject.method.identity_at_start:
        pytest.skip(f"{subject.method.__name__} starts elsewhere than at the base")
    values, expected = gradients(base, lambda: subject.run(base))
    found = gradients(model, lambda: subject.run(model))[1]
    inside = {
        name.replace(".adapters.default", ""): gradient
        for name, gradient in found.items()
        if any(f".{name}".find(f".{path}.") >= 0 for path in subject.case.save)
    }
    assert inside.keys() == {name for name in expected if any(f".{path}." in f".{name}" for path in subject.case.save)}
    assert_same((subject.run(model).detach(), inside), (values, {name: expected[name] for name in inside}), 1e-5)


@each("lstm-saved")
def test_a_recurrent_layer_that_was_saved_and_removed_trains_its_own_weights(subject: Subject):
    base = subject.base()
    expected = gradients(base, lambda: subject.run(base))
    model = subject.adapted()
    for restored in (remove(copy.deepcopy(model)), remove(model)):
        assert_same(gradients(restored, lambda restored=restored: subject.run(restored)), expected, 1e-6)


@each("tied-embedding")
def test_tied_modules_that_are_saved_together_share_one_copy(subject: Subject):
    model = subject.base()
    values = subject.values(model)
    subject.put(model, moved=False, save=["embedding", "head"], **_elsewhere(subject))
    for tied in (model, copy.deepcopy(model)):
        found = adapters(tied, "default")
        assert found["embedding"].weight is found["head"].weight
        assert tied.embedding._parameters["weight"] is tied.head._parameters["weight"]
        assert found["head"].weight is not tied.head._parameters["weight"]
        assert torch.equal(subject.values(tied), values)
    shared = adapters(model, "default")["head"].weight
    subject.run(model).square().sum().backward()
    whole = remove(copy.deepcopy(model))
    subject.run(whole.requires_grad_(True)).square().sum().backward()
    torch.testing.assert_close(shared.grad, whole.head.weight.grad, atol=1e-5, rtol=1e-5)
    assert sum(parameter is shared for parameter in trainable_parameters(model).values()) == 1


@each("tied-embedding")
def test_a_head_that_is_saved_alone_leaves_the_tied_embedding_as_it_is(subject: Subject):
    model = subject.base()
    subject.put(model, moved=False, save=["head"], **_elsewhere(subject))
    with torch.no_grad():
        adapters(model, "default")["head"].weight.add_(1)
    plain = subject.base()
    x = batch(subject.case, 0)
    assert torch.equal(model.embedding(x), plain.embedding(x))
    assert torch.equal(model.head.weight, plain.head.weight + 1)
    with disable_adapters(model):
        assert torch.equal(model.head.weight, plain.head.weight)


def _elsewhere(subject: Subject) -> dict[str, object]:
    """Aims the method at the layer between the tied ones, where it has a field for that."""
    return {"target_modules": ["layer"]} if "target_modules" in subject.method.__dataclass_fields__ else {}
