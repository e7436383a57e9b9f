"""Directories that can't be imported: one error with all faults, no code run, and the model as it was."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_peft import PEFTError, import_adapter, remove
from lightning_peft.injection import adapter_names, adapters
from tests.interchange.peft_oracle import (
    base_of,
    copied,
    edited,
    peft_model,
    plain,
    written,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing",
    "ignore:The following rank_pattern keys",
    "ignore:Model has `tie_word_embeddings",
    "ignore:Setting `save_embedding_layers`",
    "ignore:Detected pickle protocol",
)


def test_a_second_adapter_stands_beside_the_first_and_a_bad_one_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    base = base_of("linear")
    folder = plain(tmp_path)
    model = import_adapter(import_adapter(copied(base), folder), folder, adapter_name="other")
    assert adapter_names(model) == ["default", "other"]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(PEFTError, match="the model has an adapter 'other'"):
        import_adapter(model, folder, adapter_name="other")
    with pytest.raises(PEFTError, match="1 missing from the checkpoint"):
        import_adapter(model, changed(folder, drop="up.lora_A"), adapter_name="third")
    assert adapter_names(model) == ["default", "other"]
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert sorted(remove(model).state_dict()) == sorted(base.state_dict())


def changed(folder: Path, *, drop: str = "", **more: Tensor) -> Path:
    """The directory without one tensor, and with others."""
    file = folder / "adapter_model.safetensors"
    tensors = {key: tensor for key, tensor in load_file(file).items() if not drop or drop not in key}
    save_file({**tensors, **{key.replace("__", "."): tensor for key, tensor in more.items()}}, file)
    return folder


def test_all_tensors_that_do_not_fit_are_told_at_once(tmp_path: Path) -> None:
    up = "base_model__model__layers__up__lora_B__weight"
    extra = "base_model__model__layers__gate__lora_magnitude_vector"
    folder = changed(plain(tmp_path), drop="gate.lora_A", **{up: torch.zeros(20, 3), extra: torch.zeros(20)})
    base = base_of("linear")
    with pytest.raises(PEFTError) as caught:
        import_adapter(base, folder)
    assert list(caught.value.faults) == [
        f"{folder}: {fault}"
        for fault in (
            "1 missing from the checkpoint: base_model.model.layers.gate.lora_A.weight",
            "1 not of this model: base_model.model.layers.gate.lora_magnitude_vector; did you mean "
            "'base_model.model.layers.gate.lora_A.weight'?",
            "1 of another shape: base_model.model.layers.up.lora_B.weight is (20, 3) in the checkpoint and (20, 4) "
            "here",
        )
    ]
    assert adapter_names(base) == []
    assert [type(module) for module in base.modules()] == [type(module) for module in base_of("linear").modules()]


def test_modules_that_the_model_lacks_and_other_keys_are_told(tmp_path: Path) -> None:
    more = {"base_model__model__layers__downn__lora_A__weight": torch.zeros(2), "unet__x": torch.zeros(2)}
    with pytest.raises(PEFTError) as caught:
        import_adapter(base_of("linear"), changed(plain(tmp_path), **more))
    hint = "; did you mean 'layers.head' or 'layers.up' or 'layers'?"
    assert list(caught.value.faults) == [
        f"{tmp_path}: base_model.model.layers.downn.lora_A.weight: Toy has no module 'layers.downn'{hint}",
        f"{tmp_path}: unet.x is no key of a LoRA",
    ]


def test_a_head_that_is_missing_is_told(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    folder = changed(written(peft_model(base_of("bert"), config), tmp_path), drop="classifier.bias")
    with pytest.raises(PEFTError) as caught:
        import_adapter(base_of("bert"), folder)
    assert str(caught.value) == f"{folder}: 1 missing from the checkpoint: base_model.model.classifier.bias"


UNHONOURED: dict[str, Any] = {
    "bias": "all",
    "layer_replication": [[0, 1]],
    "alora_invocation_tokens": [3],
    "use_qalora": True,
    "lora_bias": True,
    "trainable_token_indices": [1, 2],
    "megatron_config": {"a": 1},
    "use_bdlora": {"nblocks": 2},
    "velora_config": {"num_groups": 2},
    "monteclora_config": {"num_samples": 2},
    "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 1.0},
    "ensure_weight_tying": True,
}


def test_values_that_cant_be_honoured_are_told_at_once_with_reasons(tmp_path: Path) -> None:
    folder = edited(plain(tmp_path), init_lora_weights="loftq", **UNHONOURED)
    with pytest.raises(PEFTError) as caught:
        import_adapter(base_of("linear"), folder)
    faults = caught.value.faults
    assert len(faults) == len(UNHONOURED) + 1
    for name, value in UNHONOURED.items():
        assert any(fault.startswith(f"{folder}: {name}: {value!r} can't be honoured: ") for fault in faults)
    assert faults[-1].startswith(f"{folder}: init_lora_weights: 'loftq' changed the base's weights at its start")


def test_unknown_fields_are_warned_of_once(tmp_path: Path) -> None:
    folder = edited(plain(tmp_path), wings=2, antlers="big")
    with pytest.warns(UserWarning, match="unknown fields") as caught:
        import_adapter(base_of("linear"), folder)
    messages = [str(warning.message) for warning in caught if "import_adapter" in str(warning.message)]
    assert messages == [f"import_adapter: {folder}: unknown fields are passed over: antlers, wings"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": "8"}, "r: '8' is no int"),
        ({"r": True}, "r: True is no int"),
        ({"r": 0}, "LoRA.r: 0 is not a rank; it must be 1 or more"),
        ({"lora_alpha": [1]}, "lora_alpha: [1] is no int"),
        ({"target_modules": 5}, "target_modules: 5 is no str"),
        ({"rank_pattern": {"up": "2"}}, "rank_pattern: '2' for 'up' is no number"),
        ({"modules_to_save": "up"}, "modules_to_save: 'up' is no list of names"),
        ({"init_lora_weights": "magic"}, "init_lora_weights: 'magic' is not known here"),
        ({"peft_type": "LoRa"}, "peft_type 'LoRa' has no method here; did you mean 'LORA'?"),
        ({"peft_type": None}, "names no peft_type, so it does not say which method the adapter is"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern: '(' is not a regular expression"),
    ],
)
def test_a_bad_value_is_told(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PEFTError, match=re.escape(message)):
        import_adapter(base_of("linear"), edited(plain(tmp_path), **fields))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter_config.json, so it is no HF PEFT directory"),
        (lambda f: (f / "adapter_config.json").write_text("{,"), "adapter_config.json: is no JSON"),
        (lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe\x00"), "adapter_config.json: is no JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "names no peft_type"),
        (
            lambda f: (f / "adapter_model.safetensors").unlink(),
            "holds no adapter_model.safetensors and no adapter_model",
        ),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 99), "is truncated or no safetensors file"),
        (lambda f: os.truncate(f / "adapter_model.safetensors", 300), "is truncated or no safetensors file"),
        (lambda f: save_file({}, f / "adapter_model.safetensors"), "the directory holds no tensor of an adapter"),
    ],
)
def test_a_missing_or_garbled_file_is_told(spoil: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    folder = plain(tmp_path)
    spoil(folder)
    with pytest.raises(PEFTError, match=re.escape(message)):
        import_adapter(base_of("linear"), folder)


class Payload:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("raw", [False, True])
def test_a_pickle_with_a_payload_is_refused_and_not_run(raw: bool, tmp_path: Path) -> None:
    folder = plain(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    payload = {"base_model.model.layers.up.lora_A.weight": Payload(tmp_path / "was_run")}
    if raw:
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, folder / "adapter_model.bin")
    with pytest.raises(PEFTError, match="Python objects other than tensors, which could run code when loaded"):
        import_adapter(base_of("linear"), folder)
    assert not (tmp_path / "was_run").exists()


def test_a_source_that_is_nowhere_is_told(tmp_path: Path) -> None:
    (tmp_path / "run" / "best").mkdir(parents=True)
    plain(tmp_path / "run" / "best")
    model = base_of("linear")
    with pytest.raises(PEFTError, match=r"there is no file or folder '.*bst'; did you mean 'best'"):
        import_adapter(model, tmp_path / "run" / "bst")
    with pytest.raises(
        PEFTError, match=r"holds no adapter_config\.json, so it is no HF PEFT directory; best in it has"
    ):
        import_adapter(model, tmp_path / "run")
    with pytest.raises(PEFTError, match=r"adapter_config\.json is no folder; give the folder that holds"):
        import_adapter(model, tmp_path / "run" / "best" / "adapter_config.json")
    with pytest.raises(PEFTError, match="revision: 'v1' is for hub ids; give the folder"):
        import_adapter(model, tmp_path / "run" / "best", revision="v1")
    with pytest.raises(PEFTError, match="source: 'org/name' is no folder here, and the hub does not give it"):
        import_adapter(model, "org/name")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(sorted(peft.LoraConfig().to_dict())), value=JSON)
def test_any_value_of_any_field_imports_or_is_a_clear_error(field: str, value: Any, tmp_path: Path) -> None:
    folder = edited(plain(tmp_path), **{field: value})
    base = base_of("linear")
    try:
        import_adapter(base, folder)
    except PEFTError:
        assert adapter_names(base) == []
    else:
        assert set(adapters(base, "default")) == {"layers.up", "layers.gate"}
