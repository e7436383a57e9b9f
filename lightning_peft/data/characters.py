"""A tokenizer of characters for speech models, which spell what they hear."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

SPECIAL = ("<pad>", "<unk>", "|")
"""The first tokens: what stands for no character (CTC's blank), for an unknown one, and for the space of words."""


def count_characters(texts: Iterable[str]) -> Counter[str]:
    """How often each character is there, spaces left out."""
    return Counter(character for text in texts for character in text if not character.isspace())


def character_tokenizer(characters: Iterable[str]) -> Any:
    """A `Wav2Vec2CTCTokenizer` of `characters`, in order of their code points after those of `SPECIAL`."""
    from transformers import Wav2Vec2CTCTokenizer

    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *sorted(set(characters) - set(SPECIAL))])}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "vocab.json")
        file.write_text(json.dumps(vocabulary), encoding="utf-8")
        make: Any = Wav2Vec2CTCTokenizer  # it has no types
        return make(str(file), bos_token=None, eos_token=None)


def unknown_characters(tokenizer: Any, counts: Counter[str], cased: Callable[[str], str] = str) -> Counter[str]:
    """Those of `counts`, after `cased`, that the tokenizer has no token for."""
    known, unknown = set(tokenizer.get_vocab()), Counter[str]()
    for character, count in counts.items():
        for part in cased(character):
            unknown[part] += count if part not in known else 0
    return +unknown


def vocabulary_of(tokenizer: Any) -> list[str]:
    """A tokenizer's tokens, by id."""
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.__getitem__)
