"""Prompt tuning: trained embeddings before those of the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_peft.methods import _prompts_peft
from lightning_peft.methods._host import Adapter
from lightning_peft.methods._prompts import FreePrompt, PromptEmbedding, rows_of, start_like
from lightning_peft.methods._prompts_method import PromptMethod
from lightning_peft.methods.base import PeftRoot
from lightning_peft.methods.errors import PEFTError, suggestion

INITS = ("vocabulary", "text", "random")


@dataclass(kw_only=True)
class PromptTuning(PromptMethod):
    r"""X ← [P; X]: the n trained rows of P stand before the embeddings X of the input's tokens.

    Labels and outputs keep the input's length: what the model computes at virtual tokens is cut off, except in what an
    encoder hands to its decoder, and except that a head which reads the first token reads the first virtual one, as in
    HF peft. Tokens are counted from position n on. A loss is over the same labels as the bare model's; HF peft's also
    predicts a decoder's first token, where that has a label. Source: arXiv 2104.08691.

    Raises:
        PEFTError: with every field that breaks its rule.
    """

    init: str = "vocabulary"
    """Where P starts: "vocabulary" takes the model's embeddings of tokens drawn at random, "text" those of `init_text`,
    "random" N(0, 1), as HF peft does by default."""
    init_text: str | None = None
    """A text that says what the task is; its tokens are repeated or cut to the number of virtual ones."""
    tokenizer: str | None = None
    """The tokenizer for `init_text`, a folder or a hub id: that of the model."""

    learning_rate: ClassVar[float] = 0.3
    training_only: ClassVar[frozenset[str]] = frozenset({"init", "init_text", "tokenizer"})
    peft_defaults: ClassVar[Mapping[str, Any]] = _prompts_peft.PROMPT_TUNING

    def faults(self) -> list[str]:
        """What is wrong with the fields."""
        faults = super().faults()
        if self.init not in INITS:
            faults.append(f"init: {self.init!r} is none of {', '.join(INITS)}{suggestion(str(self.init), INITS)}")
        for name in ("init_text", "tokenizer"):
            value = getattr(self, name)
            if self.init == "text" and not value:
                faults.append(f"{name}: init 'text' needs it")
            elif self.init != "text" and value is not None:
                faults.append(f"{name}: {value!r} is of no use with init {self.init!r}; give init 'text' with it")
        return faults

    def fields(self) -> dict[str, Any]:
        """Without the text: a checkpoint has what it became, and must load where the tokenizer is not."""
        told = {"init": "vocabulary", "init_text": None, "tokenizer": None} if self.init == "text" else {}
        return {**super().fields(), **told}

    def prompt(self, embedding: nn.Embedding) -> PromptEmbedding:
        """Trained rows, from where `init` says."""
        n = self.num_virtual_tokens
        if self.init == "random":
            return FreePrompt(start_like(embedding, n))
        if self.init == "vocabulary":
            return FreePrompt(rows_of(embedding, torch.randint(embedding.num_embeddings, (n,))))
        ids = self._text_ids()
        if max(ids) >= embedding.num_embeddings:
            raise PEFTError(
                f"tokenizer: {self.tokenizer!r} has a token {max(ids)}, and the model has {embedding.num_embeddings}; "
                "give the model's own tokenizer"
            )
        return FreePrompt(rows_of(embedding, torch.tensor([ids[i % len(ids)] for i in range(n)])))

    def _text_ids(self) -> list[int]:
        try:
            from transformers import AutoTokenizer

            ids: list[int] = AutoTokenizer.from_pretrained(self.tokenizer)(self.init_text)["input_ids"]
        except (ImportError, OSError, ValueError, KeyError) as error:
            reason = str(error).strip().split("\n")[0]
            raise PEFTError(f"tokenizer: {self.tokenizer!r} can't be loaded ({reason})") from error
        if not ids:
            raise PEFTError(f"init_text: {self.init_text!r} has no token")
        return ids

    def to_peft(self, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, Any]:
        """The sizes, and where the prompt started."""
        start: dict[str, Any] = {"prompt_tuning_init": _prompts_peft.INITS[self.init]}
        if self.init == "text":
            start |= {"prompt_tuning_init_text": self.init_text, "tokenizer_name_or_path": self.tokenizer}
        return {**super().to_peft(root, attached), **start}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], keys: Sequence[str], root: PeftRoot) -> PromptTuning:
        """With the directory's number of virtual tokens."""
        return cls(num_virtual_tokens=_prompts_peft.count(config, root))
