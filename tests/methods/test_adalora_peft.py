"""AdaLoRA beside HF peft's: the same outputs, gradients and allocations in training, and the same files."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft import AdaLoRA, PEFTError, export_adapter, import_adapter, inject, trainable_parameters
from lightning_peft.injection import adapters, records
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
from tests.methods.models import inputs_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape"),
]
STEPS = 12
TARGETS = {
    "linear": ["up", "gate", "head"],
    "conv1D": ["up", "down"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "bert": ["query", "value"],
    "t5": ["q", "v", "wo"],
    "gpt2": ["c_attn", "c_fc"],
}
BUDGET = {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 3}


def method_for(name: str, **more: Any) -> AdaLoRA:
    return AdaLoRA(
        **BUDGET, alpha=9, delta_t=2, orth_reg_weight=0, total_steps=STEPS, target_modules=TARGETS[name], **more
    )


def config(name: str, **more: Any) -> peft.AdaLoraConfig:
    """peft's words for the same thing, written by hand."""
    fields = {**BUDGET, "lora_alpha": 9, "deltaT": 2, "orth_reg_weight": 0.0, "total_step": STEPS} | more
    return peft.AdaLoraConfig(target_modules=TARGETS[name], **fields)


def output_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output.logits


def pairs(ours: nn.Module, theirs: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Our tensors and peft's, by a name for both."""
    own = {name.replace("adapters.default.", ""): p for name, p in trainable_parameters(ours).items()}
    other = {
        name.removeprefix("base_model.model.").removesuffix(".default"): p
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert own.keys() == other.keys()
    return {name: (own[name], other[name]) for name in own}


def both(name: str, deviation: float = 0.3) -> tuple[nn.Module, Any, AdaLoRA]:
    """Our model and peft's over one base, with the same tensors away from their start."""
    base, method = base_of(name), method_for(name)
    ours, theirs = inject(copy.deepcopy(base), method), peft_model(copy.deepcopy(base), config(name))
    with torch.no_grad():
        for one, other in pairs(ours, theirs).values():
            one.add_(torch.randn_like(one) * deviation)
            other.copy_(one)
    return ours, theirs, method


def train(ours: nn.Module, theirs: Any, method: AdaLoRA, name: str, steps: int) -> None:
    """As many steps of AdamW on both, which are compared all the way."""
    inputs = inputs_of(name)
    same, attached = pairs(ours, theirs), adapters(ours, "default")
    optimizers = [torch.optim.AdamW(tensors, lr=1e-2) for tensors in zip(*same.values(), strict=True)]
    goal = torch.randn_like(output_of(ours, inputs))
    for step in range(1, steps + 1):
        outputs = [output_of(model, inputs) for model in (ours, theirs)]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
        for optimizer, output in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            (output - goal).square().mean().backward()
        for one, other in same.values():
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
            assert step > 1 or other.grad.abs().max() > 0
        for optimizer in optimizers:
            optimizer.step()
        method.after_step(attached, step, math.inf)
        theirs.base_model.update_and_allocate(step)
        for key, (one, other) in same.items():
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
            assert not key.endswith("lora_E") or torch.equal(one == 0, other == 0)


@pytest.mark.parametrize("name", TARGETS)
def test_trains_and_allocates_as_peft_does(name: str) -> None:
    ours, theirs, method = both(name)
    train(ours, theirs, method, name, STEPS)
    pattern = theirs.peft_config["default"].rank_pattern
    attached = adapters(ours, "default")
    found = {f"{path}.lora_E.default": adapter.mask.tolist() for path, adapter in attached.items()}
    assert found == pattern
    ranks = method.ranks(attached)
    assert sum(ranks.values()) == 2 * len(attached)
    assert ranks == {key.removesuffix(".lora_E.default"): sum(mask) for key, mask in pattern.items()}


def test_the_defaults_and_another_alpha_mean_what_they_mean_in_peft() -> None:
    base, inputs = base_of("linear"), inputs_of("linear")
    ours = inject(copy.deepcopy(base), AdaLoRA(target_modules=["up", "gate"], alpha=5))
    theirs = peft_model(
        copy.deepcopy(base), peft.AdaLoraConfig(target_modules=["up", "gate"], lora_alpha=5, total_step=9)
    )
    with torch.no_grad():
        for one, other in pairs(ours, theirs).values():
            assert one.shape == other.shape
            one.add_(torch.randn_like(one))
            other.copy_(one)
    torch.testing.assert_close(output_of(ours, inputs), output_of(theirs, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [0, 4, 5, STEPS], ids=["whole", "half pruned", "some grown anew", "pruned"])
@pytest.mark.parametrize("name", TARGETS)
def test_exported_it_is_what_peft_writes_and_computes_the_same(name: str, steps: int, tmp_path: Path) -> None:
    inputs = inputs_of(name)
    ours, theirs, method = both(name)
    train(ours, theirs, method, name, steps)
    folder = export_adapter(ours, tmp_path / "ours")
    loaded = loaded_by_peft(base_of(name), folder)
    torch.testing.assert_close(output_of(loaded, inputs), output_of(ours, inputs), rtol=1e-5, atol=1e-5)
    assert (output_of(ours, inputs) - output_of(base_of(name), inputs)).abs().max() > 1e-4
    written = saved_by_peft(theirs, tmp_path / "theirs")
    ours_config, theirs_config = config_in(folder), config_in(written)
    assert ours_config.keys() == theirs_config.keys()
    if steps == 5:
        # HF peft leaves out what grew since the last allocation, and so computes something else once loaded
        assert sum(map(math.prod, keys_and_shapes(folder).values())) > sum(
            map(math.prod, keys_and_shapes(written).values())
        )
        return
    assert keys_and_shapes(folder) == keys_and_shapes(written)
    free = {"auto_mapping", "target_modules", "exclude_modules", "base_model_name_or_path", "task_type", "peft_version"}
    for field in ours_config.keys() - free:
        assert ours_config[field] == theirs_config[field], field
    assert (ours_config["rank_pattern"] is None) == (steps == 0)
    their_tensors = load_file(written / "adapter_model.safetensors")
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, their_tensors[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [0, STEPS])
@pytest.mark.parametrize("name", TARGETS)
def test_imported_it_computes_what_peft_does(name: str, steps: int, tmp_path: Path) -> None:
    inputs = inputs_of(name)
    ours, theirs, method = both(name)
    train(ours, theirs, method, name, steps)
    folder = saved_by_peft(theirs, tmp_path)
    again = import_adapter(base_of(name), folder).eval()
    torch.testing.assert_close(output_of(again, inputs), output_of(theirs, inputs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        output_of(again, inputs), output_of(loaded_by_peft(base_of(name), folder), inputs), rtol=1e-5, atol=1e-5
    )
    assert method.ranks(adapters(again, "default")) == method.ranks(adapters(ours, "default"))
    taken = records(again)["default"].method
    assert isinstance(taken, AdaLoRA)
    for field in ("init_r", "target_r", "alpha", "delta_t", "beta1", "beta2", "orth_reg_weight"):
        assert getattr(taken, field) == getattr(method, field), field
    # and out again
    assert keys_and_shapes(export_adapter(again, tmp_path / "again")) == keys_and_shapes(folder)


def test_a_matrix_without_any_rank_left_goes_out_and_in(tmp_path: Path) -> None:
    inputs = inputs_of("linear")
    ours, _, method = both("linear")
    attached = adapters(ours, "default")
    for path, keeps in (
        ("layers.up", [False] * 6),
        ("layers.gate", [True] * 5 + [False]),
        ("layers.head", [False] * 6),
    ):
        attached[path].keep(torch.tensor(keeps))
    folder = export_adapter(ours, tmp_path)
    assert keys_and_shapes(folder)["base_model.model.layers.up.lora_B"] == (20, 0)
    expected = output_of(ours, inputs)
    torch.testing.assert_close(output_of(loaded_by_peft(base_of("linear"), folder), inputs), expected)
    again = import_adapter(base_of("linear"), folder)
    torch.testing.assert_close(output_of(again, inputs), expected, rtol=0, atol=0)
    assert method.ranks(adapters(again, "default")) == {"layers.up": 0, "layers.gate": 5, "layers.head": 0}
    # and it trains on: the pruned ranks are there again, at zero
    again.train()
    output_of(again, inputs).sum().backward()
    E = dict(again.named_parameters())["layers.gate.adapters.default.lora_E"]
    assert E.shape == (6, 1)
    assert E.grad.abs().min() > 0


def test_what_the_trainer_would_decide_is_written_so_that_peft_loads_it(tmp_path: Path) -> None:
    ours = inject(base_of("linear"), AdaLoRA(target_modules=["up"]))
    folder = export_adapter(ours, tmp_path)
    found = config_in(folder)
    assert (found["tinit"], found["tfinal"], found["total_step"]) == (0, 0, 1)
    # our weight of squared norms has no value there; peft's default stands for any but none
    assert found["orth_reg_weight"] == 0.5
    loaded_by_peft(base_of("linear"), folder)
    again = records(import_adapter(base_of("linear"), folder))["default"].method
    assert again == AdaLoRA(target_modules=["up"])


def test_a_module_with_two_names_and_attention_are_not_exported(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": layer, "two": layer, "attn": nn.MultiheadAttention(8, 2)})
    inject(model, AdaLoRA(target_modules=["one", "attn"]))
    with pytest.raises(PEFTError) as caught:
        export_adapter(model, tmp_path / "out")
    assert caught.value.faults == (
        "export_adapter: one: is the same module as two, and HF peft would adapt it under one of the names",
        "export_adapter: attn: HF peft's AdaLoRA has no layer for a MultiheadAttention",
        "export_adapter: attn.out_proj: HF peft's AdaLoRA has no layer for a NonDynamicallyQuantizableLinear",
    )


E_KEY = "layers.up.lora_E"
SIX = "has no list of 6 booleans, one for each rank"


@pytest.mark.parametrize(
    ("fields", "faults"),
    [
        (
            {"bias": "all"},
            ["bias: 'all' can't be honoured: biases of the base were trained, and AdaLoRA here trains none"],
        ),
        (
            {"target_parameters": ["w"], "deltaT": 1.5, "lora_alpha": "9"},
            [
                "target_parameters: ['w'] can't be honoured: AdaLoRA here has no adapter for parameters that belong to "
                "no layer",
                "lora_alpha: '9' is no int",
                "deltaT: 1.5 is no int",
            ],
        ),
        ({"rank_pattern": [True]}, ["rank_pattern: [True] has no masks by module"]),
        ({"rank_pattern": {E_KEY: [True]}}, [f"rank_pattern: {E_KEY!r} {SIX}"]),
        ({"rank_pattern": {E_KEY: [1] * 6}}, [f"rank_pattern: {E_KEY!r} {SIX}"]),
        (
            {"rank_pattern": {"layers.upp.lora_E": [True] * 6}},
            [
                "rank_pattern: 'layers.upp.lora_E' is no module of the directory's tensors; did you mean 'layers.up' "
                "or 'layers.head' or 'layers.gate'?"
            ],
        ),
        ({"beta1": 2}, ["AdaLoRA.beta1: 2 is not a weight of the past; it must be in (0, 1)"]),
    ],
)
def test_a_directory_that_can_not_be_honoured_is_refused(
    fields: dict[str, Any], faults: list[str], tmp_path: Path
) -> None:
    folder = edited(saved_by_peft(peft_model(base_of("linear"), config("linear")), tmp_path), **fields)
    base = base_of("linear")
    with pytest.raises(PEFTError) as caught:
        import_adapter(base, folder)
    assert caught.value.faults == tuple(f"{folder}: {fault}" for fault in faults)
    assert "adapters" not in "".join(base.state_dict())


def test_masks_that_do_not_fit_the_tensors_are_refused(tmp_path: Path) -> None:
    folder = saved_by_peft(peft_model(base_of("linear"), config("linear")), tmp_path)
    with pytest.raises(PEFTError, match=r"lora_A is \(6, 12\) in the checkpoint and \(5, 12\) here"):
        import_adapter(base_of("linear"), edited(folder, rank_pattern={E_KEY: [True] * 5 + [False]}))


def test_names_and_rank_pattern_of_earlier_releases_are_read(tmp_path: Path) -> None:
    ours, theirs, method = both("linear")
    train(ours, theirs, method, "linear", STEPS)
    folder = saved_by_peft(theirs, tmp_path)
    pattern = config_in(folder)["rank_pattern"]
    with_name = {f"{key}.default": mask for key, mask in pattern.items()}
    again = import_adapter(base_of("linear"), edited(folder, rank_pattern=with_name, lora_alpha=-1, target_r=20))
    taken = records(again)["default"].method
    assert isinstance(taken, AdaLoRA)
    # peft takes an alpha that is not above 0 for the rank, and leaves a budget that is never used alone
    assert (taken.alpha, taken.target_r) == (6, 6)
    assert method.ranks(adapters(again, "default")) == method.ranks(adapters(ours, "default"))


def test_the_regularizer_of_peft_is_another_one() -> None:
    """What the class says of peft's: the mean over matrices of the norms, which are not squared."""
    base = base_of("bert")
    theirs = moved_theirs(peft_model(base, config("bert", orth_reg_weight=0.5)))
    batch = {**inputs_of("bert"), "labels": torch.tensor([0, 1, 2])}
    factors = [p if "lora_A" in n else p.T for n, p in theirs.named_parameters() if "lora_A" in n or "lora_B" in n]
    norms = [(rows @ rows.T - torch.eye(len(rows))).norm() for rows in factors]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        penalty = theirs.base_model(**batch).loss - theirs.base_model.model(**batch).loss
    assert penalty.item() == pytest.approx(0.5 * sum(norms).item() / len(norms), rel=1e-4)
