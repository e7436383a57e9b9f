"""Every fault of a configuration in one pass, with the names that were meant.

Asked when the parser has refused a configuration, as that stops at its first fault and suggests nothing; and for the
values that only a class itself can judge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_peft.callback import PEFT
from lightning_peft.callback.base import base_faults
from lightning_peft.cli.classes import (
    Parameter,
    classes_in,
    find_class,
    held_by,
    is_callable,
    parameters,
    takes_text,
    type_fault,
)
from lightning_peft.cli.reading import COMMAND_LINE, PATH_ENDINGS, SPEC_KEYS, Name, read_arguments, read_config
from lightning_peft.methods.base import Method
from lightning_peft.methods.errors import PEFTError, nearest, suggestion
from lightning_peft.quantization import Quantization

SECTIONS: dict[str, type] = {"trainer": pl.Trainer, "peft": PEFT}
BASE_ARGUMENTS = ("quantization", "base_dtype", "base_weights")
SPECS: dict[str, type] = {
    "model": pl.LightningModule,
    "data": pl.LightningDataModule,
    "optimizer": Optimizer,
    "lr_scheduler": LRScheduler,
}


def find_faults(verb: str, words: Sequence[str], more: Sequence[str]) -> list[str]:
    """What is wrong with the words after `verb` and with the files that they name; empty where nothing is seen to be.

    Args:
        verb: the verb, for messages.
        words: the words after it.
        more: names that are valid at the top level beside the sections, such as `ckpt_path`.
    """
    tree, faults = read_arguments(words)
    known = [*SECTIONS, *SPECS, *more]
    for name, value in tree.items():
        if name in SECTIONS:
            faults += _section_faults(name, value, SECTIONS[name])
        elif name in SPECS:
            faults += _value_faults(name, name, value, Parameter(SPECS[name], False))
        elif name not in more:
            faults.append(_unknown(name, f"{verb} has no section or option {name!r}", known))
    if "model" not in tree and not faults:
        faults.append(
            f"{COMMAND_LINE}: there is no model; name a LightningModule in a file (--config FILE) or by --model CLASS"
        )
    return faults


def value_faults(tree: Any) -> list[str]:
    """What this package's own classes say of the values that a parsed configuration gives them: all of it at once."""
    if isinstance(tree, list):
        return [fault for item in tree for fault in value_faults(item)]
    if not isinstance(tree, Mapping):
        return []
    faults = [fault for value in tree.values() for fault in value_faults(value)]
    name, arguments = tree.get("class_path"), tree.get("init_args")
    if not faults and isinstance(name, str):
        faults = _refusal(find_class(name, [object]).cls, dict(arguments or {}))
    return faults


def callback_faults(section: Mapping[str, Any]) -> list[str]:
    """What is wrong with a parsed section `peft` beside the method: what the callback would refuse, and what full
    fine-tuning would pass over in silence."""
    if section.get("method"):
        return _base_faults("peft", section)
    return [
        f"peft.{name}: is of no use without a method, and method is null; name one, or leave {name} out"
        for name in (*BASE_ARGUMENTS, "gradient_checkpointing", "offload_activations")
        if section.get(name)
    ]


def method_fault(words: Sequence[str]) -> list[str]:
    """That the words after a verb give the callback arguments but no method (it may be null); else empty."""
    tree, _ = read_arguments(words)
    section = tree.get("peft")
    if not isinstance(section, dict) or not section or "method" in section:
        return []
    where = next(iter(section)).where
    return [f"{where}: peft.method: is missing; name one, such as LoRA, or null for full fine-tuning"]


def _section_faults(section: Name, value: Any, cls: type) -> list[str]:
    if value is None and section.where == COMMAND_LINE:
        return [f"{COMMAND_LINE}: {section}: null is for files; here, write --{section}.method=null"]
    if value is None:
        return []
    if isinstance(value, str) and value.endswith(PATH_ENDINGS):
        content, faults = read_config(value)
        return faults or _section_faults(section, content, cls)
    if not isinstance(value, dict):
        return [f"{section.where}: {section}: {value!r} is no mapping of names to values"]
    accepted = parameters(cls)
    faults = _arguments_faults(section, value, cls, accepted)
    for name, text in value.items():
        if cls is PEFT and name in BASE_ARGUMENTS and isinstance(text, str):
            faults += [f"{name.where}: {section}.{fault}" for fault in base_faults(**{name: text})]
    return faults


def _arguments_faults(path: str, given: Any, cls: type, accepted: dict[str, Parameter], where: str = "") -> list[str]:
    """Faults of the arguments `given` to `cls`; with `where`, what is required must be among them."""
    faults: list[str] = []
    meant: set[str] = set()
    for name, value in given.items():
        if name in accepted:
            faults += _value_faults(name, f"{path}.{name}", value, accepted[name])
        elif name.where:
            faults.append(_unknown(name, f"{cls.__name__} has no {name!r}", accepted, path))
            meant |= set(nearest(name, accepted))
    missing = [
        name for name, parameter in accepted.items() if parameter.required and name not in given and name not in meant
    ]
    return faults + [f"{where}: {path}.{name}: is missing; {cls.__name__} needs it" for name in missing if where]


def _value_faults(name: Name, path: str, value: Any, parameter: Parameter) -> list[str]:
    bases = classes_in(parameter.hint)
    if value is None or not bases:
        return _type_faults(name, path, value, parameter)
    if isinstance(value, list):
        held = Parameter(held_by(parameter.hint), False)
        return [
            fault
            for index, item in enumerate(value)
            for fault in _value_faults(item if isinstance(item, Name) else name, f"{path}[{index}]", item, held)
        ]
    # an optimizer gets its parameters, and a scheduler its optimizer, later on
    require = not is_callable(parameter.hint) and not issubclass(bases[0], (Optimizer, LRScheduler))
    if isinstance(value, str) and not takes_text(parameter.hint) and not is_callable(parameter.hint):
        if value.endswith(PATH_ENDINGS):
            content, faults = read_config(value)
            return faults or _value_faults(name, path, content, parameter)
        return _spec_faults(name, path, {"class_path": value}, bases, require)
    if not isinstance(value, dict):
        faults = _type_faults(name, path, value, parameter)
        missing = find_class(value, bases).fault if faults and isinstance(value, str) else None
        return [f"{name.where}: {path}: {missing}"] if missing else faults
    if "class_path" in value:
        return _spec_faults(name, path, value, bases, require)
    if dataclasses.is_dataclass(bases[0]):
        faults = _arguments_faults(path, value, bases[0], parameters(bases[0]))
        return faults or [f"{name.where}: {refusal}" for refusal in _refusal(bases[0], value)]
    if set(value) <= set(SPEC_KEYS):
        return [f"{name.where}: {path}.class_path: is missing; give a {' or '.join(base.__name__ for base in bases)}"]
    return []


def _spec_faults(name: Name, path: str, spec: dict[Any, Any], bases: list[type], require: bool) -> list[str]:
    key = next((key for key in spec if key == "class_path"), name)
    where = key.where if isinstance(key, Name) else name.where
    class_path, arguments = spec["class_path"], spec.get("init_args") or {}
    if not isinstance(class_path, str) or not isinstance(arguments, dict):
        return [f"{where}: {path}: class_path must be a name, and init_args a mapping of names to values"]
    cls, fault = find_class(class_path, bases)
    faults = [f"{where}: {path}: {fault}"] if fault else []
    faults += [
        _unknown(other, f"beside class_path there is init_args, not {other!r}; put it there", SPEC_KEYS, path)
        for other in spec
        if other not in SPEC_KEYS
    ]
    if cls is not None:
        faults += _arguments_faults(f"{path}.init_args", arguments, cls, parameters(cls), where if require else "")
        if not faults:
            faults = [f"{where}: {refusal}" for refusal in _refusal(cls, arguments)]
    return faults


def _type_faults(name: Name, path: str, value: Any, parameter: Parameter) -> list[str]:
    fault = type_fault(parameter.hint, value)
    return [f"{name.where}: {path}: {fault}"] if fault else []


def _refusal(cls: type | None, arguments: dict[str, Any]) -> list[str]:
    """What a class of this package says to `arguments`; making one of these builds no model and reads no data."""
    own = (Method, pl.LightningModule, pl.LightningDataModule, Quantization)
    if cls is PEFT:
        # it is made of a method that is not made yet
        return _base_faults("PEFT", arguments)
    if cls is None or not issubclass(cls, own) or not cls.__module__.startswith("lightning_peft."):
        return []
    if any(_is_spec(value) for value in arguments.values()):
        return []
    try:
        cls(**{name: _judged(value) for name, value in arguments.items()})
    except PEFTError as error:
        return list(error.faults)
    except (TypeError, ValueError):
        pass  # values that the parser has yet to convert, or has refused
    return []


def _judged(value: Any) -> Any:
    """`value`; of a list that holds names and objects, which are not made yet, the names."""
    names = [item for item in value if not _is_spec(item)] if isinstance(value, list) else []
    return names or value


def _is_spec(value: Any) -> bool:
    return isinstance(value, Mapping) and "class_path" in value


def _base_faults(path: str, arguments: Mapping[str, Any]) -> list[str]:
    """What is wrong with those of the callback's arguments that say how the base is stored."""
    faults = base_faults(**{name: arguments.get(name) for name in BASE_ARGUMENTS})
    return [fault if fault.startswith("Quantization.") else f"{path}.{fault}" for fault in faults]


def _unknown(name: Name, fault: str, candidates: Any, path: str = "") -> str:
    whole = f"{path}.{name}" if path else str(name)
    hint = suggestion(name, candidates)
    if not hint and len(list(candidates)) <= 15:
        hint = f"; there are {', '.join(candidates)}"
    return f"{name.where}: {whole}: {fault}{hint}"
