"""Configurations of HF peft as plain mappings: what is wrong with one, and what of it says more than the defaults."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from lightning_peft.methods.errors import PEFTError, suggestion

COMMON = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "modules_to_save",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)
"""Fields of every configuration that say nothing of the method."""
REFUSED = {
    "modules_to_save": "trains modules in peft's way; name them in the callback's modules_to_save, or inject's",
    "trainable_token_indices": "trains rows of an embedding beside the method; leave it out",
    "layer_replication": "adds layers to the model; leave it out",
}
ELSEWHERE = {
    "POLY": "needs the tasks of a batch in the model's forward",
    "TRAINABLE_TOKENS": "runs by the class of the layer that it holds, and its layers hold none here",
    "XLORA": "runs the model twice, with several adapters",
}
"""Types that need more than layers."""

WHAT_PEFT_RAISES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    re.error,
)
"""For a configuration that it does not check, whatever its values lead to."""


def checked_peft() -> None:
    """See whether peft is there.

    Raises:
        PEFTError: it is not.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise PEFTError(
            "HFPeft needs the package peft, which is not installed; pip install 'lightning-peft[peft]'"
        ) from error


@cache
def config_classes() -> dict[str, Any]:
    """peft's configuration classes by their peft_type."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    return {kind.value: cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def own_method(config: Mapping[str, Any]) -> str | None:
    """The name of this package's own method for such a configuration."""
    from lightning_peft.methods import METHODS

    known = {name: cls for name, cls in METHODS.items() if not isinstance(cls.peft_defaults, AnyFields)}
    return next((name for name, cls in known.items() if cls.reads_peft(config)), None)


def config_faults(config: object) -> list[str]:
    """What is wrong with a configuration, whichever model it is for."""
    if not isinstance(config, Mapping):
        return [f"config: {config!r} is neither a configuration of peft nor a mapping of its fields"]
    classes, kind = config_classes(), config.get("peft_type")
    if not isinstance(kind, str) or kind not in classes:
        return [f"config: peft_type {kind!r} is none of {', '.join(sorted(classes))}{suggestion(str(kind), classes)}"]
    if own := own_method(config):
        return [f"config: peft_type {kind!r} is a method of this package; use {own}"]
    if kind in ELSEWHERE:
        return [f"config: peft_type {kind!r} {ELSEWHERE[kind]}"]
    names = {field.name for field in dataclasses.fields(classes[kind])}
    faults = [
        f"config: {classes[kind].__name__} has no field {name!r}{suggestion(name, names)}"
        for name in config
        if name not in names
    ]
    faults += [f"config: {name} {reason}" for name, reason in REFUSED.items() if config.get(name)]
    if config.get("bias", "none") != "none":
        faults.append(
            f"config: bias {config['bias']!r} trains the base's biases in place; use Hybrid with BitFit instead"
        )
    if faults:
        return faults
    try:
        made = made_config(config)
    except WHAT_PEFT_RAISES as error:
        return [f"config: {' '.join(str(error).split())}"]
    if made.is_prompt_learning or made.is_adaption_prompt:
        return [f"config: peft_type {kind!r} puts no layers around modules, and so can't stand on them"]
    return []


def made_config(config: Mapping[str, Any]) -> Any:
    """A new configuration of peft, which a model may complete."""
    fields = {name: value for name, value in config.items() if name not in COMMON and name != "peft_type"}
    return config_classes()[config["peft_type"]](**fields)


def defaults(kind: str) -> dict[str, Any]:
    """The fields of a peft_type with their defaults, in plain types; those that all types have left out."""
    found = {}
    for field in dataclasses.fields(config_classes()[kind]):
        if field.name not in COMMON:
            factory = field.default_factory
            value = field.default if factory is dataclasses.MISSING else factory()
            found[field.name] = None if value is dataclasses.MISSING else plain(value)
    return found | {"peft_type": kind}


def concise(config: Mapping[str, Any]) -> dict[str, Any]:
    """The peft_type, and the fields that differ from its defaults, in plain types."""
    known = defaults(config["peft_type"])
    fields = {name: plain(value) for name, value in config.items() if name not in COMMON}
    return {"peft_type": config["peft_type"]} | {name: v for name, v in fields.items() if v != known.get(name)}


def plain(value: Any) -> Any:
    """The value in types that JSON has; a set becomes a sorted list."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(map(plain, value))
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return value


class AnyFields(Mapping[str, Any]):
    """The fields that an `adapter_config.json` of any type may have, None for what its own type has for a default."""

    def __getitem__(self, name: str) -> Any:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    @staticmethod
    @cache
    def _all() -> dict[str, Any]:
        found = {"peft_type": "any other that the package peft has"}
        try:
            checked_peft()
        except PEFTError:
            return found
        names = {name for kind in config_classes() for name in defaults(kind)}
        return dict.fromkeys(sorted(names)) | found
