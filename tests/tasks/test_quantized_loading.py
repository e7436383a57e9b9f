"""A task's model under a loading policy: read, placed and quantized by transformers, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_peft import PEFT, LoRA, PEFTError, load_from_checkpoint
from lightning_peft.data import TextClassificationData
from lightning_peft.methods._quantized import packed
from lightning_peft.quantization import Quantization, quantize
from lightning_peft.quantization.loading import LoadingPolicy, loading
from lightning_peft.state import base_quantization, read_checkpoint
from lightning_peft.tasks import SequenceClassification
from lightning_peft.tasks.pretrained import load_pretrained
from tests.stand_ins import distilbert, llama, roberta, save_model, t5

GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2}
MODELS: dict[str, tuple[Callable[[Path], str], str, dict[str, Any]]] = {
    "llama": (llama, "AutoModelForCausalLM", {}),
    "gpt2": (lambda folder: save_model(folder, "GPT2LMHeadModel", "GPT2Config", **GPT2), "AutoModelForCausalLM", {}),
    "t5": (t5, "AutoModelForSeq2SeqLM", {}),
    "distilbert": (distilbert, "AutoModelForSequenceClassification", {"num_labels": 3}),
    "roberta": (roberta, "AutoModelForTokenClassification", {"num_labels": 3}),
}
NF4 = Quantization.of("nf4")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    made = {}
    for name, (make, _, _) in MODELS.items():
        (root / name).mkdir()
        made[name] = make(root / name)
    return made


def load(name: str, place: str, policy: LoadingPolicy | None = None, **options: Any) -> nn.Module:
    _, auto_class, more = MODELS[name]
    torch.manual_seed(0)
    if policy is None:
        return load_pretrained(auto_class, place, **more, **options)
    with loading(policy):
        return load_pretrained(auto_class, place, **more, **options)


def packed_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if packed(module)}


@pytest.mark.parametrize("kind", ["nf4-dq", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_what_quantizing_the_dense_model_gives(name: str, kind: str, folders: dict[str, str]) -> None:
    dense = load(name, folders[name])
    quantize(dense, kind)
    loaded = load(name, folders[name], LoadingPolicy(Quantization.of(kind)))
    assert loaded.training
    assert packed_layers(loaded) == packed_layers(dense) != set()
    quantize(loaded, kind)
    ours = dense.state_dict()
    theirs = loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if "classifier" not in key)


@pytest.mark.parametrize("names", [("pre_classifier",), ("model.pre_classifier",), ("classifier", "pre_classifier")])
def test_what_is_trained_whole_is_left(names: tuple[str, ...], folders: dict[str, str]) -> None:
    """Whether its name counts from the model or from the task that holds it."""
    loaded = load("distilbert", folders["distilbert"], LoadingPolicy(NF4, skip=names))
    assert all(type(module) is nn.Linear for module in (loaded.pre_classifier, loaded.classifier))
    assert len(packed_layers(loaded)) == 12


def test_names_to_skip_are_whole_names(folders: dict[str, str]) -> None:
    """transformers would take `proj` for the end of `q_proj`, and leave that too."""
    config = Quantization(skip_modules=["proj", "layers.1"])
    loaded = load("llama", folders["llama"], LoadingPolicy(config))
    layer = {f"model.layers.0.{name}_proj" for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o")}
    assert packed_layers(loaded) == layer | {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}


def test_the_dtype_is_that_of_the_policy(folders: dict[str, str]) -> None:
    for quantization in (None, NF4):
        loaded = load("llama", folders["llama"], LoadingPolicy(quantization, torch.bfloat16))
        codes = {torch.uint8} if quantization else set()
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16} | codes
        loaded = load("llama", folders["llama"], LoadingPolicy(quantization, torch.bfloat16), dtype="float16")
        assert loaded.lm_head.weight.dtype == torch.float16


def test_without_a_policy_nothing_changes(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    given = []
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_pretrained",
        lambda place, **options: given.append(options) or nn.ReLU(),
    )
    for policy in (None, LoadingPolicy(), LoadingPolicy(NF4, torch.bfloat16, torch.device("cuda", 1))):
        load("llama", folders["llama"], policy, revision="main")
    assert given[:2] == [{"revision": "main"}] * 2
    assert given[2].pop("quantization_config").load_in_4bit
    assert given[2] == {"revision": "main", "dtype": torch.bfloat16, "device_map": {"": torch.device("cuda", 1)}}


def test_the_global_generator_is_not_touched_to_find_the_heads(folders: dict[str, str]) -> None:
    load("llama", folders["llama"])
    after = torch.get_rng_state()
    load("llama", folders["llama"], LoadingPolicy(NF4))
    assert torch.equal(torch.get_rng_state(), after)


@pytest.fixture(scope="module")
def stored(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A llama that transformers has written in nf4."""
    folder = tmp_path_factory.mktemp("stored")
    load("llama", folders["llama"], LoadingPolicy(NF4)).save_pretrained(folder)
    return str(folder)


def test_a_model_that_is_stored_quantized_is_used_as_it_is(stored: str, folders: dict[str, str]) -> None:
    fresh = load("llama", folders["llama"], LoadingPolicy(NF4))
    for policy in (LoadingPolicy(), LoadingPolicy(NF4)):
        loaded = load("llama", stored, policy)
        assert packed_layers(loaded) == packed_layers(fresh)
        for name in packed_layers(fresh):
            assert torch.equal(loaded.get_submodule(name).weight.data, fresh.get_submodule(name).weight.data)


def test_another_quantization_than_the_stored_one_is_refused(stored: str, folders: dict[str, str]) -> None:
    with pytest.raises(PEFTError) as error:
        load("llama", stored, LoadingPolicy(Quantization.of("int8")))
    assert str(error.value) == (
        f"quantization: 'int8' is asked for, but {stored!r} is stored as nf4; leave quantization out to use it as it "
        "is, or name the model in full precision"
    )
    with pytest.raises(PEFTError) as error:
        load("llama", folders["llama"], LoadingPolicy(NF4), quantization_config={"load_in_8bit": True})
    assert str(error.value) == (
        "quantization: 'nf4' is asked for, but model_options.quantization_config is int8; leave quantization out to "
        "use it as it is, or name the model in full precision"
    )


@pytest.mark.parametrize("quantization", [None, NF4])
@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_another_library_s_weights_are_refused_unread(
    method: str, quantization: Quantization | None, folders: dict[str, str], tmp_path: Path
) -> None:
    config = json.loads(Path(folders["llama"], "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))  # and no weights
    with pytest.raises(PEFTError) as error:
        load("llama", str(tmp_path), LoadingPolicy(quantization))
    assert str(error.value) == (
        f"model: {str(tmp_path)!r} is stored as {method}, on which adapters can't stand (there are nf4, nf4-dq, fp4, "
        "fp4-dq, int8); name the model in full precision, and quantize it by quantization='nf4'"
    )


def test_what_transformers_lacks_is_said(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_accelerate_available", lambda: False)
    with pytest.raises(PEFTError, match=r"model: AutoModelForCausalLM can't load .* requires accelerate: `pip install"):
        load("llama", folders["llama"], LoadingPolicy(NF4))


def peft() -> PEFT:
    return PEFT(
        LoRA(r=2, target_modules=["query", "value"]),
        modules_to_save=["classifier"],
        quantization="nf4-dq",
        base_dtype="bfloat16",
    )


def test_a_task_trains_on_a_quantized_base_and_loads(tiny_bert: str, reviews: str, tmp_path: Path) -> None:
    L.seed_everything(0)
    data = TextClassificationData(reviews, tokenizer=tiny_bert, batch_size=8)
    module = SequenceClassification(tiny_bert, learning_rate=0.02)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[peft()],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, data)
    path = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 2 + 2
    assert all(".adapters.default." in name for name in trained)
    # PyTorch's own layer is what transformers calls it, and none is left that bitsandbytes would repack
    assert {type(part).__module__ for part in module.modules() if packed(part)} == {
        "lightning_peft.quantization.layers"
    }
    assert len(packed_layers(module)) == 13
    loaded = load_from_checkpoint(SequenceClassification, path)
    assert base_quantization(loaded) == "nf4-dq"
    state = module.state_dict()
    # the original of a head that is trained whole was made at random
    own = {key: value for key, value in loaded.state_dict().items() if not key.startswith("model.classifier.")}
    assert all(torch.equal(value, state[key]) for key, value in own.items())
    assert {key for key in read_checkpoint(path)["state_dict"] if "absmax" in key or "quant" in key} == set()
