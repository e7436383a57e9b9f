"""Which modules HF peft finds by names and patterns, and the names by which it finds just those that are wanted.
Checked on peft 0.21.2."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_peft.methods._targets import ALL_LINEAR, base_modules, matches, pattern_value
from lightning_peft.methods.base import PeftRoot
from lightning_peft.methods.errors import PEFTError

FUSED_EXPERTS = {
    "mixtral": {"gate", "w1", "w2", "w3"},
    "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"},
}
"""Names of layers that peft takes for those of experts, by the family that transformers counts a model to."""
HEADED = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
"""How transformers' classes end whose head HF peft trains whole beside a prompt or prefix."""
GENERATING = ("ForCausalLM", "LMHeadModel")
Ranks = dict[str, tuple[int, float]]
"""Rank and alpha by name."""


def is_bare(root: PeftRoot) -> bool:
    """Whether it is a transformers model without a head."""
    return getattr(root.module, "base_model", None) is root.module


def patterns(
    default: tuple[int, float], given: Mapping[str, int], given_alpha: Mapping[str, float], ranks: Ranks
) -> dict[str, Any]:
    """`rank_pattern` and `alpha_pattern` that give every name its `ranks`: the given ones, or one entry for a name."""
    fits = all(
        pattern_value(given, name, default[0]) == r
        and math.isclose(pattern_value(given_alpha, name, default[1]), alpha, rel_tol=1e-6)
        for name, (r, alpha) in ranks.items()
    )
    used = all(any(pattern_value({key: True}, name, False) for name in ranks) for key in (*given, *given_alpha))
    if fits and used:
        return {"rank_pattern": dict(given), "alpha_pattern": dict(given_alpha)}
    exact = {name: f"^{re.escape(name)}$" for name in ranks}
    return {
        "rank_pattern": {exact[name]: r for name, (r, _) in ranks.items() if r != default[0]},
        "alpha_pattern": {
            exact[name]: alpha
            for name, (_, alpha) in ranks.items()
            if not math.isclose(alpha, default[1], rel_tol=1e-6)
        },
    }


def target_modules(
    root: PeftRoot, wanted: set[str], given: str | list[str], exclude: str | list[str]
) -> dict[str, Any]:
    """`target_modules` and `exclude_modules` by which HF peft finds just the modules `wanted`: the given ones, the
    modules' own names, or their paths.

    Raises:
        PEFTError: there are no such.
    """
    names = _peft_names(root.module)
    fused = _fused_experts(root.module)
    if misread := sorted(path for path in wanted if path.rpartition(".")[2] in fused):
        raise PEFTError(f"{misread[0]}: HF peft takes a layer of this name in this model for one of its fused experts")
    paths = sorted(wanted)
    candidates: list[tuple[str | list[str], str | list[str]]] = [
        ([] if given == ALL_LINEAR else given, exclude),
        (sorted({path.rpartition(".")[2] for path in paths}), []),
        (paths, []),
        ("|".join(map(re.escape, paths)), []),
    ]
    for targets, excluded in candidates:
        # in a model with fused experts HF peft reads an expression for its last names only
        if isinstance(targets, str) and fused:
            continue
        if peft_targets(names, targets, excluded, root.modules_to_save) == wanted:
            listed = sorted(targets) if isinstance(targets, list) else targets
            return {"target_modules": listed, "exclude_modules": (excluded and _sorted(excluded)) or None}
    raise PEFTError(
        f"target_modules: HF peft finds no names for just the adapted modules ({', '.join(paths[:3])}, …) beside "
        f"modules_to_save {list(root.modules_to_save)}"
    )


def _sorted(names: str | list[str]) -> str | list[str]:
    return names if isinstance(names, str) else sorted(names)


def _peft_names(root: nn.Module) -> list[str]:
    """Paths as HF peft walks them: each module once."""
    first: dict[int, str] = {}
    for path, module in base_modules(root):
        first.setdefault(id(module), path)
    return [path for path in first.values() if path]


def peft_targets(
    names: Iterable[str], targets: str | list[str], exclude: str | list[str], modules_to_save: Sequence[str]
) -> set[str]:
    """The names that HF peft finds."""
    saved = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in modules_to_save]
    return {
        name
        for name in names
        if matches(name, targets) and not (exclude and matches(name, exclude)) and not any(s.match(name) for s in saved)
    }


def _fused_experts(root: nn.Module) -> set[str]:
    """Names of layers that HF peft takes for experts that transformers 4 had, in a model in which they are fused."""
    model_type = getattr(getattr(root, "config", None), "model_type", None)
    if model_type is None:
        return set()
    try:
        # peft asks this table too, and there is no public one; checked on transformers 5.23
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN
    except ImportError:
        return set()
    families = {**_MODEL_TO_CONVERSION_PATTERN, "mixtral": "mixtral"}
    return FUSED_EXPERTS.get(families.get(model_type, ""), set())
