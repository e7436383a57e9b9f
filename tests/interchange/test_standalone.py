"""A merged model in a folder: loaded by transformers alone, with the outputs of the adapted model."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft import DoRA, LoRA, Method, PEFTError, disable_adapters, inject, merge
from lightning_peft.interchange.roots import peft_root
from lightning_peft.interchange.standalone import save_merged
from tests.methods.models import MODELS, TINY, inputs_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no tokenizer or processor is written"),
    pytest.mark.filterwarnings("ignore:.*is not tied to"),
]
SWITCH = {
    "vocab_size": 48, "d_model": 32, "d_ff": 40, "d_kv": 8, "num_layers": 2, "num_heads": 4, "num_experts": 2,
    "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "dropout_rate": 0.0, "pad_token_id": 0,
}  # fmt: skip

BART = {
    "vocab_size": 48, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "dropout": 0.0,
}  # fmt: skip


class Wrapped(L.LightningModule):
    """A LightningModule as people write them, with a transformers model and other things in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.other = nn.LayerNorm(2)


def trained(model: nn.Module, method: Method, modules_to_save: list[str] | None = None) -> nn.Module:
    """`model` in eval mode with adapters whose every tensor has moved from its start."""
    inject(model, method, modules_to_save=modules_to_save or [])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits.float()


CASES = {
    "bert": (LoRA(r=4, target_modules=["query", "value"]), ["classifier"]),
    "llama": (LoRA(r=4, target_modules="all-linear", rslora=True), ["lm_head"]),
    "gpt2": (DoRA(r=4, target_modules=["c_attn", "c_proj"]), []),
    "t5": (LoRA(r=4, target_modules=["q", "v", "wo"]), []),
    "vit": (LoRA(r=4, target_modules="all-linear"), ["classifier"]),
    "resnet": (LoRA(r=4, target_modules=["convolution"]), ["classifier.1"]),
    "mixtral": (LoRA(r=4, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]), []),
}


@pytest.mark.parametrize("name", CASES)
def test_the_folder_loads_with_the_same_logits_and_the_model_is_as_it_was(name: str, tmp_path: Path) -> None:
    method, saved = CASES[name]
    base = MODELS[name]().eval()
    model = trained(Wrapped(copy.deepcopy(base)), method, saved)
    assert peft_root(model) == ("model", model.model)
    inputs = inputs_of(name)
    before, keys, config = logits(model.model, inputs), list(model.state_dict()), model.model.config.to_dict()
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    folder = save_merged(model, tmp_path / "out" / "merged")

    assert folder == tmp_path / "out" / "merged"
    loaded, report = type(base).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(logits(loaded, inputs), before, rtol=1e-5, atol=1e-5)
    assert {type(module) for module in loaded.modules()} == {type(module) for module in base.modules()}
    assert not any("adapters" in key for key in load_file(folder / "model.safetensors"))
    assert list((tmp_path / "out").iterdir()) == [folder]

    assert list(model.state_dict()) == keys
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in model.state_dict().items())
    assert model.model.config.to_dict() == config
    assert torch.equal(logits(model.model, inputs), before)
    with disable_adapters(model):
        assert torch.equal(logits(model.model, inputs), logits(base, inputs))


TIED = {
    "llama": (
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**TINY, num_key_value_heads=2, tie_word_embeddings=True)
        ),
        "embed_tokens",
        ["lm_head.weight", "model.embed_tokens.weight"],
    ),
    "gpt2": (MODELS["gpt2"], "wte", ["lm_head.weight", "transformer.wte.weight"]),
    "t5": (MODELS["t5"], "shared", ["lm_head.weight", "shared.weight"]),
    "t5 encoder": (MODELS["t5"], r"encoder\.embed_tokens", ["encoder.embed_tokens.weight", "lm_head.weight"]),
    "bart": (
        lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
        r".*coder\.embed_tokens",
        ["lm_head.weight", "model.encoder.embed_tokens.weight"],
    ),
    "switch": (
        lambda: transformers.SwitchTransformersForConditionalGeneration(
            transformers.SwitchTransformersConfig(**SWITCH, tie_word_embeddings=True)
        ),
        r"encoder\.embed_tokens",
        ["encoder.embed_tokens.weight", "lm_head.weight"],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TIED)
def test_an_embedding_parts_from_the_head_that_is_tied_to_it(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, target, both = TIED[name]
    base = make().eval().to(dtype)
    assert base.config.tie_word_embeddings
    model = trained(copy.deepcopy(base), LoRA(r=4, target_modules=target if "." in target else [target]))
    inputs = inputs_of("t5" if base.config.is_encoder_decoder else name)
    before = logits(model, inputs)
    assert (before - logits(base, inputs)).abs().max() > 0.01 or target == "shared"
    merged = merge(copy.deepcopy(model))
    expected = merged.state_dict()

    save_merged(model, tmp_path / "merged")

    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(stored[key], expected[key]) for key in both)
    assert not torch.equal(stored[both[0]], stored[both[1]])
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (name == "switch")
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert model.config.tie_word_embeddings
    loaded = type(base).from_pretrained(tmp_path / "merged")
    assert loaded.dtype == dtype
    # in bf16 the adapted model rounds elsewhere
    assert torch.equal(logits(loaded, inputs), logits(merged, inputs))
    if dtype == torch.float32:
        torch.testing.assert_close(logits(loaded, inputs), before, rtol=1e-5, atol=1e-5)


def test_tied_tensors_that_stay_equal_are_stored_once(tmp_path: Path) -> None:
    model = trained(TIED["llama"][0](), LoRA(r=4, target_modules=["q_proj"]))
    for folder, dtype in (("as is", None), ("half", torch.float16)):
        save_merged(model, tmp_path / folder, dtype=dtype)
        stored = load_file(tmp_path / folder / "model.safetensors")
        assert "lm_head.weight" not in stored
        assert {tensor.dtype for tensor in stored.values()} == {dtype or torch.float32}
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["tie_word_embeddings"] is True
        assert config["dtype"] == ("float16" if dtype else "float32")


def test_a_bf16_base_is_summed_in_fp32_and_stored_as_asked(tmp_path: Path) -> None:
    base = MODELS["llama"]().to(torch.bfloat16)
    model = trained(base, LoRA(r=4, target_modules=["q_proj"]))
    host = model.model.layers[0].self_attn.q_proj
    adapter = host.adapters["default"]
    exact = host.weight.float() + adapter.lora_B @ adapter.lora_A * (16 / 4)
    save_merged(model, tmp_path / "base dtype")
    save_merged(model, tmp_path / "fp32", dtype=torch.float32)
    key = "model.layers.0.self_attn.q_proj.weight"
    low = load_file(tmp_path / "base dtype" / "model.safetensors")
    high = load_file(tmp_path / "fp32" / "model.safetensors")
    assert {tensor.dtype for tensor in low.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in high.values()} == {torch.float32}
    assert torch.equal(high[key].to(torch.bfloat16), low[key])
    assert not torch.equal(high[key], low[key].float())
    torch.testing.assert_close(high[key], exact.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(low[key], exact.to(torch.bfloat16))


def test_what_is_merged_already_is_written_as_it_stands(tmp_path: Path) -> None:
    model = trained(MODELS["gpt2"](), LoRA(r=4, target_modules=["wte", "c_attn"]))
    inputs = inputs_of("gpt2")
    before = logits(model, inputs)
    merge(model)
    save_merged(model, tmp_path / "merged")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded, inputs), before, rtol=1e-5, atol=1e-5)


def test_the_tokenizer_is_written_where_the_base_has_one(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    base = tmp_path / "base"
    MODELS["bert"]().save_pretrained(base)
    make = transformers.AutoModelForSequenceClassification.from_pretrained
    with pytest.warns(UserWarning, match=r"no tokenizer or processor is written \(there is none beside the base\)"):
        save_merged(trained(make(base), LoRA(target_modules=["query"])), tmp_path / "without")
    assert not list((tmp_path / "without").glob("*token*"))
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "good": 1}, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_merged(trained(make(base), LoRA(target_modules=["query"])), tmp_path / "with")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "with")("good")["input_ids"] == [1]


def test_an_image_processor_is_written_too(tmp_path: Path) -> None:
    base = tmp_path / "base"
    MODELS["vit"]().save_pretrained(base)
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(base)
    model = transformers.ViTForImageClassification.from_pretrained(base)
    save_merged(trained(model, LoRA(target_modules=["q_proj"])), tmp_path / "merged")
    loaded = transformers.AutoImageProcessor.from_pretrained(tmp_path / "merged")
    assert loaded.size == {"height": 16, "width": 16}


def test_an_earlier_model_is_replaced_shards_included(tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    MODELS["llama"]().save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = trained(MODELS["llama"](), LoRA(r=4))
    save_merged(model, folder)
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    inputs = inputs_of("llama")
    loaded = transformers.LlamaForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=1e-5, atol=1e-5)


def test_a_model_that_is_none_of_transformers_is_told_what_to_do(tmp_path: Path) -> None:
    model = inject(MODELS["linear"](), LoRA(target_modules=["up"]))
    with pytest.raises(PEFTError) as error:
        save_merged(model, tmp_path / "merged")
    assert str(error.value) == (
        "save_merged: Toy holds no transformers model; call merge(model), and save the keys of model.state_dict() that "
        "have no '.adapters.' in them"
    )
    wrapped = Wrapped(MODELS["bert"]())
    inject(wrapped, LoRA(target_modules=["query"]), modules_to_save=["other"])
    with pytest.raises(PEFTError, match=r"^save_merged: other is adapted but not part of the transformers model"):
        save_merged(wrapped, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_all_that_stands_against_it_is_told_before_anything_is_written(tmp_path: Path) -> None:
    base = MODELS["bert"]()
    base.save_pretrained(tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    files = sorted(file.name for file in tmp_path.iterdir())
    with pytest.raises(PEFTError) as error:
        save_merged(model, tmp_path, dtype=torch.int8)
    assert str(error.value).splitlines() == [
        "save_merged: no active adapter stands on the model; inject or load one, or set_adapter(model, name)",
        f"save_merged: {tmp_path} is the base's own folder; give another one",
        "save_merged: dtype: torch.int8 is no floating-point dtype; give one such as torch.bfloat16",
    ]
    inject(model, LoRA(target_modules=["query"]))
    with pytest.raises(PEFTError, match="is a file; give a folder"):
        save_merged(model, tmp_path / "config.json")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(PEFTError, match="holds an adapter, which transformers would load on top"):
        save_merged(model, tmp_path / "adapter")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*files, "adapter"])


def test_an_adapter_that_can_not_be_merged_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = inject(MODELS["bert"](), LoRA(target_modules=["query"]))
    adapter = model.bert.encoder.layer[0].attention.self.query.adapters["default"]

    def refuse(module: nn.Module) -> dict[str, Tensor]:
        raise PEFTError("it acts on the output")

    monkeypatch.setattr(adapter, "merged", refuse)
    with pytest.raises(PEFTError, match=r"^it acts on the output$"):
        save_merged(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_a_process_without_this_package_loads_it(tmp_path: Path) -> None:
    model = trained(MODELS["bert"](), LoRA(target_modules=["query"]), ["classifier"])
    inputs = inputs_of("bert")
    save_merged(model, tmp_path / "merged")
    torch.save((inputs, logits(model, inputs)), tmp_path / "expected.pt")
    code = """
import sys, torch, transformers
sys.modules["lightning_peft"] = None
inputs, expected = torch.load(sys.argv[1] + "/expected.pt")
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1] + "/merged")
torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
