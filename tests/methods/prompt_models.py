"""Models with virtual tokens in their input, and the same computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import PromptTuning, inject
from lightning_peft.injection import adapters
from lightning_peft.methods._prompts import FreePrompt
from tests.methods.prefix_models import SEQ2SEQ, build

N = 5
both_implementations = pytest.mark.parametrize("implementation", ["sdpa", "eager"])


def prompted(name: str, implementation: str = "sdpa", n: int = N) -> nn.Module:
    torch.manual_seed(2)
    return inject(build(name, implementation), PromptTuning(num_virtual_tokens=n, init="random"))


def exact(name: str, implementation: str) -> tuple[nn.Module, float]:
    """In float64 with a tolerance for it, or in fp32 where attention is, and masks what lies beyond its numbers."""
    model = prompted(name, implementation)
    return (model.double(), 1e-10) if implementation == "sdpa" else (model, 2e-5)


def prompt_of(model: nn.Module, adapter_name: str = "default") -> Tensor:
    (prompt,) = (found for found in adapters(model, adapter_name).values() if isinstance(found, FreePrompt))
    return prompt.prompt.detach()


def logits(model: nn.Module, **given: Any) -> Tensor:
    return model(**given).logits


def by_hand(name: str, prompt: Tensor, ids: Tensor, **more: Any) -> Tensor:
    """What the bare model makes of the prompt and the ids of some rows alike in length, at the tokens."""
    model = build(name).to(prompt.dtype)
    words = model.get_input_embeddings()(ids)
    both = torch.cat([prompt.expand(len(ids), -1, -1), words], dim=1)
    output = logits(model, inputs_embeds=both, **more)
    return output if name in SEQ2SEQ else output[:, len(prompt) :]
