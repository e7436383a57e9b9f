"""What prompt tuning and P-tuning have in common: where virtual tokens go, the rules of their fields, their files."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lightning_peft.methods import _prompts_peft
from lightning_peft.methods._host import Adapter
from lightning_peft.methods._prompts import PromptedMask, PromptedModel, PromptEmbedding
from lightning_peft.methods._prompts_layout import Kind, Places
from lightning_peft.methods._prompts_targets import TextModel, text_models
from lightning_peft.methods._target_modules import once
from lightning_peft.methods.base import Attachment, Method, PeftRoot, PeftTensor
from lightning_peft.methods.errors import PEFTError


@dataclass(kw_only=True)
class PromptMethod(Method):
    """Virtual tokens in the input of every text model; a subclass says what their embeddings are made from."""

    num_virtual_tokens: int = 20
    """How many virtual tokens, 1 or more."""

    identity_at_start: ClassVar[bool] = False
    peft_prefix: ClassVar[str] = "base_model."

    def faults(self) -> list[str]:
        """What is wrong with the fields."""
        n = self.num_virtual_tokens
        return [] if isinstance(n, int) and n >= 1 else [f"num_virtual_tokens: {n} is no number of them; at least 1"]

    def places(self) -> Places:
        """Where the virtual tokens go."""
        return Places(self.num_virtual_tokens, 0)

    def prompt(self, embedding: nn.Embedding) -> PromptEmbedding:
        """What gives the virtual tokens their embeddings, beside those of a text model.

        Raises:
            PEFTError: it can't be made.
        """
        raise NotImplementedError

    def attachments(self, model: nn.Module, skip: Container[str]) -> Sequence[Attachment]:
        """One adapter for each text model, one for its embeddings, and one for the decoder that reads it, if any."""
        name = type(self).__name__
        try:
            texts = text_models(model, skip)
        except PEFTError as error:
            raise PEFTError([f"{name}: {fault}" for fault in error.faults]) from error
        made: list[Attachment] = []
        faults: list[str] = []
        for text in texts:
            try:
                made += self._of(text)
            except PEFTError as error:
                faults += error.faults
        if faults:
            raise PEFTError([f"{name}.{fault}" for fault in dict.fromkeys(faults)])
        return once(made)

    def _of(self, text: TextModel) -> list[Attachment]:
        places, kind = self.places(), text.kind
        if kind is Kind.DECODER and places.behind:
            raise PEFTError(
                "template: in a decoder a token sees only what comes before it, and none would see a prompt behind the "
                "input; the template must end in {input}"
            )
        body = PromptedModel(text.module, places, kind, leads=text.leads)
        made = [
            Attachment(text.path, text.module, body),
            Attachment(text.embedding_path, text.embedding, self.prompt(text.embedding)),
        ]
        if text.decoder is not None:
            made.append(Attachment(text.decoder_path, text.decoder, PromptedMask(text.decoder, places)))
        return made

    def to_peft(self, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, Any]:
        """The sizes; what an encoder makes is written, and not the encoder."""
        return _prompts_peft.to_peft(root, attached)

    def peft_tensors(self, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, PeftTensor]:
        """The embeddings, one row for each virtual token."""
        return _prompts_peft.peft_tensors(root, attached)
