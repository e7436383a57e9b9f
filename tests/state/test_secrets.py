"""What is hidden of a configuration, and what is not."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from lightning_peft.state.secrets import HIDDEN, without_secrets

LONG = "abcdefgh01234567"


@pytest.mark.parametrize(
    "value",
    [
        {"token": LONG},
        {"a": [{"b": ({"API_KEY": LONG},)}]},
        {"password": LONG, "wandb_key": LONG, "client_secret_id": LONG, "auth": LONG},
        {"anything": "hf_" + LONG},
        ["sk-" + LONG, "ghp_" + LONG, "wandb_v1_" + LONG],
    ],
)
def test_a_secret_is_hidden_wherever_it_stands(value: Any) -> None:
    shown = str(without_secrets(value))
    assert LONG not in shown
    assert HIDDEN in shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"password": "hunter2", "db_passwd": "correcthorse"}, {"password": HIDDEN, "db_passwd": HIDDEN}),
        ({"secret": "s3cr3t-pw", "PWD": 8675309}, {"secret": HIDDEN, "PWD": HIDDEN}),
        ({"headers": {"Authorization": "Bearer " + LONG}}, {"headers": {"Authorization": HIDDEN}}),
        ({"passphrase": "correct horse\nbattery"}, {"passphrase": HIDDEN}),
        ({"api_keys": [LONG, "short"], "tokens": (LONG,)}, {"api_keys": [HIDDEN, "short"], "tokens": [HIDDEN]}),
        ({"credentials": {"user": "me", "key": "k", "ssl": True}},
         {"credentials": {"user": HIDDEN, "key": HIDDEN, "ssl": True}}),
        (Namespace(auth=LONG, options=Namespace(secret="s")), {"auth": HIDDEN, "options": {"secret": HIDDEN}}),
        ("postgres://u:pw@host/db", f"postgres://u:{HIDDEN}@host/db"),
        (["see https://me:p@ss@host:80/a and http://:x@b"], [f"see https://me:{HIDDEN}@host:80/a and http://:{HIDDEN}@b"]),
        ("hf_" + LONG + "\n", HIDDEN),
    ],
)  # fmt: skip
def test_a_secret_s_name_hides_all_below_it_and_an_address_its_password(value: Any, shown: Any) -> None:
    assert without_secrets(value) == shown


@pytest.mark.parametrize(
    "value",
    [
        {
            "max_new_tokens": 2**60,
            "num_tokens": 128,
            "tokenizer": "org/" + LONG,
            "key_proj": LONG,
            "pad_token": "[PAD]",
        },
        {"password": None, "has_secret": False, "secrets": [], "address": "https://host:8080/path@v1", "mail": "a:b@c"},
        {"pad_token": "<pad>", "eos_token": "<|end_of_text|>", "key": "short", "token": None, "max_tokens": 128},
        {"label_key": "the name of a column", "path": "/data/" + LONG, "model": "org/sk-" + LONG},
        {"numbers": [1, 2.5, None, True], "nested": {"method": {"r": 8, "target_modules": ["query", "key"]}}},
        "hf_short",
    ],
)
def test_what_is_none_stays_as_it_is(value: Any) -> None:
    assert without_secrets(value) == value


def test_what_is_given_is_not_changed() -> None:
    given = {"token": LONG, "list": [{"key": LONG}]}
    without_secrets(given)
    assert given == {"token": LONG, "list": [{"key": LONG}]}
