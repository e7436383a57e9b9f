"""A byte-level tokenizer as decoders have it, chat templates, and small helpers for the tests of their data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning import LightningDataModule

from lightning_peft.data.labels import IGNORED
from lightning_peft.methods.errors import PEFTError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The same text, with marks around what the assistant says."""
FORGETS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Leaves out of earlier turns what it writes into the last, as models that think do."""
WITH_BOS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Writes BOS itself, as Llama 2's does."""
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXT = [
    "the quick brown fox jumps over the lazy dog while seven wise owls watch from an old oak tree",
    "what is the capital of France? Paris. and of Spain? Madrid! ### Question: Answer: user assistant system\n\n",
    "translate these words into German, please: good morning, good night, thank you very much indeed",
]


def save_tokenizer(folder: Path, chat_template: str | None = None, adds: str = "", eos: str | None = "</s>") -> str:
    """Saves a byte-level BPE tokenizer trained on `TEXT`, which reads 512 tokens; returns the folder.

    Args:
        folder: where to.
        chat_template: its Jinja template.
        adds: what it puts around a text by itself: "", "bos" or "bos eos".
        eos: its end-of-sequence token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    tokens = [("<s>", 1), ("</s>", 2)]
    single = " ".join({"bos": "<s>", "eos": "</s>"}[word] if word != "$A" else word for word in _around(adds))
    # offsets that hold the space before a word, as many models' tokenizers give them
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=tokens),
        ]
    )
    names = {"bos_token": "<s>", "pad_token": "<pad>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, **names, **({} if eos is None else {"eos_token": eos})
    )
    fast.chat_template = chat_template
    fast.save_pretrained(str(folder))
    return str(folder)


def _around(adds: str) -> list[str]:
    words = adds.split()
    return [*(word for word in words if word == "bos"), "$A", *(word for word in words if word == "eos")]


def faults_of(data: LightningDataModule) -> list[str]:
    """What `setup` finds wrong."""
    with pytest.raises(PEFTError) as caught:
        data.setup("fit")
    return list(caught.value.faults)


def learned_text(tokenizer: Any, labels: list[int]) -> list[str]:
    """The text of each run of labels that count."""
    runs: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]
