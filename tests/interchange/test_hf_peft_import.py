"""Imported directories: the outputs that HF peft computes from them, and its words for where adapters go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers
from lightning.pytorch import LightningModule
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft import DoRA, LoRA, PEFTError, disable_adapters, export_adapter, import_adapter, inject, remove
from lightning_peft.injection import adapter_names, adapters, records
from lightning_peft.methods import METHODS
from lightning_peft.methods.hf_peft import HFPeft
from tests.interchange.peft_oracle import (
    TOLERANCE,
    base_of,
    config_in,
    config_of,
    copied,
    edited,
    keys_and_shapes,
    loaded_by_peft,
    moved_theirs,
    output_of,
    peft_model,
    plain,
    saved_by_peft,
    written,
)
from tests.methods.models import TINY, inputs_of
from tests.methods.test_peft_parity import CASES

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing",
    "ignore:The following rank_pattern keys",
    "ignore:Model has `tie_word_embeddings",
    "ignore:Setting `save_embedding_layers`",
    "ignore:Detected pickle protocol",
)
CASES_HERE: dict[str, tuple[str, LoRA, dict[str, Any]]] = {
    **CASES,
    "attention": (
        "attention",
        LoRA(r=4, target_modules=["attn", "one"], rank_pattern={"attn": 2, "attn.out_proj": 2}),
        {},
    ),
    "gaussian": ("linear", LoRA(r=4, init="gaussian", target_modules=["up"]), {}),
}


def assert_same_outputs(ours: nn.Module, theirs: nn.Module, base: nn.Module, name: str) -> None:
    inputs = inputs_of(name)
    torch.testing.assert_close(output_of(ours, inputs), output_of(theirs, inputs), rtol=TOLERANCE, atol=TOLERANCE)
    assert (output_of(ours, inputs) - output_of(base, inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES_HERE)
def test_outputs_and_fields_are_pefts_and_the_export_is_the_same_again(case: str, tmp_path: Path) -> None:
    name, method, more = CASES_HERE[case]
    base = base_of(name)
    folder = written(peft_model(copied(base), config_of(method, **more)), tmp_path / "theirs")
    ours = import_adapter(copied(base), folder).eval()
    assert_same_outputs(ours, loaded_by_peft(copied(base), folder), base, name)
    found = records(ours)["default"].method
    expected = inject(copied(base), method, modules_to_save=more.get("modules_to_save", []))
    assert type(found) is type(method)
    assert set(adapters(ours, "default")) == set(adapters(expected, "default"))
    ranks = {key: tuple(parameter.shape) for key, parameter in expected.named_parameters() if ".adapters." in key}
    assert {key: tuple(p.shape) for key, p in ours.named_parameters() if ".adapters." in key} == ranks
    assert {p.dtype for key, p in ours.named_parameters() if ".adapters." in key} == {torch.float32}
    assert {key for key, p in ours.named_parameters() if p.requires_grad} == set(ranks)
    theirs, again = (
        load_file(path / "adapter_model.safetensors") for path in (folder, export_adapter(ours, tmp_path / "ours"))
    )
    # an output layer's A has no effect, and is not kept in an export
    torch.testing.assert_close(
        {key: t for key, t in again.items() if "out_proj" not in key},
        {key: t for key, t in theirs.items() if "out_proj" not in key},
        rtol=0,
        atol=0,
    )
    assert again.keys() == theirs.keys()
    with disable_adapters(ours):
        inputs = inputs_of(name)
        assert torch.equal(output_of(ours, inputs), output_of(base, inputs))
    assert sorted(remove(ours).state_dict()) == sorted(base.state_dict())


def test_fields_are_kept_as_they_are_given_where_they_mean_the_same(tmp_path: Path) -> None:
    method = DoRA(
        r=4,
        alpha=3,
        dropout=0.25,
        rslora=True,
        target_modules=r".*\.(q|v|o)_proj",
        exclude_modules=["o_proj"],
        rank_pattern={r"layers\.0\.self_attn\.\w+": 2},
        alpha_pattern={"v_proj": 1.5},
    )
    folder = written(peft_model(base_of("llama"), config_of(method)), tmp_path)
    assert records(import_adapter(base_of("llama"), folder))["default"].method == method


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}),
        ("llama", {"target_modules": "all-linear", "exclude_modules": ["lm_head", "down_proj"]}),
        ("llama", {}),  # peft knows by itself what to adapt in a llama
        ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
        ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
        ("bert", {"target_modules": ["dense"], "modules_to_save": ["classifier", "pooler"]}),
        ("linear", {"target_modules": ["up", "nothing"]}),
        ("linear", {"target_modules": ["up"], "init_lora_weights": False}),
        ("linear", {"target_modules": ["up"], "init_lora_weights": "orthogonal"}),
        ("linear", {"target_modules": ["up"], "init_lora_weights": "mica"}),
        ("linear", {"target_modules": ["up"], "rank_pattern": {"^layers.up": 2, "absent": 9}}),
        ("t5", {"target_modules": ["q"], "task_type": "SEQ_2_SEQ_LM", "modules_to_save": ["lm_head"]}),
        ("resnet", {"target_modules": ["convolution"], "modules_to_save": ["normalization", "classifier"]}),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_where_adapters_go_is_taken_from_the_tensors(
    name: str, config: dict[str, Any], wrapped: bool, tmp_path: Path
) -> None:
    base = base_of(name)
    folder = written(peft_model(copied(base), peft.LoraConfig(r=4, **config)), tmp_path)
    theirs = loaded_by_peft(copied(base), folder)
    ours = import_adapter(Lit(copied(base)) if wrapped else copied(base), folder).eval()
    assert_same_outputs(ours, theirs, base, name)
    prefix = "net." if wrapped else ""
    expected = {
        path.removeprefix("base_model.model.")
        for path, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    found = {path for path, adapter in adapters(ours, "default").items() if type(adapter).__name__ != "SavedCopy"}
    assert found == {prefix + path for path in expected}
    # and the method finds the same modules when it is injected anew, as it is from a checkpoint
    record = records(ours)["default"]
    again = inject(
        Lit(copied(base)) if wrapped else copied(base), record.method, modules_to_save=record.modules_to_save
    )
    assert list(adapters(again, "default")) == list(adapters(ours, "default"))


class Lit(LightningModule):
    """A LightningModule around a model, as users write them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model

    def forward(self, *args: Any, **inputs: Tensor) -> Any:
        return self.net(*args, **inputs)


@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize(
    ("name", "init", "targets"),
    [
        ("linear", "pissa", ["up", "gate"]),
        ("linear", "olora", ["up", "gate"]),
        ("conv1D", "pissa", ["up", "down"]),
        ("llama", "pissa", ["q_proj", "down_proj"]),
        ("gpt2", "pissa", ["c_attn"]),
    ],
)
def test_a_start_from_the_weight_that_peft_takes_anew_at_load_is_taken_here_too(
    name: str, init: str, targets: list[str], method: type[LoRA], tmp_path: Path
) -> None:
    base = base_of(name)
    config = config_of(method(r=3, alpha=5, init=init, target_modules=targets))
    folder = written(peft_model(copied(base), config), tmp_path, 0.03)
    ours = import_adapter(copied(base), folder).eval()
    assert_same_outputs(ours, loaded_by_peft(copied(base), folder), base, name)
    assert records(ours)["default"].method.init == init  # type: ignore[attr-defined]


def test_eva_and_its_ranks_are_read(tmp_path: Path) -> None:
    config = config_of(LoRA(r=4, target_modules=["up", "gate"], rank_pattern={"layers.up": 2, "layers.gate": 6}))
    folder = written(peft_model(base_of("linear"), config), tmp_path)
    edited(folder, init_lora_weights="eva", eva_config={"rho": 2.0})
    ours = import_adapter(base_of("linear"), folder).eval()
    theirs = loaded_by_peft(base_of("linear"), edited(folder, init_lora_weights=True, eva_config=None))
    assert_same_outputs(ours, theirs, base_of("linear"), "linear")


def test_pickled_tensors_and_the_keys_of_early_releases_are_read(tmp_path: Path) -> None:
    folder = written(
        peft_model(base_of("bert"), peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")), tmp_path
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    early = {
        key.replace("lora_A.", "lora_A.default.").replace("classifier.", "classifier.modules_to_save.default."): tensor
        for key, tensor in tensors.items()
    }
    assert set(early) != set(tensors)
    torch.save(early, folder / "adapter_model.bin")
    # what peft 0.3 wrote
    known = ("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "target_modules", "lora_alpha")
    more = ("lora_dropout", "fan_in_fan_out", "bias", "modules_to_save", "init_lora_weights")
    config = {name: value for name, value in config_in(folder).items() if name in (*known, *more)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    ours = import_adapter(base_of("bert"), folder).eval()
    torch.save(tensors, folder / "adapter_model.bin")
    assert_same_outputs(ours, loaded_by_peft(base_of("bert"), folder), base_of("bert"), "bert")


def test_a_resized_embedding_is_trained_whole_and_an_equal_one_left_out(tmp_path: Path) -> None:
    base = base_of("llama")
    model = moved_theirs(peft_model(copied(base), config_of(LoRA(r=2, target_modules=["q_proj"]))))
    model.save_pretrained(tmp_path / "equal", save_embedding_layers=True)
    assert "base_model.model.lm_head.weight" in keys_and_shapes(tmp_path / "equal")
    ours = import_adapter(copied(base), tmp_path / "equal").eval()
    assert records(ours)["default"].modules_to_save == ()
    with torch.no_grad():
        model.get_input_embeddings().weight[5:8].normal_()
    model.save_pretrained(tmp_path / "other", save_embedding_layers=True)
    with pytest.warns(UserWarning, match=r"model\.embed_tokens\.weight differs from the base's; its module is trained"):
        ours = import_adapter(copied(base), tmp_path / "other").eval()
    assert_same_outputs(ours, loaded_by_peft(copied(base), tmp_path / "other"), base, "llama")
    assert records(ours)["default"].modules_to_save == ("model.embed_tokens",)
    small = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY | {"vocab_size": 40}, num_key_value_heads=2))
    with pytest.raises(PEFTError, match=r"is \(48, 32\) in the directory and \(40, 32\) here; resize the base first"):
        import_adapter(small, tmp_path / "other")


def test_a_targeted_embedding_that_is_stored_with_its_base_is_read(tmp_path: Path) -> None:
    base = base_of("llama")
    model = moved_theirs(peft_model(copied(base), config_of(LoRA(r=2, target_modules=["embed_tokens"]))))
    model.save_pretrained(tmp_path)  # peft stores the frozen embedding beside its adapter
    assert "base_model.model.model.embed_tokens.base_layer.weight" in keys_and_shapes(tmp_path)
    ours = import_adapter(copied(base), tmp_path).eval()
    assert_same_outputs(ours, loaded_by_peft(copied(base), tmp_path), base, "llama")
    with torch.no_grad():
        base.model.embed_tokens.weight.add_(1)
    with pytest.raises(PEFTError, match="differs from the base's, and an adapter stands on it; load it into the base"):
        import_adapter(base, tmp_path)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.one(x)
        return output


def test_groups_that_an_adapter_of_peft_mixes_are_refused(tmp_path: Path) -> None:
    base = Grouped().eval()
    folder = written(peft_model(copied(base), peft.LoraConfig(r=4, target_modules=["one"])), tmp_path / "mixed")
    with pytest.raises(PEFTError) as caught:
        import_adapter(copied(base), folder)
    assert str(caught.value) == (
        f"{folder}: base_model.model.one.lora_A.weight: its A mixes the inputs of the layer's groups, which LoRA here "
        "keeps apart"
    )
    exported = export_adapter(inject(copied(base), LoRA(r=4, target_modules=["one"])), tmp_path / "ours")
    assert set(adapters(import_adapter(copied(base), exported), "default")) == {"one"}


def test_an_update_of_an_attentions_output_layer_is_refused(tmp_path: Path) -> None:
    model = peft_model(base_of("attention"), peft.LoraConfig(r=2, target_modules=["attn"]))
    for key, parameter in model.named_parameters():
        if "out_proj.lora_B" in key:
            nn.init.ones_(parameter)
    with pytest.raises(PEFTError) as caught:
        import_adapter(base_of("attention"), saved_by_peft(model, tmp_path))
    key = "base_model.model.layers.attn.base_layer.out_proj.lora_B.weight"
    reason = "HF peft 0.21 applies an update of an attention's output layer twice"
    assert str(caught.value) == f"{tmp_path}: {key}: {reason}"


def test_every_field_of_the_installed_peft_is_known(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """One that a later release adds has to be looked at: does its value change what the tensors compute?"""
    fields = set(peft.LoraConfig().to_dict())
    assert fields == set(config_in(export_adapter(inject(base_of("linear"), LoRA(target_modules=["up"])), tmp_path)))
    recwarn.clear()
    import_adapter(base_of("linear"), plain(tmp_path))
    assert not [warning for warning in recwarn if "unknown fields" in str(warning.message)]


def test_the_hub_is_asked_for_the_adapters_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = plain(tmp_path)
    asked: list[Any] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = import_adapter(base_of("linear"), "org/name", revision="v1")
    assert adapter_names(model) == ["default"]
    files = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
    assert asked == [("org/name", {"revision": "v1", "allow_patterns": files})]


def test_what_a_method_writes_is_read_by_one_method() -> None:
    # HF peft's files don't tell a prefix without its MLP from one that never had any
    same = {"PTuningV2": "PrefixTuning"}
    for name, method in METHODS.items():
        if method.peft_defaults and method is not HFPeft:  # which reads all that no other does
            assert [other for other, cls in METHODS.items() if cls.reads_peft(method.peft_defaults)] == [
                same.get(name, name)
            ]
