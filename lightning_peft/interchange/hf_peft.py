"""HF peft's adapter directories, out and in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_peft.injection import Record, adapter_names, adapters, inject, records
from lightning_peft.interchange.hf_peft_files import fetched, folder_faults, read_config, read_tensors, write
from lightning_peft.interchange.hf_peft_heads import (
    HEADS,
    base_tensors,
    names_to_save,
    outermost,
    saved_tensors,
    task_type,
    trained_whole,
)
from lightning_peft.interchange.roots import peft_root
from lightning_peft.methods import METHODS
from lightning_peft.methods._host import Adapter, hosts, own_class
from lightning_peft.methods._saved_copy import SavedCopy
from lightning_peft.methods._targets import base_modules, inside, matches
from lightning_peft.methods.base import Method, PeftRoot, PeftTensor
from lightning_peft.methods.errors import PEFTError, suggestion
from lightning_peft.state import tensor_faults

M = TypeVar("M", bound=nn.Module)
PEFT_VERSION = "0.21.2"
"""The release whose format is written."""
COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "modules_to_save": None,
    "peft_version": PEFT_VERSION,
    "revision": None,
    "task_type": None,
}
"""What every configuration has beside its method's fields."""


def export_adapter(
    model: nn.Module, folder: str | Path, *, adapter_name: str | None = None, base_model: str | None = None
) -> Path:
    """Write an adapter as a directory that HF peft loads, with the same outputs.

    Names and keys are relative to the transformers model inside of `model`; see `interchange.roots.peft_root`. A start
    that was taken from the weights (PiSSA, OLoRA) becomes a LoRA of twice the rank over the unchanged base.

    Args:
        model: the model that the adapter was injected into, such as a LightningModule.
        folder: made where it is missing; an adapter that is in it is overwritten.
        adapter_name: which adapter; by default the one named "default", or the only one.
        base_model: the hub id or folder from which HF peft shall load the base; by default where transformers had it
            from.

    Returns:
        The folder.

    Raises:
        PEFTError: with every reason why the adapter can't be written: it does not exist, it is merged, HF peft can't
            express it, the folder holds something else. Nothing is written then.
    """
    place = Path(folder).expanduser()
    name, holder, record = _record(model, adapter_name)
    faults = folder_faults(place)
    if any(host.merged_from for _, host in hosts(model)):
        faults.append("the adapter is merged into the weights; call unmerge(model) first")
    root = PeftRoot(model, peft_root(model)[0])
    saved = outermost(root.inner(f"{holder}.{path}" if holder else path) for path in record.saved_modules)
    attached = _attached(root, adapters(model, name))
    method, fields, tensors = record.method, dict[str, Any](), dict[str, PeftTensor]()
    try:
        root = PeftRoot(model, root.path, names_to_save(root.module, saved, record.modules_to_save))
    except PEFTError as error:
        faults += error.faults
    try:
        fields = method.to_peft(root, attached)
    except PEFTError as error:
        faults += error.faults
    try:
        tensors = method.peft_tensors(root, attached) if method.peft_defaults else {}
    except PEFTError as error:
        faults += error.faults
    if faults:
        raise PEFTError([f"export_adapter: {fault}" for fault in dict.fromkeys(faults)])
    task = task_type(root.module, saved, root.modules_to_save, attached)
    cls = own_class(root.module)
    config = {
        **COMMON,
        "auto_mapping": None if task else {"base_model_class": cls.__name__, "parent_library": cls.__module__},
        "base_model_name_or_path": base_model or _name_or_path(root.module),
        "modules_to_save": list(root.modules_to_save) or None,
        "task_type": task,
        **method.peft_defaults,
        **fields,
    }
    whole = saved_tensors(root.module, sorted(saved), name)
    values = {key: tensor.to_peft(tensor.value.detach()) for key, tensor in tensors.items()}
    write(place, config, values | {method.peft_prefix + key: tensor for key, tensor in whole.items()})
    return place


def import_adapter(model: M, source: str | Path, *, adapter_name: str = "default", revision: str | None = None) -> M:
    """Stand the adapter of an HF PEFT directory on `model`, in place; it is active and trains, in fp32.

    Args:
        model: the base that the adapter was trained on, or a LightningModule around it; that it is the same one is not
            checked.
        source: the directory, or the id of a repository on the hub.
        adapter_name: the name that it gets here.
        revision: of the repository on the hub.

    Returns:
        The same object.

    Raises:
        PEFTError: with all that is wrong with the directory, can't be honoured here or does not fit the model, which
            is then as it was. No file is read in a way that could run code.
    """
    folder = fetched(source, revision)
    stored = read_config(folder)
    cls = _method_class(stored, folder)
    config = _complete(stored, cls, folder)
    path, inner = peft_root(model)
    base = {cls.peft_prefix + key: tensor for key, tensor in base_tensors(inner).items()}
    tensors = {_plain(key, base): tensor for key, tensor in read_tensors(folder).items()}
    saved, faults = _saved_modules(inner, config, tensors, base, cls.peft_prefix)
    root = PeftRoot(model, path, tuple(sorted(saved)))
    whole = {key: tensor for key, tensor in base.items() if inside(key.removeprefix(cls.peft_prefix), saved)}
    rest = {key: tensor for key, tensor in tensors.items() if key not in whole and _base_key(key) not in base}
    faults += tensor_faults(whole, {key: tensor for key, tensor in tensors.items() if key in whole}, ())
    try:
        given = config["modules_to_save"]
        names = _names_to_save(root, given if isinstance(given, list) else ())
        method = cls.from_peft(config, list(rest), root)
        # first onto adapters that stand on nothing yet, so that a fault leaves the model as it was
        made = method.attachments(model, {root.outer(name) for name in saved})
        faults += _load(method, root, {attachment.path: attachment.adapter for attachment in made}, rest)
    except PEFTError as error:
        faults += error.faults
    if faults:
        raise PEFTError([f"{folder}: {fault}" for fault in dict.fromkeys(faults)])
    inject(model, method, adapter_name=adapter_name, modules_to_save=names)
    _load(method, root, adapters(model, adapter_name), rest)
    for key, tensor in saved_tensors(inner, sorted(saved), adapter_name).items():
        tensor.copy_(tensors[cls.peft_prefix + key])
    return model


def _record(model: nn.Module, adapter_name: str | None) -> tuple[str, str, Record]:
    """The adapter's name, the path of the module that it was injected into, and what was injected."""
    names = adapter_names(model)
    name = adapter_name or ("default" if "default" in names else next(iter(names), "default"))
    if name not in names or (adapter_name is None and name != "default" and len(names) > 1):
        hint = suggestion(name, names) if adapter_name else "; say which by adapter_name" * bool(names)
        raise PEFTError(f"export_adapter: adapter {name!r}: the model has {', '.join(names) or 'none'}{hint}")
    found = [(path, known[name]) for path, module in base_modules(model) if name in (known := records(module))]
    if len(found) != 1:
        where = f"into {', '.join(path or 'the model' for path, _ in found)}; export one after the other"
        reason = where if found else "into a module around this one; export that"
        raise PEFTError(f"export_adapter: adapter {name!r}: it was injected {reason}")
    return name, *found[0]


def _attached(root: PeftRoot, standing: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """The method's own adapters by path in the root."""
    return {root.inner(path): adapter for path, adapter in standing.items() if not isinstance(adapter, SavedCopy)}


def _name_or_path(root: nn.Module) -> str | None:
    return getattr(getattr(root, "config", None), "_name_or_path", None) or None


def _method_class(config: Mapping[str, Any], folder: Path) -> type[Method]:
    found = next((cls for cls in METHODS.values() if cls.reads_peft(config)), None)
    if found is None:
        known = sorted({cls.peft_defaults["peft_type"] for cls in METHODS.values() if cls.peft_defaults})
        peft_type = config["peft_type"]
        hint = suggestion(peft_type, known)
        raise PEFTError(f"{folder}: peft_type {peft_type!r} has no method here{hint}; there are {', '.join(known)}")
    return found


def _complete(stored: Mapping[str, Any], cls: type[Method], folder: Path) -> dict[str, Any]:
    """All fields, with HF peft's default where an older release wrote none."""
    defaults = {**COMMON, **cls.peft_defaults}
    if unknown := sorted(set(stored) - set(defaults) - {"runtime_config"}):
        rank_zero_warn(f"import_adapter: {folder}: unknown fields are passed over: {', '.join(unknown)}")
    return {name: default if stored.get(name) is None else stored[name] for name, default in defaults.items()}


def _plain(key: str, base: Mapping[str, Tensor]) -> str:
    """The key without what releases before 0.4 left in it: the adapter's name, and the wrapper of a module trained
    whole."""
    if key in base:
        return key
    return re.sub(r"\.default(?=(\.weight|\.bias)?$)", "", re.sub(r"\.modules_to_save(\.default)?(?=\.)", "", key))


def _base_key(key: str) -> str:
    return key.replace(".base_layer.", ".")


def _saved_modules(
    root: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], prefix: str
) -> tuple[set[str], list[str]]:
    """Paths of the modules that the directory has whole, and what is wrong with them.

    HF peft stores embeddings too where it takes them for resized; those that differ from the base's are trained here.
    """
    given = config["modules_to_save"] or []
    if not isinstance(given, list) or not all(isinstance(name, str) and name for name in given):
        return set(), [f"modules_to_save: {given!r} is no list of names"]
    saved = trained_whole(root, (*given, *HEADS.get(str(config["task_type"]), ())))
    faults = []
    for key, tensor in tensors.items():
        ours, path = base.get(_base_key(key)), _base_key(key).removeprefix(prefix)
        if ours is None or inside(path, saved):
            continue
        if ours.shape != tensor.shape:
            faults.append(
                f"{key} is {tuple(tensor.shape)} in the directory and {tuple(ours.shape)} here; resize the base first"
            )
        elif torch.equal(tensor.to(ours), ours):
            continue
        elif ".base_layer." in key:
            faults.append(f"{key} differs from the base's, and an adapter stands on it; load it into the base first")
        else:
            saved.add(path.rpartition(".")[0])
            rank_zero_warn(f"import_adapter: {key} differs from the base's; its module is trained whole here")
    return outermost(saved), faults


def _names_to_save(root: PeftRoot, given: Sequence[str]) -> list[str]:
    """Names that mean the root's `modules_to_save` for `inject`: the given ones, or paths."""
    paths = {root.outer(path) for path in root.modules_to_save}
    known = [path for path, _ in base_modules(root.model) if path]
    used = [name for name in given if any(matches(path, [name]) for path in known)]
    for names in (used, sorted(paths)):
        if {path for path in known if matches(path, names)} == paths:
            return names
    raise PEFTError(f"modules_to_save: other modules have the names {', '.join(sorted(paths))} too")


@torch.no_grad()
def _load(method: Method, root: PeftRoot, standing: Mapping[str, Adapter], tensors: Mapping[str, Tensor]) -> list[str]:
    """Fill the adapters from HF peft's tensors, and tell what of them does not fit."""
    ours = method.peft_tensors(root, _attached(root, standing))
    faults = tensor_faults({key: tensor.to_peft(tensor.tensor) for key, tensor in ours.items()}, tensors, ())
    if faults:
        return faults
    for key, tensor in ours.items():
        try:
            tensor.fill(tensors[key])
        except PEFTError as error:
            faults += [f"{key}: {fault}" for fault in error.faults]
    return faults
