from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_peft import LoRA, inject
from lightning_peft.methods.errors import PEFTError
from lightning_peft.tasks.packed import check_packing

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GPT: dict[str, Any] = {**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 2}
RIGHT: dict[str, dict[str, Any]] = {
    "Llama": TEXT,
    "Qwen3": {**TEXT, "head_dim": 16, "num_key_value_heads": 1},
    "Gemma3Text": {**TEXT, "head_dim": 16, "num_key_value_heads": 1},
    "GPT2": GPT,
    "GPTJ": {**GPT, "rotary_dim": 8},
    "GPTNeoX": TEXT,
    "Phi3": TEXT,
    "Mixtral": {**TEXT, "num_key_value_heads": 1, "num_local_experts": 4},
}
WRONG: dict[str, dict[str, Any]] = {
    "OPT": {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "Bloom": {**GPT, "initializer_range": 0.1},
    "Falcon": TEXT,
    "Mamba": {**TEXT, "state_size": 4},
}


def build(kind: str, config: dict[str, Any], **options: Any) -> Any:
    import transformers

    made = getattr(transformers, f"{kind}Config")(**config)
    return transformers.AutoModelForCausalLM.from_config(made, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", RIGHT)
def test_model_that_keeps_texts_apart_passes(kind: str, dtype: torch.dtype) -> None:
    check_packing(build(kind, RIGHT[kind], dtype=dtype), 64)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_kinds_of_attention_pass(attention: str) -> None:
    check_packing(build("Llama", TEXT, attn_implementation=attention), 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", WRONG)
def test_model_that_mixes_texts_is_refused(kind: str, dtype: torch.dtype) -> None:
    with pytest.raises(PEFTError) as caught:
        check_packing(build(kind, WRONG[kind], dtype=dtype), 64)
    assert str(caught.value) == (
        f"packing: the attention of {kind}ForCausalLM ignores where a document ends, and each would be trained on "
        "those packed before it; use packing=False"
    )


def test_where_a_model_comes_from_is_told() -> None:
    model = build("Falcon", TEXT)
    model.config._name_or_path = "org/falcon"
    with pytest.raises(PEFTError, match="the attention of FalconForCausalLM 'org/falcon' ignores"):
        check_packing(model, 64)


def test_model_without_positions_is_refused() -> None:
    class Plain(torch.nn.Embedding):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids)

    with pytest.raises(
        PEFTError, match=r"packing: Plain takes no position_ids \(.*'position_ids'.*; use packing=False"
    ):
        check_packing(Plain(64, 64), 64)


def test_a_vocabulary_may_be_smaller_than_the_texts() -> None:
    check_packing(build("Llama", {**TEXT, "vocab_size": 5}), 5)


class Noisy(torch.nn.Module):
    """Draws at random, although it makes no difference to its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(64, 64)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        torch.rand(3)
        logits: torch.Tensor = self.words(input_ids)
        return logits


def test_modes_random_numbers_and_gradients_are_left_as_they_were() -> None:
    model = inject(build("Llama", TEXT), LoRA(r=4, dropout=0.5, target_modules="all-linear"))
    model.train()
    model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    noisy = Noisy()
    before = torch.get_rng_state()
    check_packing(model, 64)
    check_packing(noisy, 64)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_are_put_back_after_a_fault() -> None:
    model = build("Falcon", TEXT).train()
    with pytest.raises(PEFTError):
        check_packing(model, 64)
    assert all(module.training for module in model.modules())
