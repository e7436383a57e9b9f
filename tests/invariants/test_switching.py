"""Several adapters on one model: any can be chosen, and rows of a batch can go through different ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft import (
    PEFTError,
    adapter_per_row,
    disable_adapters,
    merge,
    remove,
    set_adapter,
    trainable_parameters,
    unmerge,
)
from lightning_peft.injection import adapters
from lightning_peft.state import adapter_tensors

from .cases import ROWS, Subject, batch, each
from .checks import assert_same_bits, bits, frame

pytestmark = pytest.mark.filterwarnings("ignore:merge. .* is not tied to:UserWarning")


def with_two(subject: Subject) -> nn.Module:
    return subject.put(subject.adapted(name="first"), "second")


@each()
def test_each_of_two_adapters_computes_as_if_it_were_alone(subject: Subject):
    model = with_two(subject)
    for name in ("first", "second", "first"):
        set_adapter(model, name)
        assert torch.equal(subject.values(model), subject.values(subject.adapted(name=name)))
        own = {id(parameter) for adapter in adapters(model, name).values() for parameter in adapter.parameters()}
        assert {id(parameter) for parameter in trainable_parameters(model).values()} == own
    assert not adapter_tensors(model, "first").keys() & adapter_tensors(model, "second").keys()


@each()
def test_two_adapters_can_be_taken_off_together(subject: Subject):
    model = subject.base()
    values, before, own = subject.values(model), bits(model), frame(model)
    subject.put(subject.put(model, "first"), "second")
    remove(model)
    assert frame(model) == own
    assert_same_bits(bits(model), before)
    assert torch.equal(subject.values(model), values)


@each()
def test_only_the_active_adapter_is_merged(subject: Subject):
    model = with_two(subject)
    set_adapter(model, "first")
    first = subject.values(model)
    try:
        merge(model)
    except PEFTError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(subject.values(model), first, atol=1e-5, rtol=1e-5)
    with pytest.raises(PEFTError, match=r"^merge: it is merged already$"):
        merge(model)
    with pytest.raises(
        PEFTError, match=r"^disable_adapters: the adapter is merged into the weights; call unmerge\(model\) first$"
    ):
        disable_adapters(model).__enter__()
    set_adapter(unmerge(model), "second")
    assert torch.equal(subject.values(model), subject.values(subject.adapted(name="second")))


@each()
def test_rows_run_through_their_own_adapters(subject: Subject):
    model = with_two(subject)
    names = ["first", None, "second", "first"]
    x = batch(subject.case, 0)
    alone = []
    for row, name in enumerate(names):
        set_adapter(model, name or "first")
        if name is None:
            with disable_adapters(model):
                alone.append(subject.run(model, x=x[row : row + 1]).detach())
        else:
            alone.append(subject.run(model, x=x[row : row + 1]).detach())
    for active in ("first", "second"):
        set_adapter(model, active)
        try:
            with adapter_per_row(model, names):
                together = subject.run(model).detach()
        except PEFTError as error:
            pytest.skip(str(error))
        assert len(together) == ROWS
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert torch.equal(subject.values(model), subject.values(subject.adapted(name="second")))


@each()
def test_names_that_the_model_does_not_have_are_refused(subject: Subject):
    model = subject.adapted(name="french")
    expected = r"^adapter 'frensh': the model has french; did you mean 'french'\?$"
    with pytest.raises(PEFTError, match=expected):
        set_adapter(model, "frensh")
    with pytest.raises(PEFTError, match=expected), adapter_per_row(model, ["frensh", None]):
        pass
    with pytest.raises(PEFTError) as error:
        subject.inject(model, "french")
    message = "adapter_name: the model has an adapter 'french'; choose another name, or remove(model) first"
    assert error.value.faults == (message,)
