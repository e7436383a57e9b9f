"""Which tensors of a model are an adapter's, which are its base's, and whether a set of tensors fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_peft.injection import adapter_names, records
from lightning_peft.methods._host import Host
from lightning_peft.methods._quantized import PackedWeight, packed
from lightning_peft.methods._sharded import gathered, is_sharded
from lightning_peft.methods._targets import base_modules, inside
from lightning_peft.methods.errors import some, suggestion
from lightning_peft.state.fingerprint import Fingerprint, Sampled, fingerprint, kept_sample


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The adapter's tensors by their key in `model.state_dict()`, as references: parameters and persistent buffers."""
    return {
        key: tensor
        for path, module in base_modules(model)
        if isinstance(module, Host) and adapter_name in module.adapters
        for key, tensor in module.adapters[adapter_name]
        .state_dict(prefix=_key(path, f"adapters.{adapter_name}."))
        .items()
    }


def base_parameters(model: nn.Module) -> dict[str, Tensor | PackedWeight | Sampled]:
    """The base's parameters by name, all adapters left out; a tied one has its first name only.

    Of one that was sharded as it was loaded, what was kept for a fingerprint; of another that is sharded, what one
    takes, for which it is gathered: every process has to ask for it.
    """
    seen: dict[int, str] = {}
    found: dict[str, Tensor | PackedWeight | Sampled] = {}
    for path, module in base_modules(model):
        originals = module.merged_from if isinstance(module, Host) else {}
        for name, parameter in module._parameters.items():
            if parameter is not None and seen.setdefault(id(parameter), key := _key(path, name)) == key:
                original = originals.get(name, parameter)
                taken = kept_sample(module, name) or packed(module, name, original)
                found[key] = taken or (Sampled.of(gathered(original)) if is_sharded(original) else original)
    return found


def base_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The base's persistent buffers by name, all adapters left out."""
    return {
        _key(path, name): buffer
        for path, module in base_modules(model)
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def base_keys(model: nn.Module) -> set[str]:
    """The keys of `model.state_dict()` that belong to the base; modules' extra state is among them."""
    ours = {key for name in adapter_names(model) for key in adapter_tensors(model, name)}
    return set(model.state_dict()) - ours


def base_quantization(model: nn.Module) -> str:
    """How weights of the base are packed, such as `nf4-dq`, or several of these; empty where none is."""
    kinds = {found.kind for _, module in base_modules(model) if (found := packed(module)) is not None}
    return ", ".join(sorted(kinds))


def base_fingerprint(model: nn.Module, adapter_name: str) -> Fingerprint:
    """The identity of `model`'s base; originals of modules that are trained whole count by name and shape alone.

    Such a module, a new head say, is in the adapter's file, and its original may have been made at random.
    """
    whole = records(model)[adapter_name].saved_modules
    return fingerprint(
        {
            name: parameter.detach().to("meta") if inside(name, whole) and isinstance(parameter, Tensor) else parameter
            for name, parameter in base_parameters(model).items()
        }
    )


def tensor_faults(
    expected: Mapping[str, Tensor], given: Mapping[str, object], known: Sequence[str] | set[str]
) -> list[str]:
    """What of `given` doesn't fit the adapter's tensors `expected`; empty where all do.

    Args:
        expected: the adapter's tensors on the model, by key.
        given: what a checkpoint holds, by key.
        known: other keys that `given` may hold.
    """
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected and key not in known]
    misshapen = [
        f"{key} is {tuple(value.shape)} in the checkpoint and {tuple(tensor.shape)} here"
        for key, tensor in expected.items()
        if isinstance(value := given.get(key), Tensor) and value.shape != tensor.shape
    ]
    no_tensors = [
        f"{key} holds a {type(given[key]).__name__}"
        for key in expected
        if not isinstance(given.get(key, expected[key]), Tensor)
    ]
    return [
        *_shown("missing from the checkpoint", missing, ""),
        *_shown("not of this model", unexpected, suggestion(unexpected[0], missing) if unexpected else ""),
        *_shown("of another shape", misshapen, ""),
        *_shown("no tensor", no_tensors, ""),
    ]


def _shown(what: str, items: list[str], hint: str) -> list[str]:
    return [f"{len(items)} {what}: {some(items)}{hint}"] if items else []


def _key(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
