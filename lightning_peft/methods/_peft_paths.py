"""What methods with one tensor for a module have in common when they read or write HF peft's files: paths in keys, and
names that mean just those paths."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_peft.methods._targets import base_modules, pattern_faults
from lightning_peft.methods.base import PeftRoot
from lightning_peft.methods.errors import suggestion

Names = str | list[str]


def adapted_modules(
    prefix: str, suffix: str, what: str, keys: Sequence[str], root: PeftRoot
) -> tuple[list[str], list[str]]:
    """The paths in the root of the modules in `keys`, each `prefix`, path and `suffix`, and what is wrong with keys.

    Args:
        what: the method's name with an article, for the messages.
    """
    known = dict(base_modules(root.module))
    found, faults = [], []
    for key in keys:
        path = key.removeprefix(prefix).removesuffix(suffix)
        if not (key.startswith(prefix) and key.endswith(suffix)):
            faults.append(f"{key} is no key of {what} adapter")
        elif path not in known:
            faults.append(f"{key}: {type(root.module).__name__} has no module {path!r}{suggestion(path, known)}")
        else:
            found.append(path)
    if not keys:
        faults.append("the directory holds no tensor of an adapter")
    return found, faults


def name_faults(config: Mapping[str, Any], *fields: str) -> list[str]:
    """What is wrong with those `fields` of an `adapter_config.json` that hold names, or None."""
    faults = []
    for field in fields:
        value = config[field]
        if isinstance(value, str):
            faults += pattern_faults(field, value)
        elif value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            faults.append(f"{field}: {value!r} is neither a string nor a list of strings")
    return faults


def exact_names(paths: set[str]) -> list[Names]:
    """Names for `paths`, which may mean other modules too, and last an expression, which means no others."""
    in_order = sorted(paths)
    return [in_order, "|".join(map(re.escape, in_order))]
