"""The tensors of LoRA and DoRA under HF peft's keys and in its layouts, and the layers on which it computes something
else from them. Checked on peft 0.21.2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_peft.methods import _lora_layers as layers
from lightning_peft.methods._host import Adapter, own_class, own_tensors
from lightning_peft.methods._target_modules import CONVS
from lightning_peft.methods._targets import base_modules
from lightning_peft.methods.base import PeftRoot, PeftTensor
from lightning_peft.methods.errors import PEFTError

MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
OUTPUT_LAYER = "HF peft 0.21 applies an update of an attention's output layer twice"


class Part(NamedTuple):
    name: str
    """The module's or parameter's path, by which HF peft finds its rank and alpha."""
    key: str
    """What comes before `.lora_A` in HF peft's keys."""
    layer: layers.LowRank


def parts_of(root: PeftRoot, attached: Mapping[str, Adapter]) -> Iterator[Part]:
    for path, adapter in attached.items():
        module = root.module.get_submodule(path)
        owner = attention_of(root, path)
        if isinstance(adapter, layers.LowRank):
            yield Part(path, path, adapter)
        elif owner is not None:
            yield Part(owner, f"{owner}.base_layer.out_proj", _weight(adapter, "weight"))
        elif isinstance(module, nn.MultiheadAttention):
            yield from (Part(path, path, _weight(adapter, name)) for name in adapter.overrides)
        else:
            # HF peft wraps the module once for each parameter, in the order of the parameters
            names = [name for name in own_tensors(module) if name in adapter.overrides]
            for depth, name in enumerate(reversed(names)):
                yield Part(f"{path}.{name}", path + ".base_layer" * depth, _weight(adapter, name))


def _weight(adapter: Adapter, name: str) -> layers.LowRank:
    return cast(layers.LowRank, adapter.get_submodule(name))


def attention_of(root: PeftRoot, path: str) -> str | None:
    """The path of the attention whose output layer has `path`; None for any other module."""
    owner = path.rpartition(".")[0]
    module = root.module.get_submodule(owner) if path else None
    return owner if isinstance(module, nn.MultiheadAttention) else None


def peft_tensors(prefix: str, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, PeftTensor]:
    """See `Method.peft_tensors`."""
    if faults := _layer_faults(root, attached):
        raise PEFTError(faults)
    parts = list(parts_of(root, attached))
    found = {f"{part.key}.{name}": tensor for part in parts for name, tensor in _tensors(part.layer).items()}
    for path in attached:
        attention = root.module.get_submodule(path)
        if isinstance(attention, nn.MultiheadAttention):
            # HF peft adapts the output layer whenever it adapts an attention, with the same rank
            r = len(found[f"{path}.lora_A.weight"].value)
            nothing = {"lora_A": torch.zeros(r, attention.embed_dim), "lora_B": torch.zeros(attention.embed_dim, r)}
            for name, zeros in nothing.items():
                key = f"{path}.base_layer.out_proj.{name}.weight"
                known = found.get(key, PeftTensor(zeros, zeros))
                found[key] = known._replace(value=zeros, from_peft=_zero if name == "lora_B" else _any)
    return {prefix + key: tensor for key, tensor in found.items()}


def _tensors(layer: layers.LowRank) -> dict[str, PeftTensor]:
    """By what comes after the module's path in HF peft's keys."""
    A, B = layer.factors()
    ours = {"lora_A": (layer.lora_A, A), "lora_B": (layer.lora_B, B)}
    if isinstance(layer, layers.EmbeddingLoRA):
        found = {name.replace("_", "_embedding_"): PeftTensor(*pair) for name, pair in ours.items()}
    else:
        found = {f"{name}.weight": PeftTensor(*pair) for name, pair in ours.items()}
    if A.dim() == 3 and isinstance(layer, layers.WeightLoRA):
        # A (rank · experts, in) expert by expert; B (out, rank · experts) with the experts innermost
        experts = len(A)
        found["lora_A.weight"] = found["lora_A.weight"]._replace(
            to_peft=lambda A: A.flatten(0, 1), from_peft=lambda A: A.reshape(experts, -1, A.shape[1])
        )
        found["lora_B.weight"] = found["lora_B.weight"]._replace(
            to_peft=lambda B: B.permute(1, 2, 0).flatten(1),
            from_peft=lambda B: B.reshape(len(B), -1, experts).permute(2, 0, 1),
        )
    if isinstance(layer, layers.ConvLoRA) and layer.groups > 1:
        found["lora_A.weight"] = found["lora_A.weight"]._replace(
            to_peft=partial(_all_inputs, groups=layer.groups), from_peft=partial(_own_inputs, groups=layer.groups)
        )
    magnitude = layer._parameters.get("lora_magnitude_vector")
    if magnitude is not None:
        ones = (1,) * (B.dim() - 2) if isinstance(layer, layers.ConvLoRA) else ()
        shape = (1, -1, *ones) if ones else (-1,)
        found["lora_magnitude_vector"] = PeftTensor(
            magnitude, magnitude, to_peft=lambda m: m.reshape(shape), from_peft=lambda m: m.flatten()
        )
    return found


def _all_inputs(A: Tensor, groups: int) -> Tensor:
    """A (r, in / groups, *kernel) in the shape of a convolution without groups (r, in, *kernel), as HF peft has it."""
    r, features, *kernel = A.shape
    full = A.new_zeros(groups, r // groups, groups, features, *kernel)
    for group, block in enumerate(A.chunk(groups)):
        full[group, :, group] = block
    return full.reshape(r, groups * features, *kernel)


def _own_inputs(A: Tensor, groups: int) -> Tensor:
    own = torch.cat([rows.chunk(groups, 1)[group] for group, rows in enumerate(A.chunk(groups))])
    if not torch.equal(_all_inputs(own, groups), A):
        raise PEFTError("its A mixes the inputs of the layer's groups, which LoRA here keeps apart")
    return own


def _zero(B: Tensor) -> Tensor:
    if B.any():
        raise PEFTError(OUTPUT_LAYER)
    return B


def _any(A: Tensor) -> Tensor:
    return A


def _layer_faults(root: PeftRoot, attached: Mapping[str, Adapter]) -> list[str]:
    """Where HF peft would compute something else from the same tensors, by module."""
    names: dict[int, list[str]] = {}
    for path, module in base_modules(root.module):
        names.setdefault(id(module), []).append(path)
    faults = []
    for path, adapter in attached.items():
        module = root.module.get_submodule(path)
        others = [name for name in names[id(module)] if name != path]
        if others:
            reason = f"is the same module as {', '.join(others)}, and HF peft would adapt it under one of the names"
            faults.append(f"{path}: {reason}")
        faults += [f"{path or type(module).__name__}: {reason}" for reason in _reasons(root, path, module, adapter)]
        if attention_of(root, path) is not None and attention_of(root, path) not in attached:
            faults.append(f"{path}: HF peft adapts an attention's output layer with its attention only; target both")
    return faults


def _reasons(root: PeftRoot, path: str, module: nn.Module, adapter: Adapter) -> Iterator[str]:
    has_magnitude = any("lora_magnitude_vector" in part._parameters for part in adapter.modules())
    if not path:
        yield "is the whole model, and HF peft adapts modules inside of one"
    if isinstance(module, CONVS):
        if own_class(module) not in CONVS:
            yield f"HF peft would make A and B as {own_class(module).__name__} too, with whatever its forward does"
        if any(step != 1 for step in module.dilation):
            yield f"HF peft ignores its dilation {module.dilation}"
        if module.padding_mode != "zeros":
            yield f"HF peft ignores its padding_mode {module.padding_mode!r}"
        if module.groups > 1 and has_magnitude:
            yield f"HF peft mixes its {module.groups} groups in the norm of DoRA"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        yield f"HF peft bounds rows and update apart by its max_norm {module.max_norm}"
    if isinstance(adapter, layers.WeightsLoRA) and has_magnitude:
        yield "HF peft has no DoRA for attention's and for single weights"
    if isinstance(module, nn.MultiheadAttention) and "in_proj_weight" not in adapter.overrides:
        yield "HF peft adapts an attention only where query, key and value have one size"
    if attention_of(root, path) is not None and _weight(adapter, "weight").delta().any():
        yield f"{OUTPUT_LAYER}; leave it out (exclude_modules: [{path.rpartition('.')[2]}]), or merge(model)"
    model_type = getattr(getattr(root.module, "config", None), "model_type", None)
    if model_type in MAMBA and path.rpartition(".")[2] in ("out_proj", "conv1d"):
        yield f"HF peft refuses it in a {model_type}"
