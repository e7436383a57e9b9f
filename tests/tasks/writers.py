"""Tiny models that write text, with a tokenizer of whole words, and pairs of texts that they can learn by heart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

WORDS = ["red", "blue", "green", "one", "two", "three", "cat", "dog", "sun", "sea", "is", "what"]
PAIRS = [
    ("what is red", "one cat"),
    ("what is blue", "two dog sun"),
    ("is green", "three"),
    ("what is sun", "sea"),
    ("sea", "blue sea"),
    ("red dog is", "cat cat"),
    ("one two three", "sun"),
]
SIZES: dict[str, dict[str, Any]] = {
    "Llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "OPT": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
    },
    "T5": {
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 2,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    },
    "Bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    },
}


def tokenizer(**more: Any) -> Any:
    """Whole words, with `<eos>` (2) put after a text by nobody but the data, and `<pad>` (0)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", "<eos>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=64, **more
    )


def build(kind: str, **options: Any) -> Any:
    """A randomly initialised model of a kind in `SIZES`, in evaluation mode."""
    import transformers

    ids = {"vocab_size": len(tokenizer()), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(**{**ids, **SIZES[kind], **options})
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(config).eval()


def save(kind: str, folder: Path, **options: Any) -> str:
    """The folder of such a model and its tokenizer."""
    build(kind, **options).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(**{"accelerator": "cpu", "devices": 1, "default_root_dir": folder, **quiet, **options})


def flat(lists: Any) -> list[Any]:
    """The items of all lists, such as what is predicted for each batch."""
    return [item for items in lists for item in items]


def right_padded(rows: list[list[int]], value: int) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def left_padded(rows: list[list[int]], value: int) -> torch.Tensor:
    return right_padded([row[::-1] for row in rows], value).flip(-1)


class Pairs(L.LightningDataModule):
    """Prompts and answers, of which only the answers and their ends count, for a decoder or an encoder-decoder.

    Args:
        decoder: one text goes on with the other, in one row.
        packing: all of a batch's pairs are put into one row.
        unlabelled: so many rows more without labels.
        repeat: so many times each pair in training.
    """

    def __init__(
        self, decoder: bool, packing: bool = False, unlabelled: int = 0, repeat: int = 1, batch_size: int = 4
    ) -> None:
        super().__init__()
        self.decoder, self.packing, self.batch_size, self.repeat = decoder, packing, batch_size, repeat
        self.tokenizer = tokenizer()
        self.rows = [
            (self.tokenizer(prompt)["input_ids"], [*self.tokenizer(answer)["input_ids"], 2]) for prompt, answer in PAIRS
        ]
        self.unlabelled: list[Any] = [(self.rows[0][0], [])] * unlabelled

    def batch(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        if not self.decoder:
            sources, labels = [source for source, _ in rows], [answer or [-100] for _, answer in rows]
        else:
            sources = [prompt + answer for prompt, answer in rows]
            labels = [[-100] * len(prompt) + answer for prompt, answer in rows]
        if self.packing:
            places = [torch.arange(len(source)) for source in sources]
            return {
                "input_ids": torch.tensor([flat(sources)]),
                "position_ids": torch.cat(places)[None],
                "labels": torch.tensor([flat(labels)]),
            }
        return {
            "input_ids": right_padded(sources, 0),
            "attention_mask": right_padded([[1] * len(source) for source in sources], 0),
            "labels": right_padded(labels, -100),
        }

    def prompts(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        pad = left_padded if self.decoder else right_padded
        sources = [source for source, _ in rows]
        return {"input_ids": pad(sources, 0), "attention_mask": pad([[1] * len(source) for source in sources], 0)}

    def loader(self, rows: list[Any], collate: Any) -> DataLoader[Any]:
        return DataLoader(rows, batch_size=self.batch_size, collate_fn=collate)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.rows * self.repeat, self.batch)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.rows + self.unlabelled, self.batch)

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.rows, self.prompts)
