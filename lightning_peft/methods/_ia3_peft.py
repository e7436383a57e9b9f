"""(IA)³ in HF peft's words, out and in. Checked on peft 0.21.2."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from lightning_peft.methods._host import Adapter
from lightning_peft.methods._ia3_layers import LayerScaling
from lightning_peft.methods._peft_names import target_modules
from lightning_peft.methods._peft_paths import Names, adapted_modules, exact_names, name_faults
from lightning_peft.methods._targets import is_conv1d
from lightning_peft.methods.base import PeftRoot, PeftTensor
from lightning_peft.methods.errors import PEFTError

if TYPE_CHECKING:
    from lightning_peft.methods.ia3 import IA3

T = TypeVar("T", bound="IA3")
DEFAULTS: dict[str, Any] = {
    "peft_type": "IA3",
    "target_modules": None,
    "feedforward_modules": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    # acts where the vectors are made, and those that were trained are in the file
    "init_ia3_weights": True,
}
SUFFIX = ".ia3_l"


def to_peft(method: IA3, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, Any]:
    """See `Method.to_peft`."""
    fields = target_modules(root, set(attached), method.target_modules or [], method.exclude_modules)
    on_input = {path for path, adapter in attached.items() if isinstance(adapter, LayerScaling) and adapter.on_input}
    targets = fields["target_modules"]
    for names in _candidates(on_input, method.feedforward_modules):
        # HF peft wants each name of a list to be one of the other list
        allowed = isinstance(targets, str) or isinstance(names, str) or set(names) <= set(targets)
        if allowed and _on_input(attached, names) == on_input:
            break
    return fields | {
        "feedforward_modules": sorted(names) if isinstance(names, list) else names,
        "fan_in_fan_out": any(is_conv1d(root.module.get_submodule(path)) for path in attached),
    }


def _candidates(paths: set[str], *given: Names) -> list[Names]:
    """Ways of meaning `paths`; the last, an expression, is always right."""
    last_names = sorted({path.rpartition(".")[2] for path in paths})
    return [*given, last_names, *exact_names(paths)]


def _on_input(paths: Iterable[str], names: Names) -> set[str]:
    """Of `paths` those that HF peft finds in `feedforward_modules`: by their ends, at a dot or not."""
    if isinstance(names, str):
        return {path for path in paths if re.fullmatch(names, path)}
    return {path for path in paths if path.endswith(tuple(names))}


def peft_tensors(prefix: str, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, PeftTensor]:
    """See `Method.peft_tensors`."""
    found, faults = {}, []
    for path, adapter in attached.items():
        module = root.module.get_submodule(path)
        if not isinstance(adapter, LayerScaling) or adapter.overrides or isinstance(module, nn.Conv1d):
            faults.append(f"{path}: HF peft's IA3 has no layer for a {type(module).__name__}")
            continue
        kernel = len(getattr(module, "kernel_size", ()))
        to_peft = partial(_reshaped, shape=(1, -1, *(1,) * kernel) if kernel else adapter.ia3_l.shape)
        from_peft = partial(_reshaped, shape=adapter.ia3_l.shape)
        found[f"{prefix}{path}{SUFFIX}"] = PeftTensor(adapter.ia3_l, adapter.ia3_l, to_peft, from_peft)
    if faults:
        raise PEFTError(faults)
    return found


def _reshaped(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    return tensor.reshape(*shape)


def from_peft(cls: type[T], config: Mapping[str, Any], keys: Sequence[str], root: PeftRoot) -> T:
    """See `Method.from_peft`. Names are kept as given where they mean the same here."""
    modules, faults = adapted_modules(cls.peft_prefix, SUFFIX, "an (IA)³", keys, root)
    faults += name_faults(config, "target_modules", "feedforward_modules", "exclude_modules")
    if config["feedforward_modules"] is None:
        faults.append("feedforward_modules: is missing, so that nothing says which vectors scale inputs; add it")
    if faults:
        raise PEFTError(faults)
    paths = {root.outer(path) for path in modules}
    on_input = {root.outer(path) for path in _on_input(modules, config["feedforward_modules"])}
    skip = {root.outer(path) for path in root.modules_to_save}
    exact = partial(cls, target_modules=sorted(paths), feedforward_modules=sorted(on_input))
    by_path: list[tuple[Names, Names]] = [(names, []) for names in exact_names(paths)]
    for targets, exclude in ((config["target_modules"] or [], config["exclude_modules"] or []), *by_path):
        for feedforward in _candidates(on_input, config["feedforward_modules"]):
            try:
                method = exact(target_modules=targets, feedforward_modules=feedforward, exclude_modules=exclude)
                found, scaled, wrong = method.targets(root.model, skip)
            except PEFTError:
                continue
            if not wrong and set(found) == paths and scaled == on_input:
                return method
    return exact()  # whatever is wrong is told when it is injected
