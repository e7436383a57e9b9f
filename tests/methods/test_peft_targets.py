"""Which modules `target_modules` means: those that HF peft takes, and where that differs, how and why."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from lightning_peft import LoRA, PEFTError, inject
from lightning_peft.injection import adapters
from tests.methods.models import MODELS, NO_DROPOUT, TINY

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:The following .*_pattern keys")
VISION = {k: v for k, v in TINY.items() if k != "vocab_size"} | {"image_size": 16, "patch_size": 8}
GPT2 = {"vocab_size": 48, "n_embd": 32, "n_layer": 1, "n_head": 4}
SEQ2SEQ = {"vocab_size": 48, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0}
HEADED: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**TINY, pad_token_id=0)),
    "bert tokens": lambda: transformers.BertForTokenClassification(transformers.BertConfig(**TINY)),
    "bert answers": lambda: transformers.BertForQuestionAnswering(transformers.BertConfig(**TINY)),
    "bert words": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**TINY)),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(vocab_size=48, dim=32, n_heads=4, n_layers=1, hidden_dim=40)
    ),
    "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**TINY)),
    "gpt2": lambda: transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**GPT2)),
    "bart": lambda: transformers.BartForSequenceClassification(
        transformers.BartConfig(**SEQ2SEQ, encoder_attention_heads=4, decoder_attention_heads=4)
    ),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)),
    "clip": lambda: transformers.CLIPForImageClassification(
        transformers.CLIPConfig(text_config=dict(TINY), vision_config=VISION)
    ),
}


def ours(model: nn.Module, **fields: Any) -> set[str]:
    return set(adapters(inject(copy.deepcopy(model), LoRA(r=2, **fields)), "default"))


def theirs(model: nn.Module, **fields: Any) -> set[str]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        return set(peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, **fields)).targeted_module_names)


@pytest.mark.parametrize(
    ("model", "target", "count"),
    [
        ("llama", ["q_proj", "v_proj"], 4),
        ("llama", ["self_attn.o_proj", "layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj"], 4),
        ("llama", ["proj", "q_proj"], None),
        ("llama", r"model\.layers\.[01]\.self_attn\.[qk]_proj", 4),
        ("llama", r".*\.(up|down)_proj", 4),
        ("llama", r".*embed_tokens|lm_head", 2),
        ("llama", ["0.self_attn.q_proj"], 1),
        ("llama", "all-linear", 14),
        ("bert", ["query", "value"], 4),
        ("bert", ["output.dense"], 4),
        ("bert", ["dense"], 7),
        ("bert", r".*layer\.1\..*(query|key)", 2),
        ("gpt2", ["c_attn"], 2),
        ("gpt2", ["c_proj"], 4),
        ("gpt2", "all-linear", 8),
        ("t5", ["q", "v"], 12),
        ("t5", ["SelfAttention.q", "EncDecAttention.v"], 6),
        ("t5", r"decoder.*\.wi", 2),
        ("t5", "all-linear", 32),
        ("vit", ["q_proj", "projection"], 3),
        ("resnet", ["convolution"], None),
        ("mixtral", "all-linear", 8),
        ("embedding", "all-linear", 1),
        ("conv1D", "all-linear", 2),
    ],
)
def test_same_modules_as_peft(model: str, target: str | list[str], count: int | None) -> None:
    base = MODELS[model]()
    if target == ["proj", "q_proj"]:
        # a name is a whole word of the path: "proj" means nothing, which peft passes over in silence
        assert theirs(base, target_modules=target) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
        with pytest.raises(PEFTError) as caught:
            ours(base, target_modules=target)
        assert str(caught.value) == (
            "LoRA.target_modules: 'proj' matches nothing; did you mean 'v_proj' or 'q_proj' or 'o_proj'?"
        )
        return
    found = ours(base, target_modules=target)
    assert found == theirs(base, target_modules=target)
    assert len(found) == (count if count is not None else sum(isinstance(m, nn.Conv2d) for m in base.modules()))


@pytest.mark.parametrize(
    ("target", "exclude", "count"),
    [
        (["q_proj", "v_proj"], ["layers.0.self_attn.q_proj"], 3),
        (["q_proj", "v_proj"], r".*layers\.1.*", 2),
        ("all-linear", ["gate_proj", "up_proj"], 10),
        (r".*_proj", ["mlp.down_proj"], 12),
        # ours looks for the names in what is left, so a whole name may be left out only of an expression
        (r".*\.[qkv]_proj", ["k_proj"], 4),
    ],
)
def test_excluded_as_by_peft(target: str | list[str], exclude: str | list[str], count: int) -> None:
    base = MODELS["llama"]()
    found = ours(base, target_modules=target, exclude_modules=exclude)
    assert found == theirs(base, target_modules=target, exclude_modules=exclude)
    assert len(found) == count


def test_modules_to_save_are_no_targets() -> None:
    base = MODELS["linear"]()
    model = inject(copy.deepcopy(base), LoRA(r=2, target_modules=r".*"), modules_to_save=["head"])
    peft_model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["up", "gate", "head"], modules_to_save=["head"])
    )
    low_rank = {name.partition(".adapters")[0] for name, _ in model.named_parameters() if name.endswith("lora_A")}
    assert low_rank == set(peft_model.targeted_module_names) == {"layers.up", "layers.gate"}


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        ("llama", {"score"}),
        ("bert tokens", {"classifier"}),
        ("bert answers", {"qa_outputs"}),
        ("bert words", {"cls.predictions.transform.dense"}),
        ("distilbert", {"pre_classifier", "classifier"}),
        ("roberta", {"classifier.dense", "classifier.out_proj"}),
        ("gpt2", {"score"}),
        ("bart", {"classification_head.dense", "classification_head.out_proj"}),
        ("vit", {"classifier"}),
        ("clip", {"classifier"}),
    ],
)
def test_all_linear_leaves_every_head_alone(model: str, heads: set[str]) -> None:
    """Intended difference: peft asks for task_type to know a classifier, and then knows two names of it."""
    base = HEADED[model]()
    assert theirs(base, target_modules="all-linear") - ours(base) == heads
    assert ours(base) <= theirs(base, target_modules="all-linear")


def test_all_linear_takes_attention_whole() -> None:
    """Intended difference: peft takes only the output layer, whose forward attention never calls."""
    base = MODELS["attention"]()
    assert theirs(base, target_modules="all-linear") == {"layers.one", "layers.attn.out_proj"}
    assert ours(base) == {"layers.one", "layers.attn", "layers.attn.out_proj"}
    assert ours(base, target_modules=["attn"]) == {"layers.attn", "layers.attn.out_proj"}


def test_an_expression_may_sweep_over_what_has_no_adapter() -> None:
    """Intended difference: peft fails at the first such module; a name in a list fails here too."""
    base = MODELS["bert"]()
    with pytest.raises(ValueError, match="is not supported"):
        theirs(base, target_modules=r"bert\.encoder\.layer\.0\.output\..*")
    assert ours(base, target_modules=r"bert\.encoder\.layer\.0\.output\..*") == {"bert.encoder.layer.0.output.dense"}
    with pytest.raises(PEFTError) as caught:
        ours(base, target_modules=["query", "LayerNorm"])
    assert str(caught.value) == (
        "LoRA.target_modules: 'LayerNorm' matches bert.embeddings.LayerNorm, a LayerNorm, which can not be adapted; "
        "names that can be: word_embeddings, position_embeddings, token_type_embeddings, query, key, value, dense, "
        "classifier"
    )


def test_a_name_wholly_left_out_is_a_fault() -> None:
    """Intended difference: peft says nothing of a target that its exclusions empty."""
    base = MODELS["linear"]()
    assert theirs(base, target_modules=["up", "gate"], exclude_modules=["gate"]) == {"layers.up"}
    with pytest.raises(PEFTError) as caught:
        ours(base, target_modules=["up", "gate"], exclude_modules=["gate"])
    assert str(caught.value) == (
        "LoRA.target_modules: all that 'gate' matches is left out by exclude_modules or modules_to_save"
    )


def test_tied_layer_is_adapted_where_it_is_named() -> None:
    """A module under two names is one module: adapted once, under its first name."""
    shared = nn.Linear(4, 4)
    base = nn.ModuleDict({"one": shared, "two": shared, "three": nn.Linear(4, 4)})
    assert ours(base, target_modules=["one", "two", "three"]) == {"one", "three"}
    assert ours(base, target_modules=["two"]) == {"one"}


def test_heads_of_a_nested_model_are_found() -> None:
    config = transformers.BertConfig(**TINY, **NO_DROPOUT)
    base = nn.ModuleDict({"teacher": transformers.BertForSequenceClassification(config), "own_head": nn.Linear(32, 3)})
    found = ours(base)
    assert len(found) == 14  # 6 in each of 2 layers, the pooler, and the head that no transformers model owns
    assert "teacher.classifier" not in found
    assert "own_head" in found


def test_a_compiled_model_has_the_targets_of_the_model() -> None:
    base = MODELS["llama"]()
    compiled = nn.ModuleDict({"model": torch.compile(copy.deepcopy(base), backend="eager")})
    assert ours(compiled) == {f"model._orig_mod.{path}" for path in ours(base)}
    assert len(ours(base)) == 14
