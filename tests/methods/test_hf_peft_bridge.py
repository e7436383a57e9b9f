"""HF peft's other methods through our adapters: equal to peft itself in outputs, gradients and steps, with our names,
checkpoints and files."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_peft import (
    Hybrid,
    PEFTError,
    disable_adapters,
    export_adapter,
    import_adapter,
    inject,
    load_from_checkpoint,
    merge,
    remove,
    trainable_parameters,
    unmerge,
)
from lightning_peft.callback.module import NOTICE
from lightning_peft.injection import adapters, records
from lightning_peft.methods.bitfit import BitFit
from lightning_peft.methods.hf_peft import HFPeft
from lightning_peft.state import adapter_tensors, base_keys
from tests.callback.toys import Toy, data, trainer
from tests.cli.conftest import BASE, TOY
from tests.interchange.peft_oracle import keys_and_shapes, loaded_by_peft, peft_model, saved_by_peft
from tests.methods.models import MODELS, inputs_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`"),
]
TOLERANCE = 1e-5
TARGETS = {
    "linear": ["up", "gate"],
    "conv1D": ["up", "down"],
    "llama": ["q_proj", "down_proj"],
    "bert": ["query", "dense"],
    "gpt2": ["c_attn", "c_fc"],
    "t5": ["q", "wo"],
    "vit": ["query", "dense"],
    "conv2d": ["one", "two"],
}
NORMS = {"llama": ["input_layernorm", "norm"], "bert": ["LayerNorm"], "gpt2": ["ln_1"], "t5": ["layer_norm"]}
KINDS: dict[str, dict[str, Any]] = {
    "VERA": {"r": 4, "d_initial": 0.3},
    "OFT": {"oft_block_size": 4, "r": 0},
    "LOHA": {"r": 2, "alpha": 3},
    "LN_TUNING": {},
}
CASES = [
    *((kind, model) for kind in ("VERA", "OFT", "LOHA") for model in ("linear", "llama", "bert", "t5")),
    *(("LN_TUNING", model) for model in NORMS),
    ("VERA", "gpt2"),
    ("VERA", "conv1D"),
    ("OFT", "conv2d"),
    ("LOHA", "conv2d"),
]
ROUGH = ("OFT", "conv2d")
"""peft sums overlapping patches of the convolution, and so neither starts as the base nor can be merged."""
every_case = pytest.mark.parametrize(("kind", "name"), CASES)


def fields(kind: str, name: str) -> dict[str, Any]:
    targets = NORMS if kind == "LN_TUNING" else TARGETS
    return {"peft_type": kind, **KINDS[kind], "target_modules": targets[name]}


def config(kind: str, name: str) -> peft.PeftConfig:
    given = fields(kind, name)
    return peft.PEFT_TYPE_TO_CONFIG_MAPPING[given.pop("peft_type")](**given)


def base_of(name: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name]().eval()


def output_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output.logits


def ours_of(kind: str, name: str, deviation: float = 0.1) -> nn.Module:
    model = inject(base_of(name), HFPeft(config=fields(kind, name)))
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * deviation)
    return model


def both(kind: str, name: str) -> tuple[nn.Module, nn.Module]:
    """Ours and peft's, moved from the start, with the same values."""
    ours, theirs = ours_of(kind, name), peft_model(base_of(name), config(kind, name))
    other = dict(theirs.named_parameters())
    with torch.no_grad():
        for key, parameter in own_tensors_of(ours).items():
            other[key].copy_(parameter)
    return ours, theirs


def own_tensors_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by peft's names."""
    return {
        f"base_model.model.{name.replace('adapters.default.layer.', '')}": parameter
        for name, parameter in trainable_parameters(model).items()
    }


@every_case
def test_it_computes_and_trains_as_peft_does(kind: str, name: str) -> None:
    ours, theirs = both(kind, name)
    inputs = inputs_of(name)
    own = own_tensors_of(ours)
    other = {key: parameter for key, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert own.keys() == other.keys()
    goal = torch.randn_like(output_of(ours, inputs))
    optimizers = [torch.optim.AdamW(tensors.values(), lr=1e-3) for tensors in (own, other)]
    for step in range(11):
        outputs = [output_of(model, inputs) for model in (ours, theirs)]
        torch.testing.assert_close(*outputs, rtol=TOLERANCE, atol=TOLERANCE)
        for optimizer, output in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            (output - goal).square().mean().backward()
            if step:
                optimizer.step()
        if not step:
            for key, parameter in own.items():
                torch.testing.assert_close(parameter.grad, other[key].grad, rtol=1e-4, atol=TOLERANCE)


@every_case
def test_it_starts_as_peft_does(kind: str, name: str) -> None:
    inputs, base = inputs_of(name), base_of(name)
    with torch.no_grad():
        expected = output_of(peft_model(base_of(name), config(kind, name)), inputs)
        before = output_of(base, inputs)
        model = inject(base, HFPeft(config=config(kind, name)))
        torch.testing.assert_close(output_of(model, inputs), expected, rtol=TOLERANCE, atol=TOLERANCE)
        if (kind, name) != ROUGH:
            torch.testing.assert_close(output_of(model, inputs), before, rtol=TOLERANCE, atol=TOLERANCE)


@every_case
def test_the_base_keeps_its_names_and_merging_removing_and_disabling_work(kind: str, name: str) -> None:
    base, inputs = base_of(name).requires_grad_(False), inputs_of(name)
    keys, bits = set(base.state_dict()), copy.deepcopy(base.state_dict())
    classes = [type(module) for module in base.modules()]
    with torch.no_grad():
        before = output_of(base, inputs)
    model = inject(base, HFPeft(config=fields(kind, name)))
    assert base_keys(model) == keys
    assert not any("base_layer" in key for key in model.state_dict())
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        adapted = output_of(model, inputs)
        assert (adapted - before).abs().max() > 1e-3
        with disable_adapters(model):
            assert torch.equal(output_of(model, inputs), before)
        if (kind, name) == ROUGH:
            with pytest.raises(PEFTError, match=r"^merge: peft's OFT sums overlapping patches of a convolution"):
                merge(model)
        else:
            merge(model)
            torch.testing.assert_close(output_of(model, inputs), adapted, rtol=TOLERANCE, atol=TOLERANCE)
        unmerge(model)
        assert torch.equal(output_of(model, inputs), adapted)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(output_of(copied, inputs), adapted)
        remove(model)
        assert [type(module) for module in model.modules()] == classes
        assert all(torch.equal(tensor, bits[key]) for key, tensor in model.state_dict().items())
        assert torch.equal(output_of(model, inputs), before)


@every_case
def test_peft_loads_what_is_exported_and_what_it_writes_is_imported(kind: str, name: str, tmp_path: Path) -> None:
    inputs, model = inputs_of(name), ours_of(kind, name)
    theirs = loaded_by_peft(base_of(name), export_adapter(model, tmp_path / "ours"))
    with torch.no_grad():
        expected = output_of(model, inputs)
        torch.testing.assert_close(output_of(theirs, inputs), expected, rtol=TOLERANCE, atol=TOLERANCE)
    folder = saved_by_peft(theirs, tmp_path / "theirs")
    assert keys_and_shapes(folder) == keys_and_shapes(tmp_path / "ours")
    for source in ("ours", "theirs"):
        back = import_adapter(base_of(name), tmp_path / source)
        assert isinstance(records(back)["default"].method, HFPeft)
        with torch.no_grad():
            assert torch.equal(output_of(back, inputs), expected)
    again = export_adapter(back, tmp_path / "again")
    assert keys_and_shapes(again) == keys_and_shapes(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_over_a_bf16_base_what_trains_is_fp32(kind: str) -> None:
    inputs, base = inputs_of("llama"), base_of("llama")
    expected = output_of(inject(copy.deepcopy(base), HFPeft(config=fields(kind, "llama"))), inputs)
    model = inject(base.to(torch.bfloat16), HFPeft(config=fields(kind, "llama")))
    assert {parameter.dtype for parameter in trainable_parameters(model).values()} == {torch.float32}
    output = output_of(model, inputs)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    output.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trainable_parameters(model).values())


@pytest.mark.parametrize(
    ("kind", "more", "exports"),
    [
        ("BOFT", {"boft_block_size": 4}, True),
        ("FOURIERFT", {"n_frequency": 20}, True),
        ("LOKR", {"r": 2}, True),
        ("MISS", {"r": 2}, True),
        ("VBLORA", {"r": 2, "num_vectors": 8, "vector_length": 4, "topk": 2}, True),
        ("RANDLORA", {"r": 2}, False),
    ],
)
def test_other_methods_run_merge_and_travel_too(kind: str, more: dict[str, Any], exports: bool, tmp_path: Path) -> None:
    given, inputs = {**more, "target_modules": ["query", "dense"]}, inputs_of("bert")
    theirs = peft_model(base_of("bert"), peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind](**given))
    model = inject(base_of("bert"), HFPeft(config={"peft_type": kind, **given}))
    other = dict(theirs.named_parameters())
    with torch.no_grad():
        before = output_of(base_of("bert"), inputs)
        for key, parameter in own_tensors_of(model).items():
            parameter.add_(torch.randn_like(parameter))
            other[key].copy_(parameter)
        expected = output_of(theirs, inputs)
        assert (expected - before).abs().max() > 1e-4
        torch.testing.assert_close(output_of(model, inputs), expected, rtol=TOLERANCE, atol=TOLERANCE)
        merge(model)
        torch.testing.assert_close(output_of(model, inputs), expected, rtol=TOLERANCE, atol=TOLERANCE)
        unmerge(model)
        if not exports:
            with pytest.raises(PEFTError, match=f"HF peft stores {kind} in another form"):
                export_adapter(model, tmp_path)
            return
        loaded = loaded_by_peft(base_of("bert"), export_adapter(model, tmp_path))
        torch.testing.assert_close(output_of(loaded, inputs), expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert torch.equal(output_of(import_adapter(base_of("bert"), tmp_path), inputs), output_of(model, inputs))


def test_the_projections_that_vera_shares_are_one_tensor_and_once_in_a_file(tmp_path: Path) -> None:
    model = ours_of("VERA", "llama")
    state = adapter_tensors(model, "default")
    shared = {key: tensor for key, tensor in state.items() if ".vera_A." in key or ".vera_B." in key}
    assert len(shared) == 2 * len(adapters(model, "default")) == 8
    assert len({tensor.data_ptr() for tensor in shared.values()}) == 2
    saved = io.BytesIO()
    torch.save(state, saved)
    once = sum({t.data_ptr(): t.numel() * t.element_size() for t in state.values()}.values())
    names = keys_and_shapes(export_adapter(model, tmp_path))
    assert sum("vera_A" in key or "vera_B" in key for key in names) == 2
    assert once < len(saved.getvalue()) < once + 600 * len(state) + 2000
    copied = adapter_tensors(copy.deepcopy(model), "default")
    assert len({tensor.data_ptr() for key, tensor in copied.items() if ".vera_" in key and "lambda" not in key}) == 2


def test_projections_that_are_not_saved_are_made_again_from_their_seed() -> None:
    method = HFPeft(config={**fields("VERA", "linear"), "save_projection": False, "projection_prng_key": 5})
    first, second = inject(base_of("linear"), method), inject(base_of("linear"), method)
    assert not any("vera_A" in key for key in first.state_dict())
    with torch.no_grad():
        for parameter in trainable_parameters(first).values():
            parameter.add_(torch.randn_like(parameter))
    second.load_state_dict(first.state_dict())
    inputs = inputs_of("linear")
    assert torch.equal(output_of(second, inputs), output_of(first, inputs))


def test_a_configuration_object_and_a_mapping_are_the_same_and_defaults_are_left_out() -> None:
    given = peft.LoHaConfig(r=2, alpha=3, target_modules={"gate", "up"}, rank_dropout=0.0)
    method = HFPeft(config=given)
    assert method.fields() == {"config": {"peft_type": "LOHA", "r": 2, "alpha": 3, "target_modules": ["gate", "up"]}}
    assert HFPeft(**method.fields()) == method
    assert HFPeft(config={"peft_type": "LN_TUNING"}).config == {"peft_type": "LN_TUNING"}


def test_without_target_modules_peft_chooses_by_the_kind_of_the_model_inside() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = MODELS["llama"]()

    model = inject(Around(), HFPeft(config={"peft_type": "VERA", "r": 2}))
    assert {path.rpartition(".")[2] for path in adapters(model, "default")} == {"q_proj", "v_proj"}
    assert all(path.startswith("model.model.layers.") for path in adapters(model, "default"))


def test_all_linear_leaves_the_head_out() -> None:
    model = inject(base_of("bert"), HFPeft(config={"peft_type": "VERA", "r": 2, "target_modules": "all-linear"}))
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {*adapters(model, "default")} == linear - {"classifier"}


def test_modules_that_are_trained_whole_are_left_to_that() -> None:
    model = base_of("linear")
    method = HFPeft(config={"peft_type": "LOHA", "r": 2, "target_modules": ["up", "gate", "head"]})
    inject(model, method, modules_to_save=["head"])
    own = {name for name in trainable_parameters(model) if ".head." in name}
    assert own == {"layers.head.adapters.default.weight", "layers.head.adapters.default.bias"}


def test_on_the_meta_device_it_takes_no_memory() -> None:
    with torch.device("meta"):
        model = MODELS["llama"]()
    inject(model, HFPeft(config=fields("LOHA", "llama")))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    each = {"q_proj": 2 * 2 * (32 + 32), "down_proj": 2 * 2 * (40 + 32)}
    assert sum(p.numel() for p in trainable_parameters(model).values()) == 2 * sum(each.values())


def test_it_is_a_part_of_a_hybrid() -> None:
    inputs = inputs_of("linear")
    parts = [HFPeft(config=fields("LOHA", "linear")), BitFit(target_modules=["up"])]
    model = inject(base_of("linear"), Hybrid(methods=parts))
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        expected = output_of(model, inputs)
        merge(model)
        torch.testing.assert_close(output_of(model, inputs), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["VERA", "OFT", "LOHA", "LN_TUNING"])
def test_a_resumed_run_is_the_unbroken_one_and_a_checkpoint_holds_no_frozen_tensor(kind: str, tmp_path: Path) -> None:
    def method() -> HFPeft:
        if kind == "LN_TUNING":
            return HFPeft(config={"peft_type": kind, "target_modules": ["norm"]})
        return HFPeft(config={"peft_type": kind, **KINDS[kind], "target_modules": ["body.0", "body.4"]})

    class Module(Toy):
        def build(self) -> None:
            super().build()
            self.norm = nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.body(x)))

    def run(epochs: int, source: Path | None = None) -> tuple[Toy, Path]:
        torch.manual_seed(2)
        module = Module()
        fit = trainer(tmp_path, method=method(), max_epochs=epochs)
        fit.fit(module, data(), ckpt_path=source)
        target = tmp_path / f"{epochs}-{source is None}.ckpt"
        fit.save_checkpoint(target)
        return module, target

    whole, _ = run(3)
    _, two = run(2)
    resumed, _ = run(3, two)
    expected = {name: tensor for name, tensor in whole.state_dict().items() if ".adapters." in name}
    assert expected
    assert all(torch.equal(resumed.state_dict()[name], tensor) for name, tensor in expected.items())
    loaded = load_from_checkpoint(Module, two)
    stored = torch.load(two, weights_only=True)
    assert stored["peft"]["method"] == {"name": "HFPeft", "fields": method().fields()}
    own = {key for key in stored["state_dict"] if ".adapters.default." in key}
    assert own == {*adapter_tensors(loaded, "default")}
    assert all(torch.equal(loaded.state_dict()[key], stored["state_dict"][key]) for key in own)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    others = {*stored["state_dict"]} - own - {NOTICE}
    assert [key for key in others if not key.endswith(statistics)] == []


@pytest.mark.parametrize(
    ("given", "faults"),
    [
        ("VERA", ["config: 'VERA' is neither a configuration of peft nor a mapping of its fields"]),
        ({"peft_type": "VERA", "rr": 3}, ["config: VeraConfig has no field 'rr'; did you mean 'r'?"]),
        (
            {"peft_type": "VERA", "modules_to_save": ["head"], "bias": "all"},
            [
                "config: modules_to_save trains modules in peft's way; name them in the callback's modules_to_save, or "
                "inject's",
                "config: bias 'all' trains the base's biases in place; use Hybrid with BitFit instead",
            ],
        ),
        (
            {"peft_type": "PROMPT_TUNING"},
            ["config: peft_type 'PROMPT_TUNING' is a method of this package; use PromptTuning"],
        ),
        ({"peft_type": "LORA", "use_dora": True}, ["config: peft_type 'LORA' is a method of this package; use DoRA"]),
        (
            {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 3},
            [
                "config: peft_type 'MULTITASK_PROMPT_TUNING' puts no layers around modules, and so can't stand on them",
            ],
        ),
        ({"peft_type": "POLY"}, ["config: peft_type 'POLY' needs the tasks of a batch in the model's forward"]),
        ({"peft_type": "OFT", "r": 8, "oft_block_size": 8}, None),
    ],
)
def test_wrong_configurations_are_told_at_once(given: Any, faults: list[str] | None) -> None:
    with pytest.raises(PEFTError) as error:
        HFPeft(config=given)
    if faults is None:
        [fault] = error.value.faults
        assert fault.startswith("HFPeft.config: ")
        assert "oft_block_size" in fault
    else:
        assert error.value.faults == tuple(f"HFPeft.{fault}" for fault in faults)


def test_an_unknown_type_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        PEFTError, match=r"^HFPeft\.config: peft_type 'VEAR' is none of ADALORA, .*; did you mean 'VERA'"
    ):
        HFPeft(config={"peft_type": "VEAR"})


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "linear",
            {"peft_type": "VERA", "target_modules": ["up", "gat"]},
            r"config: target_modules: 'gat' matches nothing; did you mean 'gate' or 'act'\?",
        ),
        ("linear", {"peft_type": "VERA", "target_modules": "gat"}, r"config: VERA: peft refuses Toy: .*"),
        ("linear", {"peft_type": "VERA"}, r"config: VERA: peft refuses Toy: Please specify `target_modules`.*"),
        (
            "embedding",
            {"peft_type": "LOHA", "target_modules": ["embed"]},
            r"config: LOHA: peft refuses Toy: .*Embedding.*",
        ),
        (
            "attention",
            {"peft_type": "LOHA", "target_modules": ["out_proj"]},
            r"config: LOHA: layers\.attn\.out_proj: nn\.MultiheadAttention reads its weights, where peft's layers "
            r"can't reach; exclude it",
        ),
    ],
)
def test_what_cannot_hold_is_refused_and_the_model_left_as_it_was(
    name: str, given: dict[str, Any], message: str
) -> None:
    model = base_of(name)
    bits = copy.deepcopy(model.state_dict())
    own = [(type(module), sorted(vars(module))) for module in model.modules()]
    with pytest.raises(PEFTError, match=rf"^HFPeft\.{message}$"):
        inject(model, HFPeft(config=given))
    assert [(type(module), sorted(vars(module))) for module in model.modules()] == own
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, bits[key]) for key, tensor in model.state_dict().items())


def test_a_start_that_changes_the_base_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def reset(self: Any, adapter_name: str) -> None:
        self.get_base_layer().weight.data = self.get_base_layer().weight.data + 1

    monkeypatch.setattr(peft.tuners.loha.layer.LoHaLayer, "reset_adapter_parameters", reset)
    model = base_of("linear")
    before = copy.deepcopy(model.state_dict())
    expected = r"^HFPeft\.config: LOHA: layers\.up: it changes the base's weights at its start; choose another "
    with pytest.raises(PEFTError, match=expected):
        inject(model, HFPeft(config=fields("LOHA", "linear")))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(kind=st.sampled_from(["VERA", "OFT", "LOHA"]), drawn=st.data())
def test_any_value_of_any_field_is_taken_or_is_a_clear_error(kind: str, drawn: st.DataObject) -> None:
    known = sorted(peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind]().to_dict())
    field, value = drawn.draw(st.sampled_from(known)), drawn.draw(JSON)
    model = base_of("linear")
    try:
        inject(model, HFPeft(config={**fields(kind, "linear"), field: value}))
    except PEFTError:
        assert not any(".adapters." in name for name in model.state_dict())


def test_without_the_package_one_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    expected = r"^HFPeft needs the package peft, which is not installed; pip install 'lightning-peft\[peft\]'$"
    with pytest.raises(PEFTError, match=expected):
        HFPeft(config={"peft_type": "VERA"})
    assert not HFPeft.reads_peft({"peft_type": "VERA"})


def test_a_directory_of_a_native_method_is_read_by_that_method() -> None:
    assert not HFPeft.reads_peft({"peft_type": "LORA"})
    assert not HFPeft.reads_peft({"peft_type": "NEWER"})
    assert HFPeft.reads_peft({"peft_type": "VERA"})


def test_a_directory_of_an_unknown_type_is_refused_with_the_types_there_are(tmp_path: Path) -> None:
    folder = export_adapter(ours_of("VERA", "linear"), tmp_path)
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace('"VERA"', '"NEWER"'))
    with pytest.raises(PEFTError, match=r"peft_type 'NEWER' has no method here.*; there are .*LORA.* package peft has"):
        import_adapter(base_of("linear"), folder)


def test_the_command_line_takes_the_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_peft.cli import main

    method = "{class_path: HFPeft, init_args: {config: {peft_type: LOHA, r: 2, target_modules: [net.0, net.2]}}}"
    (tmp_path / "bridge_toy.py").write_text(TOY)
    text = f"{BASE.replace('cli_toy', 'bridge_toy')}peft:\n  method: {method}\n  modules_to_save: [head]\n"
    (tmp_path / "bridge.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["fit", "--config", "bridge.yaml", "--peft.method.init_args.config.r", "3"]) == 0
    [file] = (tmp_path / "runs").rglob("*.ckpt")
    stored = torch.load(file, weights_only=True)
    fields = {"peft_type": "LOHA", "r": 3, "target_modules": ["net.0", "net.2"]}
    assert stored["peft"]["method"] == {"name": "HFPeft", "fields": {"config": fields}}
    assert "net.0.adapters.default.layer.hada_w1_a.default" in stored["state_dict"]
