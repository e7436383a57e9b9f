"""What always holds of a model that carries adapters: each property for every method on every kind of layer."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from lightning_peft import (
    METHODS,
    LoRA,
    PEFTError,
    disable_adapters,
    inject,
    merge,
    remove,
    trainable_parameters,
    unmerge,
)
from lightning_peft.injection import adapters
from lightning_peft.methods._host import hosts
from lightning_peft.state import adapter_tensors, base_keys, tensor_faults

from .cases import CASES, Subject, each
from .checks import assert_same_bits, bits, frame, ties

pytestmark = [
    pytest.mark.filterwarnings("ignore:merge. .* is not tied to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]


@each()
def test_outputs_at_the_start_are_the_base_s(subject: Subject):
    model = subject.base()
    before = subject.values(model)
    subject.put(model, moved=False)
    if not subject.method.identity_at_start:
        pytest.skip(f"{subject.method.__name__} starts elsewhere than at the base")
    torch.testing.assert_close(subject.values(model), before, atol=1e-6, rtol=0)
    torch.testing.assert_close(subject.run(model).detach(), before, atol=1e-6, rtol=0)


@each()
def test_the_base_keeps_names_bits_dtypes_and_ties(subject: Subject):
    model = subject.base()
    before, tied, own = bits(model), ties(model), dict(model.named_parameters(remove_duplicate=False))
    subject.put(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    subject.run(model.train()).square().sum().backward()
    optimizer.step()
    after = model.state_dict()
    assert_same_bits({key: after[key] for key in after if key in before}, before)
    assert {
        name: p for name, p in model.named_parameters(remove_duplicate=False) if name in own
    } == own  # the same objects
    assert [group for group in ties(model) if not any(".adapters." in f".{name}" for name in group)] == tied
    extra = set(after) - set(before)
    assert all(".adapters.default." in f".{key}" for key in extra)
    missing, unexpected = model.load_state_dict(before, strict=False)
    assert (set(missing), unexpected) == (extra, [])


@each()
def test_the_adapter_s_tensors_are_all_that_is_added_to_the_state(subject: Subject):
    model = subject.base()
    before = set(model.state_dict())
    subject.put(model)
    assert base_keys(model) == before
    assert {*base_keys(model), *adapter_tensors(model, "default")} == set(model.state_dict())


@each()
def test_only_adapters_train_and_each_gets_a_gradient(subject: Subject):
    model = subject.adapted()
    expected = {id(p) for adapter in adapters(model, "default").values() for p in adapter.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == expected
    y = subject.run(model)
    (y * torch.randn(y.shape)).sum().backward()
    norms = {name: 0.0 if p.grad is None else p.grad.norm().item() for name, p in trainable_parameters(model).items()}
    assert [name for name, norm in norms.items() if not 0 < norm < float("inf")] == []
    assert [name for name, p in model.named_parameters() if p.grad is not None and not p.requires_grad] == []


@each()
def test_remove_gives_the_model_back(subject: Subject):
    model = subject.base()
    next(model.parameters()).requires_grad_(False)
    values, before, own = subject.values(model), bits(model), frame(model)
    subject.put(model)
    changed = subject.values(model)
    assert (changed - values).abs().max() > 1e-3
    assert remove(model) is model
    assert frame(model) == own
    assert_same_bits(bits(model), before)
    assert torch.equal(subject.values(model), values)


@each()
def test_disabled_adapters_give_the_base_bit_for_bit(subject: Subject):
    model = subject.base().requires_grad_(False)  # torch multiplies in another order where a weight requires a gradient
    values, before = subject.values(model), bits(model)
    subject.put(model)
    changed = subject.values(model)
    with disable_adapters(model):
        assert torch.equal(subject.values(model), values)
    assert torch.equal(subject.values(model), changed)
    after = model.state_dict()
    assert_same_bits({key: after[key] for key in before}, before)


@each()
def test_merge_computes_the_same_and_unmerge_restores_the_bits(subject: Subject):
    model = subject.adapted()
    before, tied, own, values = bits(model), ties(model), frame(model), subject.values(model)
    try:
        merge(model)
    except PEFTError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(subject.values(model), values, atol=1e-5, rtol=1e-5)
    unmerge(model)
    assert_same_bits(bits(model), before)
    assert (ties(model), frame(model)) == (tied, own)
    assert torch.equal(subject.values(model), values)


@each()
def test_a_merged_model_can_be_copied_and_its_adapters_removed(subject: Subject):
    model = subject.base()
    values, before, own = subject.values(model), bits(model), frame(model)
    subject.put(model)
    try:
        merge(model)
    except PEFTError as error:
        pytest.skip(str(error))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        remove(copied)
        assert_same_bits(bits(copied), before)
        assert frame(copied) == own
        assert torch.equal(subject.values(copied), values)


@each()
def test_copies_are_whole_and_independent(subject: Subject):
    model = subject.adapted()
    values, before, tied, own = subject.values(model), bits(model), ties(model), frame(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert frame(copied) == own
        assert ties(copied) == tied
        assert_same_bits(bits(copied), before)
        assert torch.equal(subject.values(copied), values)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(1)
    assert_same_bits(bits(model), before)
    removed = remove(copy.deepcopy(model))
    assert torch.equal(subject.values(removed), subject.values(remove(model)))


@each()
def test_the_state_dict_moves_to_another_model(subject: Subject):
    model = subject.adapted()
    other = subject.put(subject.base(), "default", moved=False)
    for tensor in adapter_tensors(other, "default").values():
        tensor.zero_()
    own = adapter_tensors(model, "default")
    assert tensor_faults(adapter_tensors(other, "default"), own, base_keys(other)) == []
    other.load_state_dict(own, strict=False)
    assert torch.equal(subject.values(other), subject.values(model))
    first = next(iter(own))
    rest = {**{key: tensor for key, tensor in own.items() if key != first}, "elsewhere.weight": torch.ones(1)}
    assert tensor_faults(own, rest, base_keys(model)) == [
        f"1 missing from the checkpoint: {first}",
        "1 not of this model: elsewhere.weight" + tensor_faults(own, rest, base_keys(model))[1].partition("weight")[2],
    ]


@each()
def test_hooks_fire_as_before_and_classes_are_still_told_apart(subject: Subject):
    model = subject.base()
    called: list[str] = []
    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, path=path: called.append(path))
        module.register_forward_hook(lambda *_, path=path: called.append(f"{path} done"))
    subject.run(model)
    expected, own = called.copy(), {path: type(module) for path, module in model.named_modules()}
    subject.put(model)
    backward: set[str] = set()
    for path, host in hosts(model):
        host.register_full_backward_hook(lambda *_, path=path: backward.add(path))
    called.clear()
    subject.run(model).sum().backward()
    assert called == expected
    with_gradient = {
        path for path, adapter in adapters(model, "default").items() if any(True for _ in adapter.parameters())
    }
    assert backward == {path for path in with_gradient if f"{path} done" in expected}
    for path, cls in own.items():
        module = model.get_submodule(path)
        assert isinstance(module, cls)
        assert (type(module).__name__, type(module).__module__) == (cls.__name__, cls.__module__)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@pytest.mark.parametrize("method", [cls for cls in METHODS.values() if issubclass(cls, LoRA)])
def test_lora_and_what_inherits_its_layers_stand_on_every_kind(method, case):
    # elsewhere a case is skipped where a method refuses it; these may refuse none
    subject = Subject(method, case)
    model = subject.inject(subject.base())
    paths = [*adapters(model, "default")]
    assert [target for target in case.targets if not any(f".{path}".endswith(f".{target}") for path in paths)] == []


@pytest.mark.parametrize("method", METHODS)
def test_every_method_stands_on_something(method):
    refused = {}
    for case in CASES:
        subject = Subject(METHODS[method], case)
        try:
            subject.put(subject.base())
        except pytest.skip.Exception as reason:
            refused[case.name] = str(reason)
    assert len(refused) < len(CASES), refused


@each(refused_too=True)
def test_a_refused_model_is_left_as_it_was(subject: Subject):
    model = subject.base()
    own, before = frame(model), bits(model)
    with pytest.raises(PEFTError) as error:
        inject(model, subject.make(), modules_to_save=["no_such_module"], adapter_name="a.b")
    assert len(error.value.faults) >= 2
    assert frame(model) == own
    assert_same_bits(bits(model), before)
    assert torch.equal(subject.values(model), subject.values(subject.base()))
