"""Put a method's adapters onto a model, freeze everything else, switch between adapters, and take them off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

from torch import nn

from lightning_peft.methods._host import (
    Adapter,
    FrozenStatistics,
    SlowPath,
    Swapped,
    hosts,
    own_tensors,
    put,
    refusal,
    swap,
)
from lightning_peft.methods._quantized import drop_error, is_quantized
from lightning_peft.methods._saved_copy import SavedCopy, saved_copies
from lightning_peft.methods._sharded import ON_ONE, is_sharded, refuse_sharded
from lightning_peft.methods._split import split_faults
from lightning_peft.methods._targets import base_modules, find
from lightning_peft.methods.base import Attachment, Method
from lightning_peft.methods.errors import PEFTError, suggestion
from lightning_peft.quantization.convert import guard

M = TypeVar("M", bound=nn.Module)
RECORDS = "_peft_records"


@dataclass(frozen=True)
class Record:
    """What `inject` did to a model: kept on the model's root, by adapter name."""

    method: Method
    modules_to_save: tuple[str, ...]
    saved_modules: tuple[str, ...]
    """Paths of the modules that `modules_to_save` means."""
    trainable_before: tuple[str, ...]
    """Names of the base's parameters that required a gradient before."""


def records(model: nn.Module) -> dict[str, Record]:
    """What was injected into `model`, by adapter name; empty where nothing was."""
    return cast("dict[str, Record]", vars(model).get(RECORDS, {}))


def inject(model: M, method: Method, *, adapter_name: str = "default", modules_to_save: Sequence[str] = ()) -> M:
    """Attach `method`'s adapters to `model` in place, and freeze all else.

    The base keeps its modules, names, values and dtypes. A normalization layer with running statistics is kept in eval
    mode, unless it is in `modules_to_save`. Layers that bitsandbytes has packed are guarded first, see
    `lightning_peft.quantization.guard`.

    Args:
        model: any module, on any device, meta included.
        method: what to attach.
        adapter_name: several adapters can stand on one model; the one injected last is active and trains.
        modules_to_save: names or path endings of modules to train whole, such as a new classification head. Each is
            trained in a copy, its original is kept beside it.

    Returns:
        The same object.

    Raises:
        PEFTError: with every fault of names and targets; the model is then as it was.
    """
    guard(model)
    saved, faults = saved_modules(model, modules_to_save)
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
        faults.append(
            f"adapter_name: {adapter_name!r} can't be one: it must be without dots, and no attribute of ModuleDict"
        )
    elif adapter_name in adapter_names(model):
        faults.append(
            f"adapter_name: the model has an adapter {adapter_name!r}; choose another name, or remove(model) first"
        )
    attachments: Sequence[Attachment] = []
    try:
        attachments = method.attachments(model, saved)
    except PEFTError as error:
        faults += error.faults
    whole = _whole_modules(saved)
    targets = {path: module for path, module, _ in attachments}
    both = {id(module) for module in whole.values()} & {id(module) for module in targets.values()}
    faults += [
        f"target_modules: {path} is trained whole too, under another name in modules_to_save; leave one of them"
        for path, module in targets.items()
        if id(module) in both
    ]
    faults += [f"{path}: {reason}" for path, module in {**targets, **whole}.items() if (reason := refusal(module))]
    faults += [
        f"modules_to_save: {path} is quantized, and can't be trained whole; name it in skip_modules of the quantization"
        for path, module in whole.items()
        if is_quantized(module)
    ]
    faults += split_faults(type(method).__name__, attachments)
    faults += [
        f"modules_to_save: {path} is split by tensor parallelism, and can't be trained whole; leave it out of the plan"
        for path, module in whole.items()
        if any(is_sharded(tensor) for tensor in own_tensors(module).values())
    ]
    if faults:
        raise PEFTError(list(dict.fromkeys(faults)))
    for path, module in base_modules(model):
        if any(isinstance(parameter, nn.UninitializedParameter) for parameter in module.parameters(recurse=False)):
            # torch can't freeze it either
            raise PEFTError(f"{path}: {type(module).__name__} has no shape yet; run one batch through the model first")

    before = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    earlier = records(model)
    for attachment in attachments:
        put(attachment.module, adapter_name, attachment.adapter)
    for path, copy in saved_copies(whole).items():
        put(whole[path], adapter_name, copy)
    for _, module in base_modules(model):
        drop_error(module)
        if has_statistics(module) and not isinstance(module, FrozenStatistics):
            swap(module, FrozenStatistics)
            module.train(module.training)
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)) and any(True for _ in hosts(module)):
            swap(module, SlowPath)
    record = Record(
        method,
        tuple(modules_to_save),
        tuple(saved),
        next((record.trainable_before for record in earlier.values()), before),
    )
    vars(model)[RECORDS] = {**earlier, adapter_name: record}
    model.requires_grad_(False)
    set_adapter(model, adapter_name)
    return model


def remove(model: M) -> M:
    """Take every adapter off `model`: its classes, keys, values and trainable parameters are those from before
    `inject`.

    Returns:
        The same object; one without adapters is left as it is.

    Raises:
        PEFTError: the base is sharded.
    """
    refuse_sharded(model, "remove", ON_ONE)
    injected = [(module, taken) for module in model.modules() if (taken := records(module))]
    for module in list(model.modules()):
        if isinstance(module, Swapped):
            module.take_off()
    # a module inside of another that was injected later comes after it, and has the last word on its parameters
    for module, taken in injected:
        from_before = {name for record in taken.values() for name in record.trainable_before}
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in from_before)
        del vars(module)[RECORDS]
    return model


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters that stand on `model`, in the order of their first module."""
    return list(dict.fromkeys(name for _, host in hosts(model) for name in host.adapters))


def adapters(model: nn.Module, adapter_name: str) -> dict[str, Adapter]:
    """The adapters of that name, by the path of the module that each stands on."""
    return {
        path: cast(Adapter, host.adapters[adapter_name]) for path, host in hosts(model) if adapter_name in host.adapters
    }


def method_adapters(model: nn.Module, adapter_name: str) -> dict[str, Adapter]:
    """Those of `adapters` that the method made: without the copies of modules that are trained whole."""
    return {path: adapter for path, adapter in adapters(model, adapter_name).items() if type(adapter) is not SavedCopy}


def set_adapter(model: nn.Module, name: str) -> None:
    """Make `name` the adapter that the model runs through and trains; others are frozen.

    Raises:
        PEFTError: the model has no adapter of that name.
    """
    known = adapter_names(model)
    if name not in known:
        raise PEFTError(f"adapter {name!r}: the model has {', '.join(known) or 'none'}{suggestion(name, known)}")
    _refuse_merged(model, "set_adapter")
    for _, host in hosts(model):
        host.active_adapter = name
        for other, adapter in host.adapters.items():
            for parameter in adapter.parameters():
                parameter.requires_grad_(other == name and parameter.is_floating_point())
    _refresh_statistics(model)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Run `model` as its base, bit for bit, inside of the `with`: without adapters, trained heads or trained biases.

    Raises:
        PEFTError: an adapter is merged into the weights; unmerge it first.
    """
    _refuse_merged(model, "disable_adapters")
    before = [(host, host.active_adapter) for _, host in hosts(model)]
    try:
        for host, _ in before:
            host.active_adapter = None
        # the frozen statistics must not move while their trained copy is out of use
        _refresh_statistics(model)
        yield
    finally:
        for host, active in before:
            host.active_adapter = active
        _refresh_statistics(model)


@contextmanager
def adapter_per_row(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Run row i of a batch through adapter `names[i]` inside of the `with`; None is the bare base.

    Every adapted module must be given its rows in the first dimension, one for each name.

    Raises:
        PEFTError: a name that the model doesn't have; while running, a first dimension of another size.
    """
    known = adapter_names(model)
    wrong = sorted({name for name in names if name is not None and name not in known})
    if wrong:
        raise PEFTError(
            [f"adapter {name!r}: the model has {', '.join(known)}{suggestion(name, known)}" for name in wrong]
        )
    _refuse_merged(model, "adapter_per_row")
    before = [(host, host.row_adapters) for _, host in hosts(model)]
    try:
        for host, _ in before:
            host.row_adapters = tuple(names)
        yield
    finally:
        for host, rows in before:
            host.row_adapters = rows


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name; a shared one comes once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def has_statistics(module: nn.Module) -> bool:
    """Whether it is a normalization layer that moves running statistics as it trains."""
    return bool(getattr(module, "track_running_stats", False)) and getattr(module, "running_mean", None) is not None


def saved_modules(model: nn.Module, names: Sequence[str]) -> tuple[dict[str, nn.Module], list[str]]:
    """The modules that `modules_to_save=names` means, by path, and what is wrong with the names."""
    if isinstance(names, str):
        return {}, [f"modules_to_save: {names!r} is a string; give a list, [{names!r}]"]
    found, faults = find(
        "modules_to_save",
        list(names),
        dict(base_modules(model)),
        lambda module: any(True for _ in module.parameters()),
        exclude=[],
        skip=(),
        describe=lambda module: f"a {type(module).__name__} without parameters",
    )
    return found, faults


def _refuse_merged(model: nn.Module, what: str) -> None:
    if any(host.merged_from for _, host in hosts(model)):
        raise PEFTError(f"{what}: the adapter is merged into the weights; call unmerge(model) first")


def _refresh_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FrozenStatistics):
            module.refresh()


def _whole_modules(roots: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules in `roots` and below, by path; one that has several names comes once."""
    found = {path: module for root, module in roots.items() for path, module in base_modules(module, root)}
    first = {id(module): path for path, module in reversed(found.items())}
    return {path: module for path, module in found.items() if first[id(module)] == path}
