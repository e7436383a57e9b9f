"""P-tuning v1: virtual tokens whose embeddings an encoder makes while they train, at the places of a template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from lightning_peft.methods import _prompts_peft
from lightning_peft.methods._host import Adapter
from lightning_peft.methods._prompts import PromptEmbedding, start_like
from lightning_peft.methods._prompts_layout import Places
from lightning_peft.methods._prompts_method import PromptMethod
from lightning_peft.methods.base import PeftRoot
from lightning_peft.methods.errors import PEFTError, suggestion
from lightning_peft.methods.prompt_tuning import PromptTuning

ENCODERS = ("mlp", "lstm")
IN_FRONT = "{prompt}{input}"


class EncodedPrompt(PromptEmbedding):
    """P = encoder(E), with E (n, width) from N(0, 1).

    Args:
        embedding: the model's own embeddings.
        n: the number of virtual tokens.
        encoder: one of `ENCODERS`.
        hidden: the width of its hidden layers.
    """

    def __init__(self, embedding: nn.Embedding, n: int, encoder: str, hidden: int) -> None:
        super().__init__()
        self.prompt = nn.Parameter(start_like(embedding, n))
        width = embedding.embedding_dim
        place: dict[str, Any] = {"device": self.prompt.device, "dtype": self.prompt.dtype}
        self.lstm: nn.LSTM | None = None
        if encoder == "lstm":
            self.lstm = nn.LSTM(width, hidden, num_layers=2, bidirectional=True, batch_first=True, **place)
            widths = [2 * hidden, 2 * hidden, width]
        else:
            widths = [width, hidden, hidden, width]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after, **place), nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])

    def table(self) -> Tensor:
        embeddings = self.prompt[None] if self.lstm is None else self.lstm(self.prompt[None])[0]
        return cast(Tensor, self.mlp(embeddings)[0])


@dataclass(kw_only=True)
class PTuning(PromptMethod):
    r"""X ← [P; X] with P = encoder(E), or P in the other places that a template gives it.

    E (n, width) and the encoder are trained: W₃ ReLU(W₂ ReLU(W₁ E)) with biases, or a bidirectional LSTM of two layers
    with a layer of ReLU on it; an export holds P alone. Outputs have the input's length: see `PromptTuning`. Source:
    arXiv 2103.10385.

    Raises:
        PEFTError: with every field that breaks its rule.
    """

    encoder: str = "mlp"
    """What makes P: "mlp" or "lstm"."""
    hidden_size: int | None = None
    """Width of the encoder's hidden layers, 1 or more; None: that of the embeddings."""
    template: str = IN_FRONT
    """Where P goes: {prompt}, once or more, around {input}; several slots share the virtual tokens evenly. In a decoder
    it must end in {input}. A slot behind the input follows its last token, before any padding."""

    learning_rate: ClassVar[float] = 1e-2
    peft_defaults: ClassVar[Mapping[str, Any]] = _prompts_peft.P_TUNING

    def faults(self) -> list[str]:
        """What is wrong with the fields."""
        faults, size = super().faults(), self.hidden_size
        if self.encoder not in ENCODERS:
            near = suggestion(str(self.encoder), ENCODERS)
            faults.append(f"encoder: {self.encoder!r} is none of {', '.join(ENCODERS)}{near}")
        if size is not None and not (isinstance(size, int) and size >= 1):
            faults.append(f"hidden_size: {size} is not a width; it must be 1 or more")
        slots, n = _slots(self.template), self.num_virtual_tokens
        if slots is None:
            faults.append(
                f"template: {self.template!r} must be made of {{prompt}}, once or more, and {{input}}, once, and "
                "nothing else, as in '{prompt}{input}{prompt}'"
            )
        elif not super().faults() and n < sum(slots):
            faults.append(f"template: {self.template!r} has {sum(slots)} slots, more than num_virtual_tokens, {n}")
        return faults

    def places(self) -> Places:
        """As the template says."""
        before, behind = cast("tuple[int, int]", _slots(self.template))
        share, left = divmod(self.num_virtual_tokens, before + behind)
        first = share * before + min(left, before)  # the first slots get what is left over
        return Places(first, self.num_virtual_tokens - first)

    def prompt(self, embedding: nn.Embedding) -> PromptEmbedding:
        """Made by an encoder."""
        hidden = self.hidden_size or embedding.embedding_dim
        return EncodedPrompt(embedding, self.num_virtual_tokens, self.encoder, hidden)

    def to_peft(self, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, Any]:
        """The sizes, and which encoder made the embeddings."""
        faults = [] if self.places().behind == 0 else [f"template: HF peft has {IN_FRONT} alone, not {self.template!r}"]
        fields: dict[str, Any] = {}
        try:
            fields = super().to_peft(root, attached)
        except PEFTError as error:
            faults += error.faults
        if faults:
            raise PEFTError(faults)
        hidden = self.hidden_size or fields["token_dim"]
        return {
            **fields,
            "encoder_hidden_size": hidden,
            "encoder_reparameterization_type": self.encoder.upper(),
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], keys: Sequence[str], root: PeftRoot) -> PromptTuning:
        """Prompt tuning, which computes the same: no directory holds the encoder."""
        return PromptTuning(num_virtual_tokens=_prompts_peft.count(config, root))


def _slots(template: str) -> tuple[int, int] | None:
    """How many times {prompt} stands before and behind {input}; None where it is no template."""
    if not re.fullmatch(r"(\{prompt\})*\{input\}(\{prompt\})*", str(template)):
        return None
    before, behind = (part.count("{prompt}") for part in template.split("{input}"))
    return (before, behind) if before + behind else None
