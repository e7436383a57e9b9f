"""Small models for the comparison with HF peft, and something to run them on."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Toy(nn.Module):
    """Layers in a row, under names; one that is called `attn` attends to its input."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.layers.items():
            x = layer(x, x, x)[0] if "attn" in name else layer(x)
        return x


TINY = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Toy(
        up=nn.Linear(12, 20), act=nn.Tanh(), gate=nn.Linear(20, 20, bias=False), head=nn.Linear(20, 5)
    ),
    "conv1D": lambda: Toy(up=Conv1D(20, 12), act=nn.Tanh(), down=Conv1D(12, 20)),
    "conv1D square": lambda: Toy(one=Conv1D(12, 12), act=nn.Tanh(), two=Conv1D(12, 12)),
    "conv1d": lambda: Toy(
        one=nn.Conv1d(3, 8, 3, stride=2, padding=1), act=nn.Tanh(), two=nn.Conv1d(8, 5, 1, bias=False)
    ),
    "conv2d": lambda: Toy(
        one=nn.Conv2d(3, 8, 3, stride=2, padding=1), act=nn.Tanh(), two=nn.Conv2d(8, 5, 1, bias=False)
    ),
    "conv3d": lambda: Toy(one=nn.Conv3d(3, 8, 2, padding=1), act=nn.Tanh(), two=nn.Conv3d(8, 5, 1)),
    "embedding": lambda: Toy(embed=nn.Embedding(48, 12, padding_idx=1), out=nn.Linear(12, 5)),
    "attention": lambda: Toy(one=nn.Linear(12, 12), attn=nn.MultiheadAttention(12, 3, batch_first=True)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, num_key_value_heads=2)),
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**TINY, **NO_DROPOUT, classifier_dropout=0.0, num_labels=3)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=48,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=16,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=48, d_model=32, d_ff=40, d_kv=8, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=0
        )
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            **{k: v for k, v in TINY.items() if k != "vocab_size"},
            **NO_DROPOUT,
            image_size=16,
            patch_size=8,
            num_labels=3,
        )
    ),
    "resnet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
        )
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2)
    ),
    "gpt-oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **TINY,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=3,
            num_experts_per_tok=2,
            max_position_embeddings=64,
        )
    ),
}


def inputs_of(model: str) -> dict[str, Tensor]:
    ids = torch.randint(2, 48, (3, 7))
    toys = {
        "conv1d": (4, 3, 9),
        "conv2d": (4, 3, 9, 9),
        "conv3d": (2, 3, 5, 5, 5),
    }
    if model in ("vit", "resnet"):
        return {"pixel_values": torch.randn(3, 3, 16, 16)}
    if model == "embedding":
        return {"x": torch.randint(0, 48, (6, 7))}
    if model in ("linear", "attention") or model.startswith("conv"):
        return {"x": torch.randn(*toys.get(model, (4, 6, 12)))}
    if model == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return {"input_ids": ids}
