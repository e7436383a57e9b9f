"""What a checkpoint says of its adapter beside the tensors: the method, its fields, and the base it was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning_peft.methods import METHODS
from lightning_peft.methods.base import Method
from lightning_peft.methods.errors import PEFTError, suggestion
from lightning_peft.state.fingerprint import Fingerprint, differences
from lightning_peft.state.versions import installed

KEY = "peft"
"""Where a checkpoint holds its spec."""
FORMAT = 1

Spec = dict[str, Any]


def make_spec(
    method: Method,
    adapter_name: str,
    modules_to_save: list[str],
    base: Fingerprint,
    *,
    quantization: Mapping[str, Any] | None = None,
    base_dtype: str | None = None,
    stored: str = "",
) -> Spec:
    """The spec of one adapter, in plain types that `torch.load(weights_only=True)` takes.

    Args:
        method: the method.
        adapter_name: the name under which the adapter stands.
        modules_to_save: what is trained whole.
        base: the identity of the base, as it is stored now.
        quantization: how the callback quantized the base, by field; None where it did not.
        base_dtype: the dtype that the callback cast the base to; None where it did not.
        stored: how the base's weights are quantized, whoever did it, such as `nf4-dq`; empty where none is.
    """
    return {
        "format": FORMAT,
        "version": installed("lightning-peft"),
        "method": {"name": type(method).__name__, "fields": method.fields()},
        "adapter_name": adapter_name,
        "modules_to_save": modules_to_save,
        "base": base,
        "quantization": None if quantization is None else dict(quantization),
        "base_dtype": base_dtype,
        "stored": stored,
    }


def spec_of(checkpoint: Mapping[str, Any], source: str) -> Spec:
    """The spec that `checkpoint` holds.

    Raises:
        PEFTError: it has none, or one of a newer format.
    """
    spec = checkpoint.get(KEY)
    if not isinstance(spec, dict) or "method" not in spec:
        raise PEFTError(
            f"{source}: holds no adapter. To start from the weights of a whole model, load them first "
            "(MyModule.load_from_checkpoint) and fit without ckpt_path; ckpt_path resumes a run with adapters"
        )
    if spec.get("format", 0) > FORMAT:
        raise PEFTError(
            f"{source}: was written by lightning-peft {spec.get('version')}; update lightning-peft to load it"
        )
    return spec


def method_of(spec: Spec) -> Method:
    """The method that `spec` describes.

    Raises:
        PEFTError: the method or a field is unknown here, or a value breaks its rule.
    """
    return _made(spec["method"], spec.get("version"))


def _made(described: Mapping[str, Any], own_version: Any) -> Method:
    """The method of that name with those fields; the methods that it is made of come first."""
    name = described["name"]
    known = {**{cls.__name__: cls for cls in _subclasses(Method)}, **METHODS}
    if name not in known:
        raise PEFTError(
            f"method {name!r} is not known here{suggestion(name, known)}; import the module that defines it first"
        )
    fields = {
        field: [_made(part, own_version) for part in value] if _are_methods(value) else value
        for field, value in described["fields"].items()
    }
    try:
        return known[name](**fields)
    except TypeError as error:
        raise PEFTError(f"method {name}: {error}; the checkpoint is of lightning-peft {own_version}") from error


def spec_faults(ours: Spec, theirs: Spec, allow_other_base: bool) -> list[str]:
    """Why a checkpoint with the spec `theirs` can't be loaded into a run with `ours`; empty where it can.

    Fields that only steer training, and those that say where adapters go, may differ: the tensors' names tell the
    latter.
    """
    faults = _method_faults(ours["method"], theirs["method"])
    if ours["adapter_name"] != theirs["adapter_name"]:
        faults.append(
            f"the checkpoint's adapter_name is {theirs['adapter_name']!r}, this run's {ours['adapter_name']!r}"
        )
    other = differences(ours["base"], theirs["base"])
    if other and not allow_other_base:
        why, mend = _loaded_otherwise(ours, theirs)
        faults.append(
            f"the base is not the one that the adapter was trained on (other {' and other '.join(other)}){why}; "
            f"{mend or 'load that base'}, or pass allow_other_base=True if you mean it"
        )
    return faults


def _loaded_otherwise(ours: Spec, theirs: Spec) -> tuple[str, str]:
    """What of two bases differs by the way in which they were loaded, and what to do; both empty where nothing does.

    A checkpoint from before bases could be quantized says nothing of it.
    """
    own, its = ours.get("stored", ""), theirs.get("stored", "")
    asked: Mapping[str, Any] = theirs.get("quantization") or {}
    if own != its:
        why = f"it was {f'quantized to {its}' if its else 'not quantized'} there and is {own or 'not quantized'} here"
        # where a module quantizes its base by itself, the callback has nothing to be told
        if its:
            return f": {why}", f"pass quantization={its!r}" if asked else f"load it as {its}"
        return f": {why}", "leave quantization out" if ours.get("quantization") else "load it in full precision"
    mine: Mapping[str, Any] = ours.get("quantization") or {}
    fields = [
        f"quantization's {name} was {value!r} there and is {mine[name]!r} here"
        for name, value in asked.items()
        if name in mine and mine[name] != value
    ]
    dtype, own_dtype = theirs.get("base_dtype"), ours.get("base_dtype")
    if dtype != own_dtype:
        fields.append(f"base_dtype was {dtype!r} there and is {own_dtype!r} here")
    return (f": {' and '.join(fields)}", "load it as it was there") if fields else ("", "")


def _method_faults(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What of two methods differs that tensors depend on."""
    if ours["name"] != theirs["name"]:
        return [f"the checkpoint's method is {theirs['name']}, this run's is {ours['name']}"]
    free = METHODS[ours["name"]].training_only if ours["name"] in METHODS else frozenset[str]()
    faults = []
    for name, value in theirs["fields"].items():
        own = ours["fields"].get(name)
        if name in free or own == value:
            continue
        if not (_are_methods(own) and _are_methods(value)):
            faults.append(f"{ours['name']}.{name} is {value!r} in the checkpoint and {own!r} here")
        elif len(own) != len(value):
            names = [", ".join(part["name"] for part in parts) for parts in (value, own)]
            faults.append(f"{ours['name']}.{name} are {names[0]} in the checkpoint and {names[1]} here")
        else:
            faults += [fault for pair in zip(own, value, strict=True) for fault in _method_faults(*pair)]
    return faults


def _are_methods(value: Any) -> bool:
    """Whether a field's value is the list of methods that a method is made of."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, Mapping) and set(part) == {"name", "fields"} for part in value)
    )


def _subclasses(cls: type[Method]) -> Iterator[type[Method]]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)
