"""Virtual tokens in HF peft's words: sizes in the configuration, and one tensor. Checked on peft 0.21.2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_peft.methods._host import Adapter, own_class
from lightning_peft.methods._peft_names import GENERATING, HEADED, is_bare
from lightning_peft.methods._prompts import PromptedMask, PromptEmbedding
from lightning_peft.methods._prompts_targets import text_models
from lightning_peft.methods.base import PeftRoot, PeftTensor
from lightning_peft.methods.errors import PEFTError

SIZES: dict[str, Any] = {
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": None,
    "num_virtual_tokens": None,
    "token_dim": None,
}
PROMPT_TUNING: dict[str, Any] = {
    **SIZES,
    "peft_type": "PROMPT_TUNING",
    "prompt_tuning_init": "RANDOM",
    "prompt_tuning_init_text": None,
    "tokenizer_kwargs": None,
    "tokenizer_name_or_path": None,
}
P_TUNING: dict[str, Any] = {
    **SIZES,
    "encoder_dropout": 0.0,
    "encoder_hidden_size": None,
    "encoder_num_layers": 2,
    "encoder_reparameterization_type": "MLP",
    "peft_type": "P_TUNING",
}
INITS = {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB", "text": "TEXT"}
KEY = "prompt_embeddings"
"""(n, width); for an encoder-decoder (2n, width), of which HF peft uses the first half."""


def to_peft(root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, Any]:
    """The sizes.

    Raises:
        PEFTError: with every reason why HF peft would compute something else, or could not at all.
    """
    if faults := _faults(root, attached):
        raise PEFTError(faults)
    (prompt,) = _prompts(attached).values()
    n, width = prompt.table().shape
    config: Any = root.module.config
    return {
        "num_attention_heads": getattr(config, "num_attention_heads", None),
        "num_layers": getattr(config, "num_hidden_layers", None),
        "num_transformer_submodules": 2 if _has_decoder(attached) else 1,
        "num_virtual_tokens": n,
        "token_dim": width,
        # HF peft gives a prompt by a class of its own for each task, and to a model without a head by this one
        **({"task_type": "FEATURE_EXTRACTION"} if is_bare(root) and not _has_decoder(attached) else {}),
    }


def _faults(root: PeftRoot, attached: Mapping[str, Adapter]) -> list[str]:
    model: Any = root.module
    name, prompts = own_class(model).__name__, _prompts(attached)
    if len(prompts) != 1:
        return [f"HF peft has one prompt in a model, and {name} has {len(prompts)}"]
    if _has_decoder(attached):
        has_task = name.endswith("ForConditionalGeneration")
    else:
        has_task = name.endswith((*HEADED, *GENERATING)) or is_bare(root)
    faults = [] if has_task else [f"HF peft has no prompts for the task of a {name}"]
    heads = ("classifier", "score", "qa_outputs")
    if name.endswith(HEADED) and not any(saved.endswith(heads) for saved in root.modules_to_save):
        faults.append(f"modules_to_save: HF peft trains the head of a {name} whole; name it here too")
    if getattr(model.config, "classifier_pooling", None) == "mean" and name.endswith("ForSequenceClassification"):
        faults.append(f"HF peft's {name} takes the mean over virtual tokens too")
    return faults


def peft_tensors(root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, PeftTensor]:
    """The embeddings; those that an encoder makes can be written but not filled."""
    table = next(iter(_prompts(attached).values())).table()
    n = len(table)
    if not _has_decoder(attached):
        return {KEY: PeftTensor(table, table)}

    def doubled(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (0, 0, 0, n))

    return {KEY: PeftTensor(table, table, to_peft=doubled, from_peft=lambda tensor: tensor[:n])}


def count(config: Mapping[str, Any], root: PeftRoot) -> int:
    """The directory's number of virtual tokens.

    Raises:
        PEFTError: the model has no place for them, or several, or the directory's are for another kind of model.
    """
    texts, n = text_models(root.model), config["num_virtual_tokens"]
    submodules = config["num_transformer_submodules"]
    faults = []
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        faults.append(f"num_virtual_tokens: {n!r} is no number of them")
    if len(texts) != 1:
        listed = ", ".join(text.path or type(root.model).__name__ for text in texts)
        faults.append(f"HF peft has one prompt in a model, and there are {len(texts)} text models here: {listed}")
    if submodules not in (None, expected := 2 if texts[0].decoder is not None else 1):
        faults.append(f"num_transformer_submodules: {submodules} in the directory, and {expected} here")
    if faults:
        raise PEFTError(faults)
    return int(n)


def _prompts(attached: Mapping[str, Adapter]) -> dict[str, PromptEmbedding]:
    return {path: adapter for path, adapter in attached.items() if isinstance(adapter, PromptEmbedding)}


def _has_decoder(attached: Mapping[str, Adapter]) -> bool:
    return any(isinstance(adapter, PromptedMask) for adapter in attached.values())
