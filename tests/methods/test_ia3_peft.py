"""(IA)³ beside HF peft's: the same layers found, the same training, and files that each reads of the other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lightning_peft import IA3, PEFTError, export_adapter, import_adapter, inject, trainable_parameters
from lightning_peft.injection import adapters
from tests.interchange.peft_oracle import (
    base_of,
    config_in,
    edited,
    keys_and_shapes,
    loaded_by_peft,
    moved_theirs,
    peft_model,
    saved_by_peft,
)
from tests.methods.models import MODELS, inputs_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_what_is_found_is_what_peft_finds(name: str) -> None:
    base = MODELS[name]()
    theirs = peft_model(copy.deepcopy(base), peft.IA3Config())
    on_input = {
        path.removeprefix("base_model.model.")
        for path, module in theirs.named_modules()
        if isinstance(module, peft.tuners.ia3.IA3Layer) and module.is_feedforward
    }
    ours = adapters(inject(base, IA3()), "default")
    assert {*ours} == {*theirs.targeted_module_names}
    assert {path for path, adapter in ours.items() if adapter.on_input} == on_input


BERT_TARGETS = r".*\.(key|value|layer\.\d\.output\.dense)"
PARITY: dict[str, tuple[IA3, dict[str, Any]]] = {
    "linear": (IA3(target_modules=["up", "gate", "head"], feedforward_modules=["gate"]), {}),
    "conv1D": (IA3(target_modules=["up", "down"], feedforward_modules=["down"]), {}),
    "conv2d": (IA3(target_modules=["one", "two"], feedforward_modules=["two"]), {}),
    "conv3d": (IA3(target_modules=["one", "two"], feedforward_modules=["two"]), {}),
    "llama": (IA3(), {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "bert": (IA3(), {"target_modules": BERT_TARGETS, "feedforward_modules": r".*\d\.output\.dense"}),
    "t5": (IA3(), {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]}),
    "gpt2": (IA3(), {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}),
    "vit": (IA3(), {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]}),
}


def config(name: str, **more: Any) -> peft.IA3Config:
    """peft's words for the same thing."""
    method, theirs = PARITY[name]
    given = theirs or {"target_modules": method.target_modules, "feedforward_modules": method.feedforward_modules}
    return peft.IA3Config(**given, **more)


def wide(name: str) -> nn.Module:
    """The base with weights so large that its attention and feed-forward blocks weigh in its outputs."""
    base = base_of(name)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() == 2 and name in ("llama", "bert", "t5", "gpt2", "vit", "conv1D"):
                parameter.mul_(0.15 / parameter.std())
    return base


def output_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize("name", PARITY)
def test_trains_as_peft_does(name: str) -> None:
    base = wide(name)
    ours, theirs = inject(copy.deepcopy(base), PARITY[name][0]), peft_model(copy.deepcopy(base), config(name))
    own = {n.replace(".adapters.default.ia3_l", ""): p for n, p in trainable_parameters(ours).items()}
    other = {
        n.removeprefix("base_model.model.").replace(".ia3_l.default", ""): p
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert own.keys() == other.keys()
    with torch.no_grad():
        for path, parameter in own.items():
            parameter.add_(torch.randn_like(parameter) * 0.3)
            other[path].copy_(parameter.reshape(other[path].shape))
    inputs = inputs_of(name)
    optimizers = [torch.optim.AdamW(tensors.values(), lr=1e-3) for tensors in (own, other)]
    goal = torch.randn_like(output_of(ours, inputs))
    for step in range(11):
        outputs = [output_of(model, inputs) for model in (ours, theirs)]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
        for optimizer, output in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            (output - goal).square().mean().backward()
            if step:
                optimizer.step()
        if step == 0:
            for path, parameter in own.items():
                grad = other[path].grad.reshape(parameter.shape)
                torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-5)
                assert grad.abs().max() > 0
    for path, parameter in own.items():
        torch.testing.assert_close(parameter, other[path].reshape(parameter.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PARITY)
def test_exported_it_is_what_peft_writes_and_computes_the_same(name: str, tmp_path: Path) -> None:
    base, inputs = wide(name), inputs_of(name)
    ours = moved(inject(copy.deepcopy(base), PARITY[name][0]))
    folder = export_adapter(ours, tmp_path / "ours")
    theirs = loaded_by_peft(copy.deepcopy(base), folder)
    torch.testing.assert_close(output_of(theirs, inputs), output_of(ours, inputs), rtol=1e-5, atol=1e-5)
    assert (output_of(ours, inputs) - output_of(base, inputs)).abs().max() > 1e-2
    written = saved_by_peft(peft_model(copy.deepcopy(base), config(name)), tmp_path / "theirs")
    assert keys_and_shapes(folder) == keys_and_shapes(written)
    assert config_in(folder).keys() == config_in(written).keys()
    assert config_in(folder)["fan_in_fan_out"] == config_in(written)["fan_in_fan_out"]


@pytest.mark.parametrize("name", PARITY)
def test_imported_it_computes_what_peft_does(name: str, tmp_path: Path) -> None:
    base, inputs = wide(name), inputs_of(name)
    theirs = moved_theirs(peft_model(copy.deepcopy(base), config(name)), 0.3)
    ours = import_adapter(copy.deepcopy(base), saved_by_peft(theirs, tmp_path)).eval()
    torch.testing.assert_close(output_of(ours, inputs), output_of(theirs, inputs), rtol=1e-5, atol=1e-5)
    assert (output_of(ours, inputs) - output_of(base, inputs)).abs().max() > 1e-2


class Nested(nn.Module):
    """A layer whose path is the end of another's path."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"dense": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(torch.tanh(self.inner["dense"](x)))


@pytest.mark.parametrize("on_input", ["dense", "inner.dense", r"d.*", r".*dense"])
def test_names_that_mean_more_in_peft_become_an_expression(on_input: str, tmp_path: Path) -> None:
    base, x = Nested(), torch.randn(4, 6)
    ours = moved(inject(copy.deepcopy(base), IA3(target_modules=r".*dense", feedforward_modules=on_input)))
    kinds = {path: adapter.on_input for path, adapter in adapters(ours, "default").items()}
    assert kinds == {"dense": on_input != "inner.dense", "inner.dense": on_input in ("inner.dense", r".*dense")}
    folder = export_adapter(ours, tmp_path)
    torch.testing.assert_close(loaded_by_peft(copy.deepcopy(base), folder)(x), ours(x))
    again = import_adapter(copy.deepcopy(base), folder)
    assert torch.equal(again(x), ours(x))


def test_what_peft_has_no_layer_for_is_not_exported(tmp_path: Path) -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(3, 4, 2), "attn": nn.MultiheadAttention(8, 2), "up": nn.Linear(4, 4)})
    inject(model, IA3(target_modules=["conv", "attn", "out_proj", "up"]))
    with pytest.raises(PEFTError) as caught:
        export_adapter(model, tmp_path / "out")
    assert caught.value.faults == (
        "export_adapter: conv: HF peft's IA3 has no layer for a Conv1d",
        "export_adapter: attn: HF peft's IA3 has no layer for a MultiheadAttention",
        "export_adapter: attn.out_proj: HF peft's IA3 has no layer for a NonDynamicallyQuantizableLinear",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        (
            {"feedforward_modules": None},
            "feedforward_modules: is missing, so that nothing says which vectors scale inputs; add it",
        ),
        ({"target_modules": [3]}, "target_modules: [3] is neither a string nor a list of strings"),
        (
            {"feedforward_modules": "u("},
            "feedforward_modules: 'u(' is not a regular expression (missing ), unterminated subpattern at position 1)",
        ),
        ({"feedforward_modules": {}}, "feedforward_modules: {} is neither a string nor a list of strings"),
        (
            {"feedforward_modules": ["up"]},
            "1 of another shape: base_model.model.layers.up.ia3_l is (20, 1) in the checkpoint and (1, 12) here",
        ),
    ],
)
def test_a_directory_that_can_not_be_honoured_is_refused(fields: dict[str, Any], fault: str, tmp_path: Path) -> None:
    base = base_of("linear")
    folder = export_adapter(inject(copy.deepcopy(base), IA3(target_modules=["up"])), tmp_path)
    with pytest.raises(PEFTError) as caught:
        import_adapter(base, edited(folder, **fields))
    assert caught.value.faults == (f"{folder}: {fault}",)
    assert "adapters" not in "".join(base.state_dict())


def test_a_directory_for_another_model_is_refused(tmp_path: Path) -> None:
    folder = export_adapter(inject(base_of("linear"), IA3(target_modules=["gate"])), tmp_path)
    with pytest.raises(PEFTError) as caught:
        import_adapter(base_of("conv2d"), folder)
    assert caught.value.faults == (
        f"{folder}: base_model.model.layers.gate.ia3_l: Toy has no module 'layers.gate'; did you mean 'layers.act' or "
        "'layers.two' or 'layers.one'?",
    )
