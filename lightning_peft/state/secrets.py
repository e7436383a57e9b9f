"""What in a configuration looks like a token or a password, and is not told to others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

SECRET_NAME = re.compile(r"(token|key|auth)$|secret|passw|pwd|credential", re.IGNORECASE)
SECRET_VALUE = re.compile(r"^(hf_|sk-|gh[a-z]_|xox|wandb_v\d_)[\w-]{16,}$")
HIDDEN = "…"
LONG = 16
"""Characters from which a value under such a name is hidden: shorter ones are words, as a `pad_token` is."""


def without_secrets(value: Any) -> Any:
    """`value`, in its mappings, lists and tuples too, with `…` for each text that looks secret by itself or, at 16 or
    more characters without a space, by its name."""
    if isinstance(value, Mapping):
        return {
            name: HIDDEN if _is_long(item) and SECRET_NAME.search(str(name)) else without_secrets(item)
            for name, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    return HIDDEN if isinstance(value, str) and SECRET_VALUE.match(value) else value


def _is_long(value: Any) -> bool:
    return isinstance(value, str) and len(value) >= LONG and " " not in value
