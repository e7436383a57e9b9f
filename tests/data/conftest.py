"""A small tokenizer in a folder, and a cache for `datasets` that ends with the test run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORDS = ["good", "bad", "fine", "poor", "film", "book", "plot", "a", "the", "was", "is", "not", "very"]


@pytest.fixture(autouse=True)
def _use_datasets_cache(datasets_cache: None) -> None: ...


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer of whole words that puts [CLS] and [SEP] around a text; reads 512 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=512,
    ).save_pretrained(str(folder))
    return str(folder)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes rows to a file in the format that its suffix says, and returns its path."""

    def write_rows(name: str, rows: list[dict[str, Any]]) -> str:
        import pandas

        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pandas.DataFrame(rows)
        if path.suffix == ".csv":
            table.to_csv(path, index=False)
        elif path.suffix == ".parquet":
            table.to_parquet(path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(rows))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write_rows
