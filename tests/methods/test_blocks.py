"""Where blocks, attention and feed-forward are, against tables written by reading the models' module trees."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_peft import LoRA, inject
from lightning_peft.methods._blocks import Attention, Block, FeedForward, find_blocks

WIDTH = 32
NAMED = {"vocab_size": 48, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**NAMED, "intermediate_size": 40}
GROUPED = {**TEXT, "num_key_value_heads": 2}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
TWO_SIDED = {
    "vocab_size": 48,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_start_token_id": 1,
    **IDS,
}
T5 = {"vocab_size": 48, "d_model": WIDTH, "d_ff": 40, "d_kv": 8, "num_layers": 2, "num_heads": 4}
GPT2 = {"vocab_size": 48, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 16, **IDS}


def of(name: str, **fields: Any) -> Callable[[], nn.Module]:
    """A model of transformers without memory behind it."""

    def build() -> nn.Module:
        with torch.device("meta"):
            return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**fields))

    return build


def block(path: str, *attention: str, ff: tuple[str, ...], width: int = WIDTH) -> Block:
    """A block of which the paths are relative to its own: attention as "module>output", feed-forward as inputs and
    output."""
    pairs = [each.split(">") for each in attention]
    return Block(
        path,
        width,
        tuple(Attention(f"{path}.{module}", f"{path}.{module}.{output}") for module, output in pairs),
        FeedForward(tuple(f"{path}.{name}" for name in ff[:-1]), f"{path}.{ff[-1]}"),
    )


def blocks(path: str, *attention: str, ff: tuple[str, ...]) -> list[Block]:
    """Two blocks that are alike."""
    return [block(f"{path}.{index}", *attention, ff=ff) for index in range(2)]


def bert_block(path: str, *attentions: str) -> Block:
    return Block(
        path,
        WIDTH,
        tuple(Attention(f"{path}.{name}.self", f"{path}.{name}.output.dense") for name in attentions),
        FeedForward((f"{path}.intermediate.dense",), f"{path}.output.dense"),
    )


def bert_blocks(path: str, *attentions: str) -> list[Block]:
    return [bert_block(f"{path}.{index}", *(attentions or ("attention",))) for index in range(2)]


GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
MIXTURE = ("mlp", "mlp")
LLAMA_LIKE = blocks("layers", "self_attn>o_proj", ff=GATED)
BART_LIKE = [
    *blocks("encoder.layers", "self_attn>out_proj", ff=("fc1", "fc2")),
    *blocks("decoder.layers", "self_attn>out_proj", "encoder_attn>out_proj", ff=("fc1", "fc2")),
]


def t5_blocks(*inputs: str) -> list[Block]:
    sides = {
        "encoder": ["layer.0.SelfAttention>o"],
        "decoder": ["layer.0.SelfAttention>o", "layer.1.EncDecAttention>o"],
    }
    return [
        found
        for side, attention in sides.items()
        for found in blocks(
            f"{side}.block",
            *attention,
            ff=tuple(f"layer.{len(attention)}.DenseReluDense.{name}" for name in (*inputs, "wo")),
        )
    ]


FAMILIES: dict[str, tuple[Callable[[], nn.Module], list[Block]]] = {
    "llama": (of("Llama", **GROUPED), LLAMA_LIKE),
    "mistral": (of("Mistral", **GROUPED), LLAMA_LIKE),
    "qwen2": (of("Qwen2", **GROUPED), LLAMA_LIKE),
    # a head of 16 makes attention twice as wide as the block
    "qwen3": (of("Qwen3", **GROUPED, head_dim=16), LLAMA_LIKE),
    "gemma3": (of("Gemma3Text", **GROUPED, head_dim=8), LLAMA_LIKE),
    "phi3": (
        of("Phi3", **GROUPED, **IDS),
        blocks("layers", "self_attn>o_proj", ff=("mlp.gate_up_proj", "mlp.down_proj")),
    ),
    "gpt2": (of("GPT2", **GPT2), blocks("h", "attn>c_proj", ff=("mlp.c_fc", "mlp.c_proj"))),
    "gpt2 with cross attention": (
        of("GPT2", **GPT2, add_cross_attention=True),
        blocks("h", "attn>c_proj", "crossattention>c_proj", ff=("mlp.c_fc", "mlp.c_proj")),
    ),
    "gpt_neo": (
        of(
            "GPTNeo",
            vocab_size=48,
            hidden_size=WIDTH,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global"], 2]],
            **IDS,
        ),
        blocks("h", "attn.attention>out_proj", ff=("mlp.c_fc", "mlp.c_proj")),
    ),
    "gpt_neox": (
        of("GPTNeoX", **TEXT, **IDS),
        blocks("layers", "attention>dense", ff=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
    ),
    "gptj": (
        of("GPTJ", vocab_size=48, n_embd=WIDTH, n_layer=2, n_head=4, rotary_dim=4, **IDS),
        blocks("h", "attn>out_proj", ff=("mlp.fc_in", "mlp.fc_out")),
    ),
    "opt": (
        of("OPT", **NAMED, ffn_dim=40, word_embed_proj_dim=WIDTH),
        blocks("decoder.layers", "self_attn>out_proj", ff=("fc1", "fc2")),
    ),
    "bloom": (
        of("Bloom", vocab_size=48, hidden_size=WIDTH, n_layer=2, n_head=4),
        blocks("h", "self_attention>dense", ff=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
    ),
    "falcon": (
        of("Falcon", **NAMED),
        blocks("h", "self_attention>dense", ff=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
    ),
    "mixtral": (of("Mixtral", **GROUPED, num_local_experts=3), blocks("layers", "self_attn>o_proj", ff=MIXTURE)),
    "gpt_oss": (
        of("GptOss", **GROUPED, num_local_experts=3, head_dim=8),
        blocks("layers", "self_attn>o_proj", ff=MIXTURE),
    ),
    "qwen2_moe": (
        of("Qwen2Moe", **GROUPED, num_experts=3, moe_intermediate_size=12, shared_expert_intermediate_size=12),
        blocks("layers", "self_attn>o_proj", ff=MIXTURE),
    ),
    "granitemoe": (
        of("GraniteMoe", **GROUPED, num_local_experts=3, num_experts_per_tok=2),
        blocks("layers", "self_attn>o_proj", ff=("block_sparse_moe", "block_sparse_moe")),
    ),
    # layers 0 and 1 are recurrent there, layer 2 attends
    "jamba": (
        of(
            "Jamba",
            **{**GROUPED, "num_hidden_layers": 3, "intermediate_size": 112},
            attn_layer_period=3,
            attn_layer_offset=2,
            num_experts=1,
            mamba_d_state=4,
        ),
        [
            *(
                Block(
                    f"layers.{index}",
                    WIDTH,
                    (),
                    FeedForward(
                        (f"layers.{index}.feed_forward.gate_proj", f"layers.{index}.feed_forward.up_proj"),
                        f"layers.{index}.feed_forward.down_proj",
                    ),
                )
                for index in range(2)
            ),
            block(
                "layers.2",
                "self_attn>o_proj",
                ff=("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"),
            ),
        ],
    ),
    "bert": (of("Bert", **TEXT), bert_blocks("encoder.layer")),
    "bert as a decoder": (
        of("Bert", **TEXT, is_decoder=True, add_cross_attention=True),
        bert_blocks("encoder.layer", "attention", "crossattention"),
    ),
    "roberta": (of("Roberta", **TEXT), bert_blocks("encoder.layer")),
    "electra": (of("Electra", **TEXT, embedding_size=16), bert_blocks("encoder.layer")),
    "deberta-v2": (
        of("DebertaV2", **TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        bert_blocks("encoder.layer"),
    ),
    "distilbert": (
        of("DistilBert", vocab_size=48, dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=40),
        blocks("transformer.layer", "attention>out_lin", ff=("ffn.lin1", "ffn.lin2")),
    ),
    "modernbert": (of("ModernBert", **TEXT, pad_token_id=0), blocks("layers", "attn>Wo", ff=("mlp.Wi", "mlp.Wo"))),
    # its layers are one, run twice
    "albert": (
        of("Albert", **TEXT, embedding_size=16),
        [block("encoder.albert_layer_groups.0.albert_layers.0", "attention>dense", ff=("ffn", "ffn_output"))],
    ),
    "mpnet": (
        of("MPNet", **TEXT),
        blocks("encoder.layer", "attention.attn>o", ff=("intermediate.dense", "output.dense")),
    ),
    "t5": (of("T5", **T5), t5_blocks("wi")),
    "t5 gated": (of("T5", **T5, feed_forward_proj="gated-gelu"), t5_blocks("wi_0", "wi_1")),
    # experts that are modules of their own, in a dictionary
    "switch_transformers": (
        of(
            "SwitchTransformers",
            **T5,
            num_experts=3,
            num_decoder_layers=2,
            num_sparse_encoder_layers=2,
            num_sparse_decoder_layers=2,
        ),
        [
            *blocks("encoder.block", "layer.0.SelfAttention>o", ff=("layer.1.mlp", "layer.1.mlp")),
            *blocks(
                "decoder.block",
                "layer.0.SelfAttention>o",
                "layer.1.EncDecAttention>o",
                ff=("layer.2.mlp", "layer.2.mlp"),
            ),
        ],
    ),
    "bart": (of("Bart", **TWO_SIDED), BART_LIKE),
    "mbart": (of("MBart", **TWO_SIDED), BART_LIKE),
    "marian": (of("Marian", **TWO_SIDED), BART_LIKE),
    "vit": (of("ViT", **IMAGE), blocks("layers", "attention>o_proj", ff=("mlp.fc1", "mlp.fc2"))),
    "deit": (of("DeiT", **IMAGE), blocks("layers", "attention>o_proj", ff=("mlp.fc1", "mlp.fc2"))),
    # stages of blocks, each of another width
    "swin": (
        of("Swin", image_size=16, patch_size=2, embed_dim=16, depths=[1, 2], num_heads=[2, 4], window_size=2),
        [
            block(f"encoder.layers.{path}", "attention>o_proj", ff=("mlp.fc1", "mlp.fc2"), width=width)
            for path, width in (("0.blocks.0", 16), ("1.blocks.0", 32), ("1.blocks.1", 32))
        ],
    ),
    "clip": (
        of("CLIP", text_config={**TEXT, **IDS}, vision_config=IMAGE),
        [
            found
            for side in ("text_model", "vision_model")
            for found in blocks(f"{side}.encoder.layers", "self_attn>out_proj", ff=("mlp.fc1", "mlp.fc2"))
        ],
    ),
    "wav2vec2": (
        of("Wav2Vec2", **TEXT, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2),
        blocks(
            "encoder.layers",
            "attention>out_proj",
            ff=("feed_forward.intermediate_dense", "feed_forward.output_dense"),
        ),
    ),
    "wav2vec2-conformer": (
        of("Wav2Vec2Conformer", **TEXT, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2),
        blocks("encoder.layers", "self_attn>linear_out", ff=("ffn2.intermediate_dense", "ffn2.output_dense")),
    ),
    "whisper": (of("Whisper", **TWO_SIDED, num_mel_bins=8), BART_LIKE),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_of_each_family(family: str) -> None:
    build, expected = FAMILIES[family]
    model = build()
    assert find_blocks(model) == expected
    # and under a head, with the paths from its root
    assert [found.path for found in find_blocks(nn.Sequential(model))] == [f"0.{found.path}" for found in expected]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "mixtral"])
def test_adapters_that_stand_on_the_model_are_passed_over(family: str) -> None:
    build, expected = FAMILIES[family]
    assert find_blocks(inject(build(), LoRA(r=WIDTH))) == expected


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("Llama", {"hidden_size": 64, "head_dim": 16, "num_key_value_heads": 1, "intermediate_size": 64}),
        # keys and values as wide as the block, as in Qwen3 0.6B
        ("Qwen3", {"hidden_size": 64, "head_dim": 32, "num_key_value_heads": 2, "intermediate_size": 192}),
        ("Gemma3Text", {"hidden_size": 64, "head_dim": 8, "num_key_value_heads": 4, "intermediate_size": 48}),
    ],
)
def test_widths_that_coincide_do_not_mislead(family: str, fields: dict[str, int]) -> None:
    found = find_blocks(of(family, **{**GROUPED, **fields})())
    assert [each.width for each in found] == [64, 64]
    assert [each.attention[0].output for each in found] == [f"layers.{i}.self_attn.o_proj" for i in range(2)]
    expected = [(f"layers.{i}.mlp.gate_proj", f"layers.{i}.mlp.up_proj") for i in range(2)]
    assert [each.feed_forward.inputs for each in found if each.feed_forward] == expected
    assert [each.feed_forward.output for each in found if each.feed_forward] == [
        f"layers.{i}.mlp.down_proj" for i in range(2)
    ]


class OwnAttention(nn.Module):
    """As in small teaching models: heads, one layer in, one out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.n_head = 2
        self.c_proj = nn.Linear(width, width)
        self.c_attn = nn.Linear(width, 3 * width)


class OwnBlock(nn.Module):
    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.mix = OwnAttention(8)
        expert = partial(nn.Sequential, nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        if experts:
            self.moe = nn.ModuleDict({"router": nn.Linear(8, experts), "experts": nn.ModuleList()})
            self.moe["experts"].extend(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)) for _ in range(experts))
        else:
            self.ff = expert()

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_own_blocks_in_a_list_or_in_a_row() -> None:
    for container in (nn.ModuleList([OwnBlock(), OwnBlock()]), nn.Sequential(OwnBlock(), OwnBlock())):
        assert find_blocks(nn.ModuleDict({"body": container})) == [
            Block(
                f"body.{i}",
                8,
                (Attention(f"body.{i}.mix", f"body.{i}.mix.c_proj"),),
                FeedForward((f"body.{i}.ff.0",), f"body.{i}.ff.2"),
            )
            for i in range(2)
        ]
    assert [found.path for found in find_blocks(nn.Sequential(OwnBlock()))] == ["0"]


def test_experts_in_a_list_are_one_feed_forward() -> None:
    found = find_blocks(nn.ModuleDict({"body": nn.ModuleList([OwnBlock(experts=3)])}))
    assert [each.feed_forward for each in found] == [FeedForward(("body.0.moe",), "body.0.moe")]


def test_a_block_that_stands_twice_is_found_once() -> None:
    one = OwnBlock()
    model = nn.ModuleDict({"first": nn.ModuleList([one, one]), "second": nn.ModuleList([one, OwnBlock()])})
    assert [found.path for found in find_blocks(model)] == ["first.0", "second.1"]


def test_blocks_of_torch() -> None:
    model = nn.Transformer(8, 2, 1, 1, 12, batch_first=True)
    ff = [FeedForward((f"{side}.layers.0.linear1",), f"{side}.layers.0.linear2") for side in ("encoder", "decoder")]
    # attention's own projection is never called
    own, other = Attention(*["decoder.layers.0.self_attn"] * 2), Attention(*["decoder.layers.0.multihead_attn"] * 2)
    assert find_blocks(model) == [
        Block("encoder.layers.0", 8, (Attention(*["encoder.layers.0.self_attn"] * 2),), ff[0]),
        Block("decoder.layers.0", 8, (own, other), ff[1]),
    ]


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(3, 3),
        nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 3)),
        nn.ModuleList([nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 3)) for _ in range(2)]),
        nn.ModuleList([nn.MultiheadAttention(4, 2)]),
        nn.ModuleList(),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
    ],
    ids=["linear", "mlp", "mlps", "attention", "empty", "cnn"],
)
def test_what_has_no_block(model: nn.Module) -> None:
    assert find_blocks(model) == []
    assert find_blocks(nn.ModuleDict({"outer": model})) == []


def test_a_large_model_is_searched_in_a_second() -> None:
    import time

    fields = {**GROUPED, "num_hidden_layers": 80}
    model = of("Llama", **fields)()
    start = time.perf_counter()
    assert len(find_blocks(model)) == 80
    assert time.perf_counter() - start < 1
