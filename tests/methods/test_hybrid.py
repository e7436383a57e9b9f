"""Several methods on one model: each computes as it does alone, together they are the union; conflicts have names."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_peft import (
    IA3,
    AdaLoRA,
    BitFit,
    DiffPruning,
    DoRA,
    Houlsby,
    Hybrid,
    LoRA,
    Method,
    ParallelAdapter,
    PEFTError,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
    PTuningV2,
    adapter_per_row,
    disable_adapters,
    export_adapter,
    import_adapter,
    inject,
    load_from_checkpoint,
    merge,
    trainable_parameters,
    unmerge,
)
from lightning_peft.injection import adapters, method_adapters, records, set_adapter
from lightning_peft.methods._host import Adapter
from lightning_peft.state import method_of, spec_faults
from tests.callback.toys import Toy, data, trainer
from tests.cli.conftest import BASE, TOY
from tests.interchange.peft_oracle import config_in, keys_and_shapes
from tests.methods.models import MODELS, inputs_of
from tests.methods.models import Toy as Stack

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


def base_of(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name]().eval().to(dtype)


def output_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    dtype = next(model.parameters()).dtype
    output = model(**{name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()})
    return output if isinstance(output, Tensor) else output.logits


def moved(model: nn.Module, name: str = "default") -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for adapter in adapters(model, name).values():
            for parameter in adapter.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def part(model: nn.Module, path: str, place: int) -> Any:
    return adapters(model, "default")[path].get_submodule(str(place))


def lora(*targets: str, **more: Any) -> LoRA:
    return LoRA(r=2, target_modules=list(targets), **more)


def test_lora_and_a_trained_bias_on_one_linear_by_hand() -> None:
    torch.manual_seed(0)
    model = Stack(up=nn.Linear(5, 7), out=nn.Linear(7, 3)).double()
    W, b, V, c = (parameter.detach().clone() for parameter in model.parameters())
    moved(inject(model, Hybrid(methods=[lora("up"), BitFit()])))
    x = torch.randn(4, 5, dtype=torch.double)
    update, bias = part(model, "layers.up", 0), part(model, "layers.up", 1).bias
    assert not torch.equal(bias, b)
    y = x @ (W + 8 * update.lora_B @ update.lora_A).T + bias
    expected = y @ V.T + part(model, "layers.out", 1).bias
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    with disable_adapters(model):
        torch.testing.assert_close(model(x), (x @ W.T + b) @ V.T + c, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [1, -1])
def test_scaled_outputs_and_low_rank_updates_follow_the_order(order: int) -> None:
    torch.manual_seed(0)
    model = Stack(up=nn.Linear(5, 7)).double()
    W, b = (parameter.detach().clone() for parameter in model.parameters())
    parts: list[Method] = [lora("up"), IA3(target_modules=["up"]), BitFit(target_modules=["up"])][::order]
    moved(inject(model, Hybrid(methods=parts)))
    at = {type(method).__name__: part(model, "layers.up", place) for place, method in enumerate(parts)}
    update = 8 * at["LoRA"].lora_B @ at["LoRA"].lora_A
    factor, bias = at["IA3"].ia3_l, at["BitFit"].bias
    weight = factor * (W + update) if order == 1 else factor * W + update
    x = torch.randn(4, 5, dtype=torch.double)
    expected = x @ weight.T + factor.flatten() * bias
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    merge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.layers["up"]._parameters["weight"], weight, rtol=1e-12, atol=1e-12)
    unmerge(model)
    assert torch.equal(model.layers["up"]._parameters["weight"], W)
    assert torch.equal(model.layers["up"]._parameters["bias"], b)


COMBINATIONS: dict[str, tuple[str, list[Method]]] = {
    "bias": ("bert", [lora("query", "value"), BitFit()]),
    "bias first": ("bert", [BitFit(), lora("query", "value")]),
    "scaled": ("llama", [IA3(), lora("k_proj", "down_proj", "q_proj")]),
    "scaled inputs last": ("llama", [lora("k_proj", "down_proj"), IA3()]),
    "directions": ("gpt2", [DoRA(r=2, target_modules=["c_attn"]), IA3(target_modules=["c_attn"])]),
    "two low ranks apart": ("bert", [lora("query"), AdaLoRA(init_r=3, target_r=2, target_modules=["value"])]),
    "convolutions": ("conv2d", [lora("one"), BitFit(target_modules=["one"]), IA3(target_modules=["one"])]),
    "attention of torch": ("attention", [lora("attn"), BitFit(target_modules=["attn", "one"])]),
    "embedding": ("embedding", [lora("embed"), BitFit(target_modules=["out"])]),
    "hybrid in hybrid": ("linear", [Hybrid(methods=[lora("up"), BitFit(target_modules=["up"])]), lora("gate")]),
    "after the feed-forward": ("bert", [lora("dense"), Pfeiffer(r=2)]),
    "two bottlenecks": ("llama", [Pfeiffer(r=2), Houlsby(r=3)]),
    "beside the feed-forward": ("llama", [ParallelAdapter(r=2), lora("up_proj", "down_proj", "gate_proj")]),
    "prefix": ("llama", [PrefixTuning(num_virtual_tokens=3, hidden_size=4), lora("q_proj", "v_proj")]),
    "prompt": ("llama", [PromptTuning(num_virtual_tokens=3), lora("embed_tokens", "v_proj")]),
}
each = pytest.mark.parametrize("case", COMBINATIONS)


@each
def test_the_parameters_are_the_union_and_each_gets_a_gradient(case: str) -> None:
    name, parts = COMBINATIONS[case]
    alone = [sum(p.numel() for p in trainable_parameters(inject(base_of(name), method)).values()) for method in parts]
    model = moved(inject(base_of(name), Hybrid(methods=parts)))
    trained = trainable_parameters(model)
    assert sum(parameter.numel() for parameter in trained.values()) == sum(alone)
    output_of(model, inputs_of(name)).square().sum().backward()
    assert [key for key, parameter in trained.items() if parameter.grad is None] == []


@each
def test_a_part_whose_values_are_at_the_start_leaves_the_others_as_they_are_alone(case: str) -> None:
    name, parts = COMBINATIONS[case]
    inputs = inputs_of(name)
    for place, method in enumerate(parts):
        if not all(other.identity_at_start for other in parts if other is not method):
            continue
        torch.manual_seed(5)
        model = inject(base_of(name), Hybrid(methods=parts))
        alone = inject(base_of(name), method)
        state = {
            key.replace(".adapters.default.", f".adapters.default.{place}."): tensor
            for key, tensor in moved(alone).state_dict().items()
            if ".adapters." in key
        }
        model.load_state_dict(state, strict=False)
        assert state.keys() <= model.state_dict().keys()
        with torch.no_grad():
            torch.testing.assert_close(output_of(model, inputs), output_of(alone, inputs), rtol=1e-5, atol=1e-5)


@each
def test_it_merges_if_all_parts_do_and_else_says_why(case: str) -> None:
    name, parts = COMBINATIONS[case]
    model, inputs = moved(inject(base_of(name), Hybrid(methods=parts))), inputs_of(name)
    refused = any(isinstance(method, (Pfeiffer, ParallelAdapter, PrefixTuning, PromptTuning)) for method in parts)
    with torch.no_grad():
        expected = output_of(model, inputs)
        if refused:
            with pytest.raises(PEFTError, match=r"^merge: "):
                merge(model)
        else:
            merge(model)
            torch.testing.assert_close(output_of(model, inputs), expected, rtol=1e-5, atol=1e-5)
            unmerge(model)
        assert torch.equal(output_of(model, inputs), expected)
        assert torch.equal(output_of(copy.deepcopy(model), inputs), expected)


def test_rows_of_a_batch_run_through_their_own_hybrids_with_prefixes() -> None:
    model, inputs = base_of("llama"), inputs_of("llama")
    for name, n in (("first", 3), ("second", 2)):
        parts: list[Method] = [PTuningV2(num_virtual_tokens=n), lora("q_proj", "v_proj")]
        moved(inject(model, Hybrid(methods=parts), adapter_name=name), name)
    alone = []
    names = ["second", None, "first"]
    for row, name in enumerate(names):
        own = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
        set_adapter(model, name or "first")
        with torch.no_grad():
            if name is None:
                with disable_adapters(model):
                    alone.append(output_of(model, own))
            else:
                alone.append(output_of(model, own))
    with adapter_per_row(model, names), torch.no_grad():
        torch.testing.assert_close(output_of(model, inputs), torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "parts", "fault"),
    [
        (
            "linear",
            [lora("up"), DoRA(r=2, target_modules=["up"])],
            "methods: LoRA (place 0) and DoRA (place 1) would both set the weight of layers.up; give them different "
            "target_modules, or leave one of them out",
        ),
        (
            "linear",
            [BitFit(), lora("up"), BitFit(target_modules=["head"])],
            "methods: BitFit (place 0) and BitFit (place 2) would both set the bias of layers.head; give them "
            "different target_modules, or leave one of them out",
        ),
        (
            "llama",
            [
                PTuningV2(num_virtual_tokens=2, target_modules=["layers.0.self_attn"]),
                PrefixTuning(num_virtual_tokens=2),
            ],
            "methods: PTuningV2 (place 0) and PrefixTuning (place 1) would both set the prefix of "
            "model.layers.0.self_attn; give them different target_modules, or leave one of them out",
        ),
        (
            "linear",
            [IA3(target_modules=["up"]), DoRA(r=2, target_modules=["up"])],
            "methods: DoRA (place 1) computes with layers.up's own weight, and can't come after IA3 (place 0); list "
            "it first",
        ),
        ("linear", [lora("upp"), BitFit()], "methods: LoRA.target_modules: 'upp' matches nothing; did you mean 'up'?"),
    ],
)
def test_conflicts_and_faults_of_parts_are_refused_by_name(name: str, parts: list[Method], fault: str) -> None:
    model = base_of(name)
    before = [(type(module), sorted(vars(module))) for module in model.modules()]
    with pytest.raises(PEFTError) as error:
        inject(model, Hybrid(methods=parts))
    assert error.value.faults == (f"Hybrid.{fault}",)
    assert [(type(module), sorted(vars(module))) for module in model.modules()] == before


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ([], "methods: [] is no list of methods; give one, such as [LoRA(r=8), BitFit()]"),
        (["LoRA"], "methods: 'LoRA', at place 0, is no method; give an instance, such as LoRA(r=8)"),
    ],
)
def test_what_are_no_methods_is_told(given: Any, fault: str) -> None:
    with pytest.raises(PEFTError) as error:
        Hybrid(methods=given)
    assert error.value.faults == (f"Hybrid.{fault}",)


@dataclass(kw_only=True)
class Counting(LoRA):
    """LoRA that takes part in training."""

    weight: float = 1.0

    def penalty(self, attached: Mapping[str, Adapter]) -> Tensor | None:
        return self.weight * sum(p.square().sum() for a in attached.values() for p in a.parameters())

    def start(self, attached: Mapping[str, Adapter], total_steps: float) -> None:
        if total_steps > 100:
            raise PEFTError(f"Counting.weight: {self.weight} is for 100 steps")

    def after_step(self, attached: Mapping[str, Adapter], step: int, total_steps: float) -> None:
        vars(self).setdefault("seen", []).append((step, total_steps, sorted(attached)))

    def report(self, attached: Mapping[str, Adapter]) -> dict[str, float]:
        return {"adapters": float(len(attached))}


def test_what_methods_do_in_training_is_forwarded_to_each_with_its_own_adapters() -> None:
    parts = [
        Counting(r=2, target_modules=["up", "gate"], weight=0.5, lora_plus=4),
        BitFit(),
        Counting(r=3, target_modules=["head"], weight=2.0),
    ]
    method = Hybrid(methods=[*parts])
    model = moved(inject(base_of("linear"), method))
    attached = method_adapters(model, "default")
    own = {
        (path, place): [*part(model, path, place).parameters()]
        for path, place in (("layers.up", 0), ("layers.gate", 0), ("layers.head", 2))
    }
    weights = {0: 0.5, 2: 2.0}
    expected = sum(weights[place] * p.square().sum() for (_, place), ps in own.items() for p in ps)
    penalty = method.penalty(attached)
    assert penalty is not None
    torch.testing.assert_close(penalty, expected)
    assert method.learning_rate_factors(attached) == {
        part(model, path, 0).lora_B: 4 for path in ("layers.up", "layers.gate")
    }
    assert method.report(attached) == {"adapters_0": 2.0, "adapters_2": 1.0}
    assert Hybrid(methods=parts[:2]).report(attached) == {"adapters": 2.0}
    method.start(attached, 100)
    with pytest.raises(PEFTError) as error:
        method.start(attached, 101)
    assert error.value.faults == ("Counting.weight: 0.5 is for 100 steps", "Counting.weight: 2.0 is for 100 steps")
    method.after_step(attached, 7, 100)
    assert vars(parts[0])["seen"] == [(7, 100, ["layers.gate", "layers.up"])]
    assert vars(parts[2])["seen"] == [(7, 100, ["layers.head"])]
    assert Hybrid(methods=[BitFit()]).penalty({}) is None


def test_a_checkpoint_s_fields_are_plain_and_make_the_same_method() -> None:
    method = Hybrid(methods=[lora("up"), Hybrid(methods=[BitFit(add_missing=True)])])
    assert method.fields() == {
        "methods": [
            {"name": "LoRA", "fields": lora("up").fields()},
            {
                "name": "Hybrid",
                "fields": {"methods": [{"name": "BitFit", "fields": BitFit(add_missing=True).fields()}]},
            },
        ]
    }
    assert method_of({"method": {"name": "Hybrid", "fields": method.fields()}}) == method
    with pytest.raises(PEFTError, match=r"^method 'LoRa' is not known here; did you mean 'LoRA'"):
        method_of({"method": {"name": "Hybrid", "fields": {"methods": [{"name": "LoRa", "fields": {}}]}}})


def test_differences_of_parts_are_told_and_those_that_only_steer_training_are_free() -> None:
    def spec(*parts: Method) -> dict[str, Any]:
        described = {"name": "Hybrid", "fields": Hybrid(methods=[*parts]).fields()}
        return {"method": described, "adapter_name": "default", "base": {}}

    ours = spec(LoRA(r=2), BitFit())
    assert spec_faults(ours, spec(LoRA(r=2, dropout=0.3), BitFit()), False) == []
    assert spec_faults(ours, spec(LoRA(r=3), BitFit()), False) == ["LoRA.r is 3 in the checkpoint and 2 here"]
    assert spec_faults(ours, spec(LoRA(r=2), IA3()), False) == ["the checkpoint's method is IA3, this run's is BitFit"]
    assert spec_faults(ours, spec(LoRA(r=2)), False) == [
        "Hybrid.methods are LoRA in the checkpoint and LoRA, BitFit here"
    ]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            lambda: [AdaLoRA(init_r=4, target_r=2, target_modules=["body.0", "body.4"]), BitFit()], id="schedule"
        ),
        pytest.param(lambda: [DiffPruning(target=0.2, target_modules=["body.0"]), lora("body.4")], id="sparse"),
    ],
)
def test_a_resumed_run_is_the_unbroken_one(make: Any, tmp_path: Path) -> None:
    class StopAfter(L.Callback):
        """Ends a run of three epochs early; a run of two would have other schedules."""

        def __init__(self, epochs: int) -> None:
            self.epochs = epochs

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch + 1 == self.epochs

    def run(epochs: int, source: Path | None = None) -> tuple[Toy, Path]:
        torch.manual_seed(2)
        module = Toy()
        folder = tmp_path / f"{epochs}-{source is None}"
        fit = trainer(folder, StopAfter(epochs), method=Hybrid(methods=make()), max_epochs=3)
        fit.fit(module, data(), ckpt_path=source)
        return module, Path(fit.checkpoint_callback.best_model_path)  # type: ignore[union-attr]

    whole, last = run(3)
    _, two = run(2)
    resumed, _ = run(3, two)
    expected = {name: tensor for name, tensor in whole.state_dict().items() if ".adapters." in name}
    assert expected
    assert all(torch.equal(resumed.state_dict()[name], tensor) for name, tensor in expected.items())
    loaded = load_from_checkpoint(Toy, last)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.items())
    x = torch.randn(4, 8)
    assert torch.equal(loaded.eval()(x), whole.eval()(x))


def test_a_file_of_hf_peft_is_that_of_the_only_part(tmp_path: Path) -> None:
    model = moved(inject(base_of("bert"), Hybrid(methods=[lora("query", "value")])))
    alone = inject(base_of("bert"), lora("query", "value"))
    export_adapter(model, tmp_path / "hybrid")
    export_adapter(alone, tmp_path / "alone")
    assert keys_and_shapes(tmp_path / "hybrid") == keys_and_shapes(tmp_path / "alone")
    assert config_in(tmp_path / "hybrid") == config_in(tmp_path / "alone")
    back = import_adapter(base_of("bert"), tmp_path / "hybrid")
    assert isinstance(records(back)["default"].method, LoRA)
    inputs = inputs_of("bert")
    assert torch.equal(output_of(back, inputs), output_of(model, inputs))


def test_a_file_of_hf_peft_can_not_hold_several(tmp_path: Path) -> None:
    model = inject(base_of("bert"), Hybrid(methods=[lora("query"), BitFit()]))
    with pytest.raises(PEFTError, match=r"^export_adapter: Hybrid: HF peft has one method in a directory, and this "):
        export_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_makes_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from lightning_peft.cli import main
    from lightning_peft.cli.classes import parameters

    method = (
        "{class_path: Hybrid, init_args: {methods: ["
        "{class_path: LoRA, init_args: {r: 2, target_modules: [net.0]}}, {class_path: BitFit}]}}"
    )
    (tmp_path / "hybrid_toy.py").write_text(TOY)
    base = BASE.replace("cli_toy", "hybrid_toy")
    (tmp_path / "hybrid.yaml").write_text(f"{base}peft:\n  method: {method}\n  modules_to_save: [head]\n")
    (tmp_path / "wrong.yaml").write_text((tmp_path / "hybrid.yaml").read_text().replace("r: 2", "r: 0"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["fit", "--config", "hybrid.yaml"]) == 0
    [file] = (tmp_path / "runs").rglob("*.ckpt")
    stored = torch.load(file, weights_only=True)
    parts = [LoRA(r=2, target_modules=["net.0"]), BitFit()]
    assert stored["peft"]["method"] == {"name": "Hybrid", "fields": Hybrid(methods=[*parts]).fields()}
    assert {"net.0.adapters.default.0.lora_A", "net.0.adapters.default.1.bias"} <= stored["state_dict"].keys()
    capsys.readouterr()
    assert parameters(Hybrid)["methods"].hint == list[Method]
    assert main(["fit", "--config", "wrong.yaml"]) == 2
    assert "LoRA.r: 0 is not a rank; it must be 1 or more" in capsys.readouterr().err
