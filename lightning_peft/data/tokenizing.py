"""Tokenizers: found by name, checked, applied to the columns of a table with what was cut counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from lightning_peft.interchange.locations import resolve
from lightning_peft.methods.errors import PEFTError, suggestion

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

CUT = "was_cut"
"""The column that says whether a row was longer than max_length."""


def source_of(field: str, given: str | None, trainer: L.Trainer | None) -> str:
    """What to load a tokenizer or processor from: `given`, or the model of the LightningModule that is being run.

    Raises:
        PEFTError: neither is known; `field` is the name that `given` has.
    """
    if given is not None:
        return given
    module = trainer.lightning_module if trainer is not None else None
    model = module.hparams.get("model") if module is not None else None
    if isinstance(model, str):
        return model
    raise PEFTError(
        f"{field}: none was given, and the module has no hyper-parameter `model` with a name to take it from; "
        "give a hub id, a folder or package:NAME/folder"
    )


def load_tokenizer(source: str, max_length: int, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer at `source` (a hub id, a folder or `package:NAME/folder`), with a padding token.

    `options` are passed on to `from_pretrained`.

    Raises:
        PEFTError: there is none, or its model reads fewer than `max_length` tokens.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(source, "tokenizer"), **options)
    except (OSError, ValueError) as error:
        if isinstance(error, PEFTError):
            raise
        message = str(error).strip().splitlines()[0]
        raise PEFTError(f"tokenizer: none can be loaded from {source!r}: {message}") from error
    most = tokenizer.model_max_length
    if max_length > most:
        raise PEFTError(f"max_length: {max_length} is more than the {most} tokens that {source!r} reads")
    if tokenizer.pad_token is None:
        # decoders come without one; any token will do, because what is padded is masked
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenize(tokenizer: PreTrainedTokenizerBase, columns: list[list[str]], max_length: int) -> dict[str, list[Any]]:
    """The tokenizer's fields for one batch of texts (or of pairs, with two columns), and `CUT`, a bool per row."""
    fields = dict(tokenizer(*columns, truncation=True, max_length=max_length))
    lengths = [len(ids) for ids in fields["input_ids"]]
    # only a row that fills max_length can have been cut, so only those are read a second time
    full = [row for row, length in enumerate(lengths) if length >= max_length]
    cut = [False] * len(lengths)
    if full:
        whole = tokenizer(*([texts[row] for row in full] for texts in columns), verbose=False)
        for row, ids in zip(full, whole["input_ids"], strict=True):
            cut[row] = len(ids) > lengths[row]
    return {**fields, CUT: cut}


def missing_columns(table: Dataset, split: str, needed: Mapping[str, Sequence[str]]) -> list[str]:
    """One fault for each column that `table` lacks, with the nearest of its names.

    Args:
        table: any table.
        split: its name, for the messages.
        needed: the columns that have to be there, by the name of the field that says so.
    """
    return [
        f"{field}: the {split} data has no column {column!r}"
        + (suggestion(column, table.column_names) or f"; it has {', '.join(table.column_names)}")
        for field, columns in needed.items()
        for column in columns
        if column not in table.column_names
    ]


def text_faults(table: Dataset, column: str, split: str, field: str) -> list[str]:
    """That `column` of `table` holds something else than text, or has rows without any."""
    kind = getattr(table.features[column], "dtype", "a list")
    if kind not in ("string", "large_string"):
        return [f"{field}: {column!r} of the {split} data holds {kind}, not text"]
    arrow = table.select_columns([column]).with_format("arrow")
    missing = sum(batch[column].null_count for batch in arrow.iter(batch_size=10_000))
    told = f"{field}: {missing:,} of {len(table):,} rows of the {split} data have no {column!r}"
    return [told] if missing else []


def padded(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> torch.Tensor:
    """Rows as one int64 tensor of shape (rows, length of the longest), filled up with `value` on the right or left."""
    longest = max(len(row) for row in rows)
    tensor = torch.full((len(rows), longest), value, dtype=torch.int64)
    for place, row in enumerate(rows):
        if row:
            tensor[place, longest - len(row) if left else 0 :][: len(row)] = torch.as_tensor(row)
    return tensor
