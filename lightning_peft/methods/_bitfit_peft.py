"""BitFit in HF peft's words, out and in: its BEFT keeps what was added to the bias of a Linear, as (1, out). Checked on
peft 0.21.2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_peft.methods._bitfit_layers import AddedBias, Biases, lacks_bias
from lightning_peft.methods._host import Adapter, own_tensors
from lightning_peft.methods._peft_names import target_modules
from lightning_peft.methods._peft_paths import adapted_modules, exact_names, name_faults
from lightning_peft.methods._target_modules import in_attention
from lightning_peft.methods._targets import base_modules
from lightning_peft.methods.base import PeftRoot, PeftTensor
from lightning_peft.methods.errors import PEFTError

if TYPE_CHECKING:
    from lightning_peft.methods.bitfit import BitFit

T = TypeVar("T", bound="BitFit")
DEFAULTS: dict[str, Any] = {
    "peft_type": "BEFT",
    "target_modules": None,
    # acts where the biases are made, and those that were trained are in the file
    "init_weights": True,
}
SUFFIX = ".beft_bias"


def to_peft(method: BitFit, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, Any]:
    """See `Method.to_peft`."""
    given = method.target_modules if method.target_modules and not method.exclude_modules else []
    return {"target_modules": target_modules(root, set(attached), given, [])["target_modules"]}


def peft_tensors(prefix: str, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, PeftTensor]:
    """See `Method.peft_tensors`."""
    modules = dict(base_modules(root.module))
    found, others = {}, []
    for path, adapter in attached.items():
        module = modules[path]
        if not isinstance(module, nn.Linear) or in_attention(path, modules):
            others.append(path)
        elif isinstance(adapter, (Biases, AddedBias)):
            bias = own_tensors(adapter)["bias"]
            frozen = own_tensors(module).get("bias", torch.zeros_like(bias)).detach()
            to_peft, from_peft = partial(_added, frozen=frozen), partial(_sum, frozen=frozen)
            found[f"{prefix}{path}{SUFFIX}"] = PeftTensor(bias, bias, to_peft, from_peft)
    if others:
        first = type(modules[others[0]]).__name__
        raise PEFTError(
            f"BitFit trains biases of {len(others)} modules that HF peft's BEFT has no layer for ({others[0]}, a "
            f"{first}, …): it has one for Linear alone; merge(model) and save the whole model instead"
        )
    return found


def _added(bias: Tensor, frozen: Tensor) -> Tensor:
    return (bias - frozen.to(bias)).reshape(1, -1)


def _sum(added: Tensor, frozen: Tensor) -> Tensor:
    return added.reshape(-1) + frozen.to(added)


def from_peft(cls: type[T], config: Mapping[str, Any], keys: Sequence[str], root: PeftRoot) -> T:
    """See `Method.from_peft`. Names are kept as given where they mean the same here."""
    modules, faults = adapted_modules(cls.peft_prefix, SUFFIX, "a BEFT", keys, root)
    if faults := [*faults, *name_faults(config, "target_modules")]:
        raise PEFTError(faults)
    paths = {root.outer(path) for path in modules}
    skip = {root.outer(path) for path in root.modules_to_save}
    make = partial(cls, add_missing=any(lacks_bias(root.module.get_submodule(path)) for path in modules))
    for names in (config["target_modules"], *exact_names(paths)):
        try:
            method = make(target_modules=names)
            found, wrong = method.targets(root.model, skip)
        except PEFTError:
            continue
        if names and not wrong and set(found) == paths:
            return method
    return make(target_modules=sorted(paths))  # whatever is wrong is told when it is injected
