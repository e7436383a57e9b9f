"""The identity of a base."""

from __future__ import annotations

import time

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_peft import LoRA, inject, merge, set_adapter
from lightning_peft.state import base_fingerprint, fingerprint, sample_bytes


def test_one_gigabyte_takes_under_a_second() -> None:
    base = {f"layer.{index}.weight": torch.empty(4096, 4096, dtype=torch.bfloat16) for index in range(30)}
    assert sum(tensor.numel() * tensor.element_size() for tensor in base.values()) > 1e9
    start = time.perf_counter()
    fingerprint(base)
    assert time.perf_counter() - start < 1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(0, 10**6), st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
def test_samples_are_all_values_of_a_small_tensor(size: int, seed: int, dtype: torch.dtype) -> None:
    tensor = torch.randint(-100, 100, (size,), generator=torch.Generator().manual_seed(seed)).to(dtype)
    sample = sample_bytes(tensor)
    assert len(sample) == min(size, 64) * tensor.element_size()
    changed = tensor.clone()
    changed[0] += 1
    assert sample_bytes(changed) != sample
    assert sample_bytes(tensor.clone()) == sample


def test_each_part_tells_its_own_difference() -> None:
    base = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.weight": torch.ones(3)}
    first = fingerprint(base)
    assert fingerprint(dict(reversed(base.items()))) == first

    def differing(other: dict[str, torch.Tensor]) -> set[str]:
        return {part for part, digest in fingerprint(other).items() if digest != first[part]}

    assert differing({**base, "b.weight": torch.zeros(3)}) == {"values"}
    assert differing({"a.weight": base["a.weight"].reshape(4, 3), "b.weight": base["b.weight"]}) == {"structure"}
    assert differing({"a.weight": base["a.weight"], "c.weight": base["b.weight"]}) == {"structure"}
    assert differing({name: tensor.double() for name, tensor in base.items()}) == {"dtypes", "values"}


def test_training_merging_and_other_adapters_do_not_change_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    inject(model, LoRA(r=2, target_modules=["0"]), modules_to_save=["1"])
    first = base_fingerprint(model, "default")
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    assert base_fingerprint(model, "default") == first
    inject(model, LoRA(r=3, target_modules=["0"]), adapter_name="other")
    set_adapter(model, "default")
    merge(model)
    assert base_fingerprint(model, "default") == first
