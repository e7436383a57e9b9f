"""AdaLoRA in HF peft's words, out and in. Checked on peft 0.21.2."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lightning_peft.methods._adalora_layers import TRAINED, LinearSVD, schedule
from lightning_peft.methods._host import Adapter
from lightning_peft.methods._lora_peft import DEFAULTS as LORA_DEFAULTS
from lightning_peft.methods._peft_names import target_modules
from lightning_peft.methods._peft_paths import Names, adapted_modules, exact_names, name_faults
from lightning_peft.methods._targets import base_modules, is_conv1d
from lightning_peft.methods.base import PeftRoot, PeftTensor
from lightning_peft.methods.errors import PEFTError, suggestion

if TYPE_CHECKING:
    from lightning_peft.methods.adalora import AdaLoRA

T = TypeVar("T", bound="AdaLoRA")
DEFAULTS: dict[str, Any] = {
    **LORA_DEFAULTS,
    "peft_type": "ADALORA",
    "init_r": 12,
    "target_r": 8,
    "tinit": 0,
    "tfinal": 0,
    "deltaT": 1,
    "beta1": 0.85,
    "beta2": 0.85,
    "orth_reg_weight": 0.5,
    "total_step": None,
    "rank_pattern": None,
}
UNSUPPORTED = {
    "bias": "biases of the base were trained, and AdaLoRA here trains none",
    "trainable_token_indices": "single rows of an embedding were trained, and AdaLoRA here trains none",
    "layer_replication": "layers of the base are repeated",
    "target_parameters": "AdaLoRA here has no adapter for parameters that belong to no layer",
}
WORDS = {
    "init_r": "init_r",
    "target_r": "target_r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "delta_t": "deltaT",
    "beta1": "beta1",
    "beta2": "beta2",
}
"""HF peft's names for our fields."""
WHOLE = ("init_r", "target_r", "deltaT")
PATTERN_KEY = re.compile(r"(base_model\.model\.)?(?P<path>.+)\.lora_E(\.[^.]+)?")


def to_peft(method: AdaLoRA, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, Any]:
    """See `Method.to_peft`."""
    layers = _layers(root, attached)
    kept = {path: layer.kept() for path, layer in layers.items()}
    pruned = any(not bool(mask.all()) for mask in kept.values())
    # HF peft has no regularizer of squares: what a weight of ours would be there can't be said, except for none
    weight = DEFAULTS["orth_reg_weight"] if method.orth_reg_weight else 0.0
    # nor is there a length of training that the Trainer decides, and it refuses to load a directory without one
    steps = {"tinit": 0, "tfinal": 0, "total_step": 1}
    if method.total_steps is not None:
        tinit, last = schedule(method.tinit, method.tfinal, method.total_steps)
        steps = {"tinit": tinit, "tfinal": method.total_steps - last, "total_step": method.total_steps}
    return {
        **{theirs: getattr(method, ours) for ours, theirs in WORDS.items()},
        **steps,
        "orth_reg_weight": weight,
        "rank_pattern": {f"{path}.lora_E": mask.tolist() for path, mask in kept.items()} if pruned else None,
        "fan_in_fan_out": any(is_conv1d(root.module.get_submodule(path)) for path in attached),
        **target_modules(root, set(attached), method.target_modules, method.exclude_modules),
    }


def peft_tensors(prefix: str, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, PeftTensor]:
    """See `Method.peft_tensors`; HF peft's files lack the pruned rows of A and E, and columns of B."""
    found = {}
    for path, layer in _layers(root, attached).items():
        kept = layer.kept()
        for name in TRAINED:
            tensor, dim = layer.get_parameter(name), 1 if name == "lora_B" else 0
            plain = PeftTensor(tensor, tensor)
            if not bool(kept.all()):
                index = kept.nonzero().squeeze(1)
                plain = PeftTensor(
                    tensor, tensor, partial(torch.index_select, dim=dim, index=index), partial(_put, tensor, dim, index)
                )
            found[f"{prefix}{path}.{name}"] = plain
    return found


def _put(tensor: Tensor, dim: int, index: Tensor, given: Tensor) -> Tensor:
    """`tensor` with the kept rows or columns replaced."""
    return tensor.detach().index_copy(dim, index, given.to(tensor))


def _layers(root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, LinearSVD]:
    names: dict[int, list[str]] = {}
    for path, module in base_modules(root.module):
        names.setdefault(id(module), []).append(path)
    found, faults = {}, []
    for path, adapter in attached.items():
        module = root.module.get_submodule(path)
        if others := [name for name in names[id(module)] if name != path]:
            reason = f"is the same module as {', '.join(others)}, and HF peft would adapt it under one of the names"
            faults.append(f"{path}: {reason}")
        if isinstance(adapter, LinearSVD):
            found[path] = adapter
        else:
            faults.append(f"{path}: HF peft's AdaLoRA has no layer for a {type(module).__name__}")
    if faults:
        raise PEFTError(faults)
    return found


def from_peft(cls: type[T], config: Mapping[str, Any], keys: Sequence[str], root: PeftRoot) -> T:
    """See `Method.from_peft`. The steps of the training that is over are left to the next one."""
    as_one = dict.fromkeys(re.sub(r"\.lora_[AEB]$", ".lora_E", key) for key in keys)
    modules, faults = adapted_modules(cls.peft_prefix, ".lora_E", "an AdaLoRA", list(as_one), root)
    faults += name_faults(config, "target_modules", "exclude_modules") + _value_faults(config)
    if faults:
        raise PEFTError(faults)
    kept, faults = _kept(config, modules)
    if faults:
        raise PEFTError(faults)
    fields = {ours: config[theirs] for ours, theirs in WORDS.items()}
    fields["target_r"] = min(fields["target_r"], fields["init_r"])
    fields["alpha"] = fields["alpha"] if fields["alpha"] > 0 else fields["init_r"]
    if not config["orth_reg_weight"]:
        fields["orth_reg_weight"] = 0.0
    method = _aimed(cls, fields, config, root, {root.outer(path) for path in modules})
    method.kept_at_start = {root.outer(path): mask for path, mask in kept.items()}
    return method


def _aimed(cls: type[T], fields: Mapping[str, Any], config: Mapping[str, Any], root: PeftRoot, paths: set[str]) -> T:
    skip = {root.outer(path) for path in root.modules_to_save}
    exact = partial(cls, **fields, target_modules=sorted(paths))
    by_path: list[tuple[Names, Names]] = [(names, []) for names in exact_names(paths)]
    for targets, exclude in ((config["target_modules"] or [], config["exclude_modules"] or []), *by_path):
        try:
            method = exact(target_modules=targets, exclude_modules=exclude)
            found, wrong = method.targets(root.model, skip)
        except PEFTError:
            continue
        if not wrong and set(found) == paths:
            return method
    return exact()  # whatever is wrong is told when it is injected


def _kept(config: Mapping[str, Any], modules: Sequence[str]) -> tuple[dict[str, list[bool]], list[str]]:
    """Which ranks the tensors in the directory are, by module, and what is wrong with rank_pattern."""
    found, faults = {}, []
    for key, mask in (config["rank_pattern"] or {}).items():
        match = PATTERN_KEY.fullmatch(key)
        path = match["path"] if match else key
        if path not in modules:
            faults.append(f"rank_pattern: {key!r} is no module of the directory's tensors{suggestion(path, modules)}")
        elif not isinstance(mask, list) or len(mask) != config["init_r"] or not all(isinstance(k, bool) for k in mask):
            faults.append(f"rank_pattern: {key!r} has no list of {config['init_r']} booleans, one for each rank")
        else:
            found[path] = mask
    return found, faults


def _value_faults(config: Mapping[str, Any]) -> list[str]:
    faults = [
        f"{name}: {config[name]!r} can't be honoured: {reason}"
        for name, reason in UNSUPPORTED.items()
        if config[name] != DEFAULTS[name] and (config[name] or DEFAULTS[name])
    ]
    for name in (*WORDS.values(), "orth_reg_weight"):
        kinds = (int,) if name in WHOLE else (int, float)
        if isinstance(config[name], bool) or not isinstance(config[name], kinds):
            faults.append(f"{name}: {config[name]!r} is no {kinds[0].__name__}")
    if not isinstance(config["rank_pattern"] or {}, dict):
        faults.append(f"rank_pattern: {config['rank_pattern']!r} has no masks by module")
    return faults
