"""Translation, summarization and the like: an encoder reads a text, a decoder writes another."""

from __future__ import annotations

from typing import ClassVar

import torch

from lightning_peft.tasks.generation import Generation
from lightning_peft.tasks.task import IGNORED, Batch


class Seq2Seq(Generation):
    """A pretrained encoder-decoder that writes one text for another.

    A batch holds `input_ids`, `attention_mask` and `labels`, each int64 of shape (batch, length), where labels of -100
    are left out. The model is called with all of them, and makes the decoder's inputs out of the labels. Args and
    metrics are those of `Generation`.
    """

    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"

    def scored(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, (batch, length, vocabulary), and the labels as they are."""
        return self.logits(batch), batch["labels"]

    def prompts(self, batch: Batch) -> tuple[Batch, list[list[int]]]:
        """The encoder's inputs, and the labels of each row that count."""
        prompts = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask")}
        rows = batch["labels"].tolist() if "labels" in batch else [[]] * len(batch["input_ids"])
        return prompts, [[token for token in row if token != IGNORED] for row in rows]
