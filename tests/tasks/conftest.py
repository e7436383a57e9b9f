"""A tiny BERT with its tokenizer in a folder, and a file of rows that it can learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

WORDS = ["good", "bad", "fine", "poor", "film", "book", "plot", "a", "the", "was", "is", "not", "very"]


@pytest.fixture(autouse=True)
def _use_datasets_cache(datasets_cache: None) -> None: ...


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a randomly initialised BERT of two layers and width 16, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = str(tmp_path_factory.mktemp("tiny_bert"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=512
    ).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(
            BertConfig(
                vocab_size=len(vocabulary),
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                initializer_range=0.2,
            )
        ).save_pretrained(folder)
    return folder


@pytest.fixture
def reviews(tmp_path: Path) -> str:
    """A JSONL file with 21 rows of the class `bad`, 14 of `good` and 7 of `fine`, each of which names its class."""
    path = tmp_path / "reviews.jsonl"
    labels = ["bad"] * 21 + ["good"] * 14 + ["fine"] * 7
    rows = [{"text": f"the {WORDS[4 + n % 3]} was {label}", "label": label} for n, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
