"""A prefix in HF peft's words: sizes in the configuration, and one tensor for all layers. Checked on peft 0.21.2."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch

from lightning_peft.methods._host import Adapter, own_class
from lightning_peft.methods._peft_names import GENERATING, HEADED, is_bare
from lightning_peft.methods._prefix import PrefixAdapter, is_attention, key_shape
from lightning_peft.methods._prefix_targets import PositionShift
from lightning_peft.methods._targets import base_modules
from lightning_peft.methods.base import PeftRoot, PeftTensor
from lightning_peft.methods.errors import PEFTError

DEFAULTS: dict[str, Any] = {
    "encoder_hidden_size": None,
    "init_weights": None,
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": None,
    "num_virtual_tokens": None,
    "peft_type": "PREFIX_TUNING",
    "prefix_projection": False,
    "token_dim": None,
}
KEY = "prompt_embeddings"
"""(n, 2 · layers · width): keys and values of the first layer, then of the second."""


def to_peft(root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, Any]:
    """The sizes of the prefix.

    Raises:
        PEFTError: with every reason why HF peft would compute something else, or could not at all.
    """
    prefixes = _prefixes(attached)
    shape = next(iter(prefixes.values())).shape
    if faults := _faults(root, attached):
        raise PEFTError(faults)
    return {
        "num_attention_heads": shape.heads,
        "num_layers": len(prefixes),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": next(iter(prefixes.values())).num_virtual_tokens,
        "token_dim": shape.heads * shape.key_width,
        # HF peft gives a prefix by a class of its own for each task, and to a model without a head by this one
        **({"task_type": "FEATURE_EXTRACTION"} if is_bare(root) else {}),
    }


def _faults(root: PeftRoot, attached: Mapping[str, Adapter]) -> list[str]:
    model: Any = root.module
    name = own_class(model).__name__
    prefixes = _prefixes(attached)
    bare = sorted(path for path, module in base_modules(model) if is_attention(module) and path not in prefixes)
    shapes = {adapter.shape for adapter in prefixes.values()}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return [f"HF peft gives an encoder-decoder's prefix to its decoder alone; {name} has one in every attention"]
    faults = []
    if bare:
        faults.append(f"target_modules: HF peft gives every layer a prefix, and here {bare[0]} has none")
    if len(shapes) > 1 or any(shape.key_width != shape.value_width for shape in shapes):
        faults.append("HF peft needs keys and values of one shape in all layers; these have several")
    layers = [getattr(model.get_submodule(path), "layer_idx", None) for path in prefixes]
    if layers != list(range(getattr(model.config, "num_hidden_layers", -1))):
        faults.append(f"HF peft counts all layers, and not every layer of {name} has just one attention")
    if not any(isinstance(adapter, PositionShift) for adapter in attached.values()):
        faults.append(f"HF peft counts positions from behind the prefix, and those of {name} are none that can be")
    if "past_key_values" not in inspect.signature(getattr(model, "base_model", model).forward).parameters:
        faults.append(f"HF peft hands over a prefix as a cache, and {name} takes none")
    if name.endswith(HEADED):
        heads = ("classifier", "score", "qa_outputs")
        if not any(saved.endswith(heads) for saved in root.modules_to_save):
            faults.append(f"modules_to_save: HF peft trains the head of a {name} whole; name it here too")
    elif not name.endswith(GENERATING) and not is_bare(root):
        faults.append(f"HF peft has no prefix tuning for the task of a {name}")
    return faults


def _prefixes(attached: Mapping[str, Adapter]) -> dict[str, PrefixAdapter]:
    return {path: adapter for path, adapter in attached.items() if isinstance(adapter, PrefixAdapter)}


def peft_tensors(attached: Mapping[str, Adapter]) -> dict[str, PeftTensor]:
    """The prefixes of all layers in one tensor; those that an MLP makes can be written but not filled."""
    tables = [table for adapter in _prefixes(attached).values() for table in adapter.tables()]
    flat = torch.cat([table.detach().to(tables[0].device) for table in tables], dim=1)
    return {KEY: PeftTensor(flat, flat, parts=tuple(tables))}


def target_modules(config: Mapping[str, Any], root: PeftRoot) -> str | None:
    """The attention of HF peft's layers; None where that is all there is in the model.

    Raises:
        PEFTError: with every size of the directory's that the model has otherwise.
    """
    inner = {path: module for path, module in base_modules(root.module) if is_attention(module)}
    model: Any = root.module
    if config["num_transformer_submodules"] not in (None, 1) or getattr(model.config, "is_encoder_decoder", False):
        raise PEFTError("num_transformer_submodules: HF peft gives an encoder-decoder's prefix to its decoder alone")
    shapes = [key_shape(module) for module in inner.values()]
    widths = {shape.heads * shape.key_width for shape in shapes}
    counts = {shape.heads for shape in shapes}
    expected: dict[str, set[int]] = {"num_layers": {len(inner)}, "token_dim": widths, "num_attention_heads": counts}
    faults = [
        f"{name}: {config[name]} in the directory, and {', '.join(map(str, sorted(sizes)))} here"
        for name, sizes in expected.items()
        if sizes != {config[name]}
    ]
    if faults:
        raise PEFTError(faults)
    outer = {path for path, module in base_modules(root.model) if is_attention(module)}
    ours = {root.outer(path) for path in inner}
    return None if ours == outer else "|".join(re.escape(path) for path in sorted(ours))
