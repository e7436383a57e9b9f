"""What always holds holds over packed layers: of the properties, those that packing can break."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_peft import inject, set_adapter
from lightning_peft.quantization import quantize

from . import test_matrix as properties
from .cases import Case, Subject, each, floats, ids, llama, logits, stack

pytestmark = properties.pytestmark


def quantized(kind: str, build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """What `build` makes, packed; its output head stays dense."""

    def packed() -> nn.Module:
        model = build()
        return quantize(model, kind, skip=["last"] if hasattr(model, "last") else [])

    return packed


def mlp() -> nn.Module:
    return stack(layer=nn.Linear(20, 12), act=nn.Tanh(), inner=nn.Linear(12, 6, bias=False), last=nn.Linear(6, 5))


QUANTIZED = [
    Case(f"{name}-{kind}", quantized(kind, build), inputs, targets, call=call)
    for kind in ("nf4-dq", "int8")
    for name, build, inputs, targets, call in (
        ("mlp", mlp, floats(20), ("layer", "inner"), Case.call),
        ("llama", llama, ids, ("v_proj", "down_proj"), logits),
    )
]
"""Cases whose layers are packed: for those properties that packing can break."""


@pytest.mark.parametrize(
    "holds",
    [
        properties.test_outputs_at_the_start_are_the_base_s,
        properties.test_the_base_keeps_names_bits_dtypes_and_ties,
        properties.test_the_adapter_s_tensors_are_all_that_is_added_to_the_state,
        properties.test_only_adapters_train_and_each_gets_a_gradient,
        properties.test_remove_gives_the_model_back,
        properties.test_disabled_adapters_give_the_base_bit_for_bit,
        properties.test_merge_computes_the_same_and_unmerge_restores_the_bits,
        properties.test_a_merged_model_can_be_copied_and_its_adapters_removed,
        properties.test_copies_are_whole_and_independent,
        properties.test_the_state_dict_moves_to_another_model,
    ],
    ids=lambda holds: holds.__name__.removeprefix("test_"),
)
@each(cases=QUANTIZED)
def test_it_holds_over_packed_layers(subject: Subject, holds: Callable[[Subject], None]) -> None:
    holds(subject)


@each("mlp-nf4-dq", "mlp-int8", cases=QUANTIZED)
def test_two_adapters_stand_on_one_packed_layer(subject: Subject) -> None:
    model = subject.adapted()
    first = subject.values(model)
    inject(model, subject.make(), adapter_name="second")
    own = subject.values(model)
    if subject.method.identity_at_start:
        torch.testing.assert_close(own, subject.values(subject.base()), atol=1e-6, rtol=0)
    set_adapter(model, "default")
    assert torch.equal(subject.values(model), first)
