"""What is hidden of a configuration, and what is not."""

from __future__ import annotations

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
    "value",
    [
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
