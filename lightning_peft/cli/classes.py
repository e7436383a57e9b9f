"""From names to classes, and from classes to the names and types of what they take."""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import enum
import importlib
import importlib.metadata
import inspect
import io
import traceback
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from lightning_peft.cli.reporting import EXTRAS
from lightning_peft.methods._host import Swapped
from lightning_peft.methods.errors import nearest, suggestion


class Parameter(NamedTuple):
    """One parameter of a class or function: its type hint, and whether it must be given."""

    hint: Any
    required: bool


class Found(NamedTuple):
    """What a class's name led to: the class that was meant, where there is one, and what is wrong with the name."""

    cls: type | None
    fault: str | None


def as_list(given: Any) -> list[Any]:
    """What a configuration has where one thing or several can be: nothing, it alone, or all of them."""
    return list(given) if isinstance(given, list) else [] if given is None else [given]


def is_a(section: Any, cls: type) -> bool:
    """Whether `section`, a mapping or namespace with a `class_path`, is of `cls` or a child of it."""
    found = find_class(section["class_path"], [cls]).cls if isinstance(section, (dict, Namespace)) else None
    return isinstance(found, type) and issubclass(found, cls)


def parameters(cls: Any) -> dict[str, Parameter]:
    """What the parser accepts for `cls`, those that its `**kwargs` pass on included."""
    parser = ArgumentParser(exit_on_error=False)
    with contextlib.redirect_stderr(io.StringIO()):
        names = parser.add_class_arguments(cls, fail_untyped=False)
    actions = {action.dest: action for action in parser._actions}
    return {
        name: Parameter(getattr(actions[name], "_typehint", Any), actions[name].required)
        for name in dict.fromkeys(names)
        if name in actions
    }


def find_class(name: str, bases: Sequence[type]) -> Found:
    """The class called `name`, by its whole path, or by its name alone where it is a subclass of one of `bases`."""
    what = " or ".join(dict.fromkeys(base.__name__ for base in bases))
    if "." not in name:
        # a dataclass of options is itself what is meant; other bases are there to be derived from
        known = {base.__name__: base for base in bases if dataclasses.is_dataclass(base)}
        known |= {cls.__name__: cls for base in bases for cls in _subclasses(base)}
        if name in known:
            return Found(known[name], None)
        close = nearest(name, known)
        some = f"; there are {', '.join(sorted(known))}; any other" if 0 < len(known) <= 20 else "; one of your own"
        hint = suggestion(name, known) or f"{some} is given by its whole path, such as my_file.{name}"
        return Found(known[close[0]] if close else None, f"there is no {what} called {name!r}{hint}")
    module_name, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in EXTRAS:
            return Found(None, f"{package} is not installed; pip install 'lightning-peft[{EXTRAS[package]}]'")
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            return Found(None, f"{name}: importing {module_name} needs {error.name or error}, which is not installed")
        near = suggestion(error.name, _local_modules(error.name))
        near = near or suggestion(error.name, importlib.metadata.packages_distributions())
        return Found(None, f"there is no module {error.name!r}{near}")
    except Exception as error:  # a file of the user's, in which anything can fail
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename}, line {frame.lineno}"
        if isinstance(error, SyntaxError):
            place = f"{error.filename}, line {error.lineno}"
        return Found(None, f"{name}: importing {module_name} fails: {type(error).__name__}: {error} ({place})")
    found = getattr(module, attribute, None)
    if found is None:
        here = [
            other
            for other, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, tuple(bases))
        ]
        return Found(None, f"{module_name} has no {attribute!r}{suggestion(attribute, here)}")
    if isinstance(found, type) and not issubclass(found, tuple(bases)):
        return Found(None, f"{name} is no {what}")
    return Found(found if isinstance(found, type) else None, None)


def classes_in(hint: Any) -> list[type]:
    """The classes that a value of type `hint` can be given as a class's name and arguments."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType) or _is_collection(origin):
        return [cls for part in typing.get_args(hint) for cls in classes_in(part)]
    if origin is collections.abc.Callable:
        return classes_in(typing.get_args(hint)[-1]) if typing.get_args(hint) else []
    kind = origin if isinstance(origin, type) else hint
    plain = (Path, enum.Enum, type(None), BaseException)
    if not isinstance(kind, type) or issubclass(kind, plain) or kind.__module__ in ("builtins", "datetime", "typing"):
        return []
    return [] if inspect.getmodule(kind) is collections.abc or kind.__module__.startswith("collections") else [kind]


def held_by(hint: Any) -> Any:
    """The hint of what a list holds that is a value of type `hint`; `hint` itself where it names no collection."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        parts = [part for part in args if _is_collection(typing.get_origin(part))]
        return Union[tuple(map(held_by, parts))] if parts else hint  # noqa: UP007
    return Union[args] if args and _is_collection(origin) else hint  # noqa: UP007


def is_callable(hint: Any) -> bool:
    """Whether `hint` asks for something to call, such as an optimizer yet to be given its parameters."""
    return any(typing.get_origin(part) is collections.abc.Callable for part in _parts(hint))


def takes_text(hint: Any) -> bool:
    """Whether a string is a value of type `hint` in its own right, rather than a class's name."""
    return any(
        part in (str, Any, inspect.Parameter.empty)
        or typing.get_origin(part) is Literal
        or (isinstance(part, type) and issubclass(part, (Path, enum.Enum)))
        for part in _parts(hint)
    )


def type_fault(hint: Any, value: Any) -> str | None:
    """Why `value` is none of type `hint`, by the parser's own judgement; None where it is one."""
    parser = ArgumentParser(exit_on_error=False)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parser.add_argument("--value", type=hint)
    except (ValueError, TypeError):
        return None  # a hint that the parser does not check
    try:
        parser.parse_object({"value": value})
    except ArgumentError:
        return f"{value!r} is not {describe(hint)}"
    return None


def describe(hint: Any) -> str:
    """`int or None`, `list[str]`, `'a', 'b' or None`: a type hint as a person would say it."""
    names = list(dict.fromkeys(_names(hint)))
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _names(hint: Any) -> Iterator[str]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        for part in args:
            yield from _names(part)
    elif origin is Literal:
        yield from map(repr, args)
    elif hint is type(None):
        yield "None"
    elif origin is not None and args:
        yield f"{getattr(origin, '__name__', origin)}[{', '.join(describe(part) for part in args)}]"
    else:
        yield getattr(hint, "__name__", str(hint))


def _parts(hint: Any) -> Iterator[Any]:
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType) or _is_collection(origin):
        for part in typing.get_args(hint):
            yield from _parts(part)
    else:
        yield hint


def _is_collection(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, collections.abc.Collection | collections.abc.Iterable)


def _subclasses(base: type) -> Iterator[type]:
    """Those that a configuration may name."""
    children: list[type] = type.__subclasses__(base)
    for child in children:
        if not (inspect.isabstract(child) or child.__name__.startswith("_") or issubclass(child, Swapped)):
            yield child
        yield from _subclasses(child)


def _local_modules(name: str) -> list[str]:
    folder = Path(*name.split(".")[:-1])
    prefix = name.rpartition(".")[0]
    files = folder.glob("*.py") if folder.is_dir() else ()
    return [f"{prefix}.{file.stem}" if prefix else file.stem for file in files]
