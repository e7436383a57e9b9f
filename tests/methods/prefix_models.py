"""Small models of every kind that a prefix goes into, without dropout and with attention that a prefix can turn."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn

SIZES = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
GROUPED = {**SIZES, **ENDS, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**GROUPED, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **ENDS,
            vocab_size=48,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            tie_word_embeddings=False,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ),
}
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **NO_DROPOUT)),
    "roberta": lambda: transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(**SIZES, **NO_DROPOUT, **ENDS, max_position_embeddings=32)
    ),
    "modernbert": lambda: transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(
            **SIZES,
            **ENDS,
            cls_token_id=2,
            sep_token_id=1,
            local_attention=4,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
}
SEQ2SEQ: dict[str, Callable[[], nn.Module]] = {
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=48,
            d_model=32,
            d_ff=40,
            d_kv=8,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            **ENDS,
            vocab_size=48,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=40,
            decoder_ffn_dim=40,
            max_position_embeddings=64,
            dropout=0.0,
            decoder_start_token_id=1,
            forced_eos_token_id=None,
        )
    ),
}
PREFIXABLE = {**DECODERS, **ENCODERS, **SEQ2SEQ}


def build(name: str, implementation: str = "sdpa") -> nn.Module:
    """The same one each time, in eval mode."""
    torch.manual_seed(1)
    model = PREFIXABLE[name]()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    model.set_attn_implementation(implementation)
    return model.eval()


def inputs(name: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 48, (3, 7), generator=torch.Generator().manual_seed(5))
    if name in SEQ2SEQ:
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)[:, :5].contiguous()}
    return {"input_ids": ids}
