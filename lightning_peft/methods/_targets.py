"""Which modules of a model a pattern means, with the meaning that HF peft gives it, and what to say when it means
none."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from torch import nn

from lightning_peft.methods._host import Host
from lightning_peft.methods.errors import some, suggestion

ALL_LINEAR = "all-linear"
V = TypeVar("V")


def base_modules(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`(path, module)` of `model` and all that is in it, adapters left out; a module with two names comes twice."""
    yield path, model
    for name, child in model._modules.items():
        if child is not None and not (isinstance(model, Host) and name == "adapters"):
            yield from base_modules(child, f"{path}.{name}" if path else name)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a Linear whose weight is stored as (in, out); asked without importing it."""
    return any((c.__module__, c.__name__) == ("transformers.pytorch_utils", "Conv1D") for c in type(module).__mro__)


def is_transformers_model(module: nn.Module) -> bool:
    """Whether it is a transformers PreTrainedModel; asked without importing transformers."""
    return any(
        (c.__module__, c.__name__) == ("transformers.modeling_utils", "PreTrainedModel") for c in type(module).__mro__
    )


def matches(path: str, patterns: str | Sequence[str]) -> bool:
    """Whether `path` is meant: a string is a regular expression for the whole path, a list has names or path
    endings."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, path) is not None
    return any(path == pattern or path.endswith(f".{pattern}") for pattern in patterns)


def pattern_value(patterns: Mapping[str, V], path: str, default: V) -> V:
    """The value of the first key that is a name, or a regular expression, of the end of `path`; else `default`."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def inside(path: str, skip: Container[str]) -> bool:
    """Whether `path` is one of `skip` or lies below one."""
    parts = path.split(".")
    return any(".".join(parts[:end]) in skip for end in range(1, len(parts) + 1))


def pattern_faults(field: str, patterns: str | Iterable[str]) -> list[str]:
    """What is wrong with the regular expressions in `patterns`, whichever modules there are."""
    faults = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError) as error:
            faults.append(f"{field}: {pattern!r} is not a regular expression ({error})")
    return faults


def expression_faults(fields: Mapping[str, object]) -> list[str]:
    """What is wrong with those of the named fields that are a string, and so a regular expression."""
    return [
        fault for name, pattern in fields.items() if isinstance(pattern, str) for fault in pattern_faults(name, pattern)
    ]


def output_heads(model: nn.Module) -> set[str]:
    """Paths below which a transformers model has its output head: what "all-linear" leaves alone."""
    heads: set[str] = set()
    for path, module in base_modules(model):
        # of the class: what torch.compile wraps a model in passes on whatever it is asked
        if not hasattr(type(module), "get_output_embeddings"):
            continue
        base, output = getattr(module, "base_model", module), cast(Any, module).get_output_embeddings()
        for name, child in base_modules(module):
            top = name != "" and "." not in name
            # some models have no body of their own to tell the head from, but are named for what it does
            own = child is not base if base is not module else _is_headed(module) and isinstance(child, nn.Linear)
            if (top and own) or (output is not None and child is output):
                heads.add(f"{path}.{name}" if path else name)
    return heads


def _is_headed(model: nn.Module) -> bool:
    return any(re.search(r"For[A-Z]", cls.__name__) for cls in type(model).__mro__)


def find(
    field: str,
    patterns: str | Sequence[str],
    things: Mapping[str, V],
    usable: Callable[[V], bool],
    exclude: str | Sequence[str],
    skip: Container[str],
    describe: Callable[[V], str],
) -> tuple[dict[str, V], list[str]]:
    """The `things` (modules or parameters, by path) that `patterns` mean, and what is wrong with the patterns.

    Every name of a list has to match, and to match only what is `usable`; a regular expression may sweep over other
    things, but has to find one that is usable.
    """
    found: dict[str, V] = {}
    faults: list[str] = []
    names = [path.rsplit(".", 1)[-1] for path, thing in things.items() if path and usable(thing)]
    proposals = list(dict.fromkeys([*names, ALL_LINEAR] if field == "target_modules" else names))
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        key: str | list[str] = pattern if isinstance(patterns, str) else [pattern]
        hits = {path: thing for path, thing in things.items() if path and matches(path, key)}
        kept = {p: t for p, t in hits.items() if not inside(p, skip) and not (exclude and matches(p, exclude))}
        wrong = [path for path in kept if not usable(kept[path])]
        if not hits:
            paths = [path for path in things if path] if "." in pattern else []
            hint = suggestion(pattern, [*proposals, *paths])
            faults.append(f"{field}: {pattern!r} matches nothing{hint or _listed(names)}")
        elif not kept:
            faults.append(f"{field}: all that {pattern!r} matches is left out by exclude_modules or modules_to_save")
        elif wrong and (not isinstance(patterns, str) or len(wrong) == len(kept)):
            what = describe(kept[wrong[0]])
            faults.append(
                f"{field}: {pattern!r} matches {wrong[0]}, {what}{_listed(names, ', which can not be adapted')}"
            )
        found |= {path: thing for path, thing in kept.items() if usable(thing)}
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        key = pattern if isinstance(exclude, str) else [pattern]
        if pattern and not any(matches(path, key) for path in things):
            everything = dict.fromkeys(path.rsplit(".", 1)[-1] for path in things if path)
            faults.append(f"exclude_modules: {pattern!r} matches nothing{suggestion(pattern, everything)}")
    return found, faults


def _listed(names: Iterable[str], lead: str = "") -> str:
    listed = list(dict.fromkeys(names))
    return f"{lead}; names that can be: {some(listed, 8)}" if listed else f"{lead}; the model has none that can be"
