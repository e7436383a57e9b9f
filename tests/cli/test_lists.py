"""Verbs that run nothing: help, version, methods, env."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version

import pytest
import torch

from lightning_peft.cli import LISTS
from lightning_peft.cli.classes import parameters
from lightning_peft.methods import METHODS

from .conftest import Command


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_help_names_every_verb_with_a_line(command: Command, words: tuple[str, ...]) -> None:
    code, out, err = command(*words)
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("  ")}
    assert list(lines)[:9] == ["fit", "validate", "test", "predict", "inspect", "plan", "compare", "methods", "env"]
    assert lines["inspect"] == "show what would be trained, module by module, without training"


def test_version(command: Command) -> None:
    assert command("--version") == (0, f"lightning-peft {version('lightning-peft')}\n", "")


def test_methods_lists_each_with_its_fields_and_defaults(command: Command) -> None:
    code, out, _ = command("methods")
    assert code == 0
    for name, cls in METHODS.items():
        assert f"\n{name}  " in "\n" + out
        assert all(f"{field.name}=" in out for field in dataclasses.fields(cls))  # type: ignore[arg-type]
    assert "    r=8, alpha=16" in out
    assert "target_modules='all-linear'" in out


def test_methods_tells_all_about_one_inherited_fields_included(command: Command) -> None:
    code, out, _ = command("methods", "DoRA")
    assert code == 0
    words = " ".join(out.replace("│", " ").split())
    for field in dataclasses.fields(METHODS["DoRA"]):  # type: ignore[arg-type]
        assert f" {field.name} " in words
    assert "r int 8 Rank of the update, 1 or more." in words


@pytest.mark.parametrize("name", METHODS)
def test_the_command_line_checks_the_types_of_every_method_s_fields(name: str) -> None:
    hints = [str(parameter.hint) for parameter in parameters(METHODS[name]).values()]
    assert hints
    assert not any("Unvalidated" in hint for hint in hints)


def test_methods_names_the_nearest(command: Command) -> None:
    code, out, err = command("methods", "LORA", "DRoA")
    assert (code, out) == (2, "")
    assert err == (
        "lightning-peft: 2 faults\n"
        "  there is no method 'LORA'; did you mean 'LoRA'?\n"
        "  there is no method 'DRoA'; did you mean 'DoRA' or 'LoRA'?\n"
    )


def test_env_shows_versions_cores_and_memory(command: Command) -> None:
    code, out, _ = command("env")
    assert code == 0
    rows = dict(line.strip().split(maxsplit=1) for line in out.splitlines() if line.strip())
    assert rows["torch"] == torch.__version__
    assert rows["lightning"] == version("lightning")
    assert int(rows["cores"].split()[0]) >= 1
    assert rows["memory"].endswith("GB")


def test_env_takes_no_arguments(command: Command) -> None:
    for verb, flag in (("env", "--help"), ("methods", "-h")):
        assert command(verb, flag) == (0, f"usage: lightning-peft {verb}\n\n{LISTS[verb]}\n", "")
    assert command("env", "x") == (2, "", "lightning-peft: env takes no arguments, not 'x'\n")
