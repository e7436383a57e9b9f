"""What in a configuration looks like a token or a password, and is not told to others."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

PASSWORD_NAME = re.compile(r"passw|pwd|passphrase|secret|credential|authorization", re.IGNORECASE)
TOKEN_NAME = re.compile(r"(token|key|auth)s?$", re.IGNORECASE)
SECRET_NAME = re.compile(rf"(token|key|auth)$|{PASSWORD_NAME.pattern}", re.IGNORECASE)
"""Of a single secret of either kind; in the plural, names of numbers are like it, such as `max_new_tokens`."""
SECRET_VALUE = re.compile(r"^(hf_|sk-|gh[a-z]_|xox|wandb_v\d_)[\w-]{16,}\s*$")
"""Hidden wherever it stands."""
LONG = re.compile(r"[^ ]{16,}")
"""Hidden under the name of a token or a key: shorter texts are words, as a `pad_token` is, and so are those with
spaces in between."""
ANYTHING = re.compile(r".+", re.DOTALL)
"""Hidden under the name of a password."""
IN_ADDRESS = re.compile(r"(://[^\s/:@]*:)[^\s/]+@")
HIDDEN = "…"


def without_secrets(value: Any) -> Any:
    """`value`, in its mappings, namespaces, lists and tuples too, with `…` for what looks secret.

    That is a token that is known by how it begins; any text or number under a name such as `password`; a text of 16 or
    more characters without a space under a name that ends on token, key or auth, or their plural; and in any text the
    password of an address, such as `postgres://user:password@host`. A name stands for all that is below it.
    """
    return _shown(value, SECRET_VALUE)


def _shown(value: Any, secret: re.Pattern[str]) -> Any:
    """`value` without secrets: where it stands, a text that matches `secret` as a whole is one."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {name: _shown(item, _below(str(name), secret)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shown(item, secret) for item in value]
    if isinstance(value, str):
        return HIDDEN if secret.fullmatch(value) else IN_ADDRESS.sub(rf"\1{HIDDEN}@", value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return HIDDEN if is_number and secret is ANYTHING else value


def _below(name: str, secret: re.Pattern[str]) -> re.Pattern[str]:
    """What is a secret under `name`, beside which `secret` is one."""
    if PASSWORD_NAME.search(name):
        return ANYTHING
    return LONG if secret is SECRET_VALUE and TOKEN_NAME.search(name) else secret
