"""A prefix against HF peft's prefix tuning: outputs, gradients and training from the same start, and files both ways.

Left out, because peft is known to be wrong there: encoder-decoders (`test_prefix_closed_form` has the formula instead).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft import PEFTError, PrefixTuning, PTuningV2, export_adapter, import_adapter, inject
from lightning_peft.injection import adapters
from lightning_peft.methods._prefix import FreePrefix, PrefixAdapter
from tests.methods.models import MODELS, TINY, inputs_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:.*past_key_values"),
]
TOLERANCE = 1e-5
N = 5
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "opt": "CAUSAL_LM", "roberta": "TOKEN_CLS"}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=48,
            hidden_size=32,
            ffn_dim=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=16,
            dropout=0.0,
        )
    ),
    "roberta": lambda: transformers.RobertaForTokenClassification(
        transformers.RobertaConfig(
            **TINY,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=16,
            pad_token_id=0,
            num_labels=3,
        )
    ),
}


def base_of(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = {**MODELS, **OTHERS}[name]()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)  # attention that a prefix can turn
    return model


def heads(name: str) -> list[str]:
    return ["classifier"] if name in ("bert", "roberta") else []


def theirs_of(name: str, **more: Any) -> nn.Module:
    config = peft.PrefixTuningConfig(task_type=TASKS[name], num_virtual_tokens=N, **more)
    return peft.get_peft_model(base_of(name), config)


def prefixes(model: nn.Module) -> list[FreePrefix]:
    return [adapter for adapter in adapters(model, "default").values() if isinstance(adapter, FreePrefix)]


def flat(model: nn.Module, take: Callable[[Tensor], Any] = lambda t: t) -> Tensor:
    """The prefixes in peft's layout: keys and values, layer by layer."""
    tables = [table for adapter in prefixes(model) for table in (adapter.prefix_keys, adapter.prefix_values)]
    return torch.cat([take(table) for table in tables], dim=1)


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TASKS)
def test_trains_as_peft_does(name: str, implementation: str, with_mask: bool) -> None:
    ours, theirs = inject(base_of(name), PTuningV2(num_virtual_tokens=N)), theirs_of(name)
    ours.set_attn_implementation(implementation)
    theirs.base_model.set_attn_implementation(implementation)
    embedding = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        embedding.copy_(flat(ours))
    inputs = inputs_of(name if name in MODELS else "llama")
    if with_mask:
        inputs["attention_mask"] = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4])
    head = [p for p in theirs.parameters() if p is not embedding]
    for parameter in head:
        parameter.requires_grad_(False)
    optimizers = [
        torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=1e-2),
        torch.optim.AdamW([embedding], lr=1e-2),
    ]
    seen = inputs.get("attention_mask", torch.ones(3, 7)).bool()

    def output(model: nn.Module) -> Tensor:
        found = logits(model, **inputs)
        return found if name == "bert" else found[seen]

    goal = torch.randn_like(output(ours))
    for step in range(11):
        outputs = [output(model) for model in (ours, theirs)]
        torch.testing.assert_close(*outputs, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, s=step: f"step {s}: {m}")
        for optimizer, found in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            (found - goal).square().mean().backward()
        if step == 0:
            torch.testing.assert_close(flat(ours, lambda t: t.grad), embedding.grad, rtol=1e-4, atol=1e-7)
            assert flat(ours, lambda t: t.grad).abs().max() > 1e-6
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(flat(ours), embedding, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_mlp_is_the_one_that_peft_has() -> None:
    ours = inject(base_of("llama"), PrefixTuning(num_virtual_tokens=N, hidden_size=24))
    theirs = theirs_of("llama", prefix_projection=True, encoder_hidden_size=24)
    encoder = theirs.prompt_encoder["default"]
    own = [adapter for adapter in adapters(ours, "default").values() if isinstance(adapter, PrefixAdapter)]
    with torch.no_grad():
        encoder.embedding.weight.copy_(own[0].prefix_embedding)
        encoder.transform[0].weight.copy_(own[0].hidden_weight)
        encoder.transform[0].bias.copy_(own[0].hidden_bias)
        encoder.transform[2].weight.copy_(torch.cat([adapter.output_weight for adapter in own]))
        encoder.transform[2].bias.copy_(torch.cat([adapter.output_bias for adapter in own]))
    inputs = inputs_of("llama")
    outputs = [logits(model, **inputs) for model in (ours, theirs)]
    torch.testing.assert_close(*outputs, rtol=TOLERANCE, atol=TOLERANCE)
    for output in outputs:
        output.square().mean().backward()
    pairs = [(own[0].prefix_embedding, encoder.embedding.weight), (own[0].hidden_weight, encoder.transform[0].weight)]
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-8)
        assert mine.grad.abs().max() > 1e-7
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == sum(p.numel() for p in encoder.parameters())


@pytest.mark.parametrize("method", [PTuningV2(num_virtual_tokens=N), PrefixTuning(num_virtual_tokens=N)])
@pytest.mark.parametrize("name", TASKS)
def test_what_is_exported_computes_the_same_in_peft(name: str, method: PTuningV2, tmp_path: Path) -> None:
    ours = inject(base_of(name), method, modules_to_save=heads(name)).eval()
    export_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base_of(name), tmp_path).eval()
    inputs = inputs_of(name if name in MODELS else "llama")
    torch.testing.assert_close(logits(ours, **inputs), logits(theirs, **inputs), rtol=TOLERANCE, atol=TOLERANCE)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    width = 16 if name == "llama" else 32
    sizes = {"num_layers": 2, "token_dim": width, "num_attention_heads": width // 8, "num_virtual_tokens": N}
    assert {key: config[key] for key in sizes} == sizes
    assert config["prefix_projection"] is False
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored["prompt_embeddings"].shape == (N, 2 * 2 * width)
    head = {f"base_model.{top}.{key}" for top in heads(name) for key in ("weight", "bias")}
    assert set(stored) == {"prompt_embeddings", *head}


def test_a_model_without_a_head_is_exported_too(tmp_path: Path) -> None:
    body = base_of("llama").model
    ours = inject(copy.deepcopy(body), PTuningV2(num_virtual_tokens=N)).eval()
    export_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(body, tmp_path).eval()
    inputs = inputs_of("llama")
    torch.testing.assert_close(
        ours(**inputs).last_hidden_state, theirs(**inputs).last_hidden_state, rtol=TOLERANCE, atol=TOLERANCE
    )


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_what_peft_saved_computes_the_same_here(name: str, projected: bool, tmp_path: Path) -> None:
    theirs = theirs_of(name, prefix_projection=projected, encoder_hidden_size=24).eval()
    theirs.save_pretrained(tmp_path)
    ours = import_adapter(base_of(name), tmp_path).eval()
    inputs = inputs_of(name if name in MODELS else "llama")
    torch.testing.assert_close(logits(ours, **inputs), logits(theirs, **inputs), rtol=TOLERANCE, atol=TOLERANCE)
    assert len(prefixes(ours)) == 2
    export_adapter(ours, tmp_path / "again")
    both = [load_file(place / "adapter_model.safetensors") for place in (tmp_path, tmp_path / "again")]
    assert both[0].keys() == both[1].keys()
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])


def test_only_the_root_s_attention_gets_an_imported_prefix(tmp_path: Path) -> None:
    theirs_of("llama").save_pretrained(tmp_path)
    model = nn.ModuleDict({"lm": base_of("llama")})
    import_adapter(model, tmp_path)
    assert [path for path, adapter in adapters(model, "default").items() if isinstance(adapter, FreePrefix)] == [
        f"lm.model.layers.{layer}.self_attn" for layer in range(2)
    ]


def test_a_directory_of_another_size_is_refused_with_every_difference(tmp_path: Path) -> None:
    theirs_of("llama").save_pretrained(tmp_path)
    other = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**TINY, "num_hidden_layers": 3}, num_key_value_heads=4)
    )
    with pytest.raises(PEFTError) as error:
        import_adapter(other, tmp_path)
    assert error.value.faults == (
        f"{tmp_path}: num_layers: 2 in the directory, and 3 here",
        f"{tmp_path}: token_dim: 16 in the directory, and 32 here",
        f"{tmp_path}: num_attention_heads: 2 in the directory, and 4 here",
    )
    assert adapters(other, "default") == {}


def modernbert() -> nn.Module:
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "cls_token_id": 2, "sep_token_id": 1}
    return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**TINY, **ends))


@pytest.mark.parametrize(
    ("build", "fields", "faults"),
    [
        (
            MODELS["t5"],
            {},
            [
                "HF peft gives an encoder-decoder's prefix to its decoder alone; T5ForConditionalGeneration has one in "
                "every attention"
            ],
        ),
        (
            MODELS["bert"],
            {},
            [
                "modules_to_save: HF peft trains the head of a BertForSequenceClassification whole; name it here too",
            ],
        ),
        (
            MODELS["llama"],
            {"target_modules": ["layers.1.self_attn"]},
            [
                "target_modules: HF peft gives every layer a prefix, and here model.layers.0.self_attn has none",
                "HF peft counts all layers, and not every layer of LlamaForCausalLM has just one attention",
            ],
        ),
        (
            modernbert,
            {},
            [
                "HF peft hands over a prefix as a cache, and ModernBertForMaskedLM takes none",
                "HF peft has no prefix tuning for the task of a ModernBertForMaskedLM",
            ],
        ),
    ],
)
def test_what_peft_can_not_express_is_told(
    build: Callable[[], nn.Module], fields: dict[str, Any], faults: list[str], tmp_path: Path
) -> None:
    model = inject(build(), PTuningV2(num_virtual_tokens=N, **fields))
    with pytest.raises(PEFTError) as error:
        export_adapter(model, tmp_path)
    assert error.value.faults == tuple(f"export_adapter: {fault}" for fault in faults)
    assert not list(tmp_path.iterdir())


def test_an_encoder_decoder_s_directory_is_refused(tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=N)
    peft.get_peft_model(MODELS["t5"](), config).save_pretrained(tmp_path)
    with pytest.raises(PEFTError, match=re.escape("prefix to its decoder alone")):
        import_adapter(MODELS["t5"](), tmp_path)
