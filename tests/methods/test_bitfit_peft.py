"""BitFit's files: HF peft has them as BEFT, for linear layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lightning_peft import BitFit, PEFTError, export_adapter, import_adapter, inject, trainable_parameters
from lightning_peft.injection import adapters
from tests.interchange.peft_oracle import (
    base_of,
    config_in,
    keys_and_shapes,
    loaded_by_peft,
    moved_theirs,
    output_of,
    peft_model,
    saved_by_peft,
)
from tests.methods.models import inputs_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term"),
]


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


FILES: dict[str, tuple[str, BitFit, dict[str, Any]]] = {
    "with biases": ("bert", BitFit(target_modules=["value"]), {"target_modules": ["value"]}),
    "without biases": (
        "llama",
        BitFit(target_modules=["v_proj"], add_missing=True),
        {"target_modules": ["v_proj"]},
    ),
    "both": ("linear", BitFit(target_modules=["up", "gate"], add_missing=True), {"target_modules": ["up", "gate"]}),
}


@pytest.mark.parametrize("case", FILES)
def test_exported_it_is_what_peft_s_beft_writes_and_computes_the_same(case: str, tmp_path: Path) -> None:
    name, method, fields = FILES[case]
    base, inputs = base_of(name), inputs_of(name)
    ours = moved(inject(copy.deepcopy(base), method)).eval()
    folder = export_adapter(ours, tmp_path / "ours")
    theirs = loaded_by_peft(copy.deepcopy(base), folder)
    torch.testing.assert_close(output_of(theirs, inputs), output_of(ours, inputs), rtol=1e-5, atol=1e-5)
    assert (output_of(ours, inputs) - output_of(base, inputs)).abs().max() > 1e-4
    written = saved_by_peft(peft_model(copy.deepcopy(base), peft.BeftConfig(**fields)), tmp_path / "theirs")
    assert keys_and_shapes(folder) == keys_and_shapes(written)
    assert config_in(folder).keys() == config_in(written).keys()
    assert config_in(folder)["target_modules"] == sorted(config_in(written)["target_modules"])


@pytest.mark.parametrize("case", FILES)
def test_imported_it_computes_what_peft_s_beft_does(case: str, tmp_path: Path) -> None:
    name, method, fields = FILES[case]
    base, inputs = base_of(name), inputs_of(name)
    theirs = moved_theirs(peft_model(copy.deepcopy(base), peft.BeftConfig(**fields)), 0.3)
    ours = import_adapter(copy.deepcopy(base), saved_by_peft(theirs, tmp_path)).eval()
    torch.testing.assert_close(output_of(ours, inputs), output_of(theirs, inputs), rtol=1e-5, atol=1e-5)
    assert (output_of(ours, inputs) - output_of(base, inputs)).abs().max() > 1e-4
    assert {*adapters(ours, "default")} == {*adapters(inject(copy.deepcopy(base), method), "default")}


def test_what_beft_has_no_layer_for_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(PEFTError) as caught:
        export_adapter(inject(base_of("bert"), BitFit()), tmp_path / "out")
    assert caught.value.faults == (
        "export_adapter: BitFit trains biases of 5 modules that HF peft's BEFT has no layer for "
        "(bert.embeddings.LayerNorm, a LayerNorm, …): it has one for Linear alone; merge(model) and save the whole "
        "model instead",
    )
