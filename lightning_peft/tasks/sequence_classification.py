"""Classification of texts, or of anything else that a given model makes logits from."""

from __future__ import annotations

from typing import ClassVar

from lightning_peft.tasks.classification import Classification


class SequenceClassification(Classification):
    """A pretrained encoder or decoder with a new head that gives one label to a text.

    Args, batches and metrics are those of `Classification`.
    """

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    def configure_model(self) -> None:
        """As every task does it; a decoder is told which token is padding, since it reads the last that isn't."""
        super().configure_model()
        tokenizer, config = getattr(self.data, "tokenizer", None), getattr(self.model, "config", None)
        if tokenizer is not None and config is not None and getattr(config, "pad_token_id", 0) is None:
            config.pad_token_id = tokenizer.pad_token_id
