"""Text out of a model: the options of `generate`, the tokens that end a text, and the tokenizer to read them with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_peft.interchange.locations import resolve
from lightning_peft.methods.errors import PEFTError, suggestion
from lightning_peft.tasks.task import Batch

MAX_NEW_TOKENS = 128
"""How long a text becomes at most, where nothing else is said."""


def option_faults(model: str | torch.nn.Module, options: Mapping[str, Any]) -> list[str]:
    """What of `options` the `generate` of transformers refuses; a model with one of its own takes what it likes."""
    if not options:
        return []
    from transformers import GenerationConfig, GenerationMixin

    if not isinstance(model, (str, GenerationMixin)):
        return []
    make: Any = GenerationConfig  # it has no types
    fields = {name for name in vars(make()) if not name.startswith("_")}
    known = {*fields, *inspect.signature(GenerationMixin.generate).parameters} - {"self", "inputs", "kwargs"}
    faults = [
        f"generation: `generate` has no option {name!r}{suggestion(name, known)}"
        for name in options
        if name not in known
    ]
    if options.get("num_return_sequences", 1) != 1:
        faults.append("generation.num_return_sequences: one text is made for each row; leave it out")
    if options.get("return_dict_in_generate"):
        faults.append("generation.return_dict_in_generate: the texts alone are used; leave it out")
    try:
        make(**{name: value for name, value in options.items() if name in fields})
    except (TypeError, ValueError) as error:
        faults.append(f"generation: {' '.join(str(error).split())}")
    return faults


def text_config(model: Any) -> Any:
    """The configuration of a model of transformers, in a model of several kinds that of its text; None without one."""
    config = getattr(model, "config", None)
    return config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config


def without_cache(model: Any) -> dict[str, Any]:
    """What keeps a model of transformers from making a cache of keys and values, with which it packs no rows."""
    return {"use_cache": False} if getattr(text_config(model), "use_cache", None) is not None else {}


def model_tokenizer(name: str, trust_remote_code: bool) -> Any:
    """The tokenizer in the place of the model called `name`, or None where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve(name, "model"), trust_remote_code=trust_remote_code)
    except PEFTError:
        raise
    except (OSError, ValueError):
        return None


def generate(model: Any, inputs: Batch, options: Mapping[str, Any], tokenizer: Any) -> torch.Tensor:
    """What `model.generate` makes of `inputs`: token ids, int64 of shape (batch, length), filled up with padding.

    A text ends at the tokens that the model's own configuration names, and at the tokenizer's end of a text, which is
    what it was trained to close with.
    """
    limit = {} if "max_length" in options else {"max_new_tokens": MAX_NEW_TOKENS}
    config = getattr(model, "generation_config", None)
    own: dict[str, Any] = {"use_cache": True} if config is not None else {}
    if config is not None and tokenizer is not None:
        named = config.eos_token_id
        ends = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None}
        pads = [tokenizer.pad_token_id, tokenizer.eos_token_id, config.pad_token_id]
        own["eos_token_id"] = sorted(ends) or None
        own["pad_token_id"] = next((pad for pad in pads if pad is not None), None)
        own |= {"tokenizer": tokenizer} if "stop_strings" in options else {}
    made: torch.Tensor = model.generate(**inputs, **{**limit, **own, **options})
    return made


def decode(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """The text of each row of token ids, without special tokens."""
    return list(tokenizer.batch_decode(rows, skip_special_tokens=True)) if rows else []


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> Batch:
    """`input_ids` and `attention_mask` of rows that all end where generation begins, int64 of shape (batch, length)."""
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + list(row) for row in rows], device=device),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device),
    }
