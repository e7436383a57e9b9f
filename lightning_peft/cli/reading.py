"""Configurations as plain data whose keys know where they stand: files in layers, then options of the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_peft.methods.errors import suggestion

COMMAND_LINE = "command line"
PATH_ENDINGS = (".yaml", ".yml", ".json")
SPEC_KEYS = ("class_path", "init_args", "dict_kwargs")


class Name(str):
    """A key, or a value of text, and the file and line where it stands."""

    where: str = ""
    """Empty where the key came with a class that a later layer has replaced."""

    def at(self, where: str) -> Name:
        """The same key at another place."""
        moved = Name(self)
        moved.where = where
        return moved


class _Loader(yaml.SafeLoader):
    """YAML as the parser reads it: 1e-3 is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_config(path: str) -> tuple[dict[Any, Any], list[str]]:
    """The mapping in the file at `path`, and what is wrong with the file; the mapping is empty then."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = file.parent
        there = [str(other) for other in folder.iterdir() if other.suffix in PATH_ENDINGS] if folder.is_dir() else []
        return {}, [f"{path}: there is no such file{suggestion(path, there)}"]
    except (OSError, UnicodeDecodeError) as error:
        return {}, [f"{path}: can't be read: {error}"]
    try:
        content = _load(text, path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        return {}, [f"{path}{place}: is no valid YAML: {' '.join(filter(None, (error.context, error.problem)))}"]
    except yaml.YAMLError as error:
        return {}, [f"{path}: is no valid YAML: {' '.join(str(error).split())}"]
    if not isinstance(content, dict):
        given = "is empty" if content is None else f"holds a {type(content).__name__}"
        return {}, [
            f"{path}: {given}; a configuration is a mapping with sections such as model, data, trainer and peft"
        ]
    return content, []


def read_arguments(words: Sequence[str]) -> tuple[dict[Any, Any], list[str]]:
    """What the words after a verb amount to: their `--config` files and options, later ones over earlier ones.

    Returns:
        The merged configuration, and what is wrong with its files and words.
    """
    tree: Any = {}
    faults: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            hint = f"; a configuration is given as --config {word}" if word.endswith(PATH_ENDINGS) else ""
            faults.append(f"{COMMAND_LINE}: {word!r} is not an option{hint}")
            continue
        option, has_value, value = word.partition("=")
        if not has_value:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else ""
        if option in ("--config", "-c"):
            layer, more = read_config(value) if value else ({}, [f"{COMMAND_LINE}: {option} lacks its file"])
            faults += more
            tree = merged(tree, layer)
        elif option.startswith("--") and not option.endswith(".help") and option not in ("--print_config", "--help"):
            path = [Name(part).at(COMMAND_LINE) for part in option[2:].split(".")]
            tree = _assigned(tree, path, _value(value))
    return tree, faults


def merged(earlier: Any, later: Any) -> Any:
    """`later` laid over `earlier`, as the parser does it."""
    if isinstance(later, str) and later.endswith(PATH_ENDINGS):
        return later
    if isinstance(later, str) and isinstance(earlier, dict) and "class_path" in earlier:
        later = {_class_path(later): later}
    if isinstance(earlier, str) and isinstance(later, dict) and set(later) & set(SPEC_KEYS):
        earlier = {_class_path(earlier): earlier}
    if not (isinstance(earlier, dict) and isinstance(later, dict)):
        return later
    changed = later.get("class_path", earlier.get("class_path")) != earlier.get("class_path")
    if changed and isinstance(earlier.get("init_args"), dict):
        # the parser drops, with a warning, what the new class does not take
        earlier = {**earlier, "init_args": {key.at(""): value for key, value in earlier["init_args"].items()}}
    out = {key: value for key, value in earlier.items() if key not in later}
    for key, value in later.items():
        if key.endswith("+"):
            name = Name(key[:-1]).at(key.where)
            before = out.pop(name, earlier.get(name))
            before = before if isinstance(before, list) else [] if before is None else [before]
            out[name] = [*before, *(value if isinstance(value, list) else [value])]
        else:
            out[key] = merged(earlier[key], value) if key in earlier else value
    return out


def _assigned(tree: Any, path: list[Name], value: Any) -> Any:
    if not path:
        return merged(tree, value)
    if isinstance(tree, list):
        return [*tree[:-1], _assigned(tree[-1] if tree else {}, path, value)]
    if isinstance(tree, str):
        tree = {_class_path(tree): tree}
    if not isinstance(tree, dict):
        tree = {}
    if "class_path" in tree and path[0] not in SPEC_KEYS:
        path = [Name("init_args").at(COMMAND_LINE), *path]
    name = path[0]
    return merged(tree, {name: _assigned(tree.get(name), path[1:], value)})


def _class_path(value: str) -> Name:
    """The key that a class's name alone stands for."""
    return Name("class_path").at(value.where if isinstance(value, Name) else COMMAND_LINE)


def _value(text: str) -> Any:
    try:
        return _load(text, COMMAND_LINE)
    except yaml.YAMLError:
        return text


def _load(text: str, source: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _plain(loader, node, source)
    finally:
        loader.dispose()


def _plain(loader: _Loader, node: yaml.Node, source: str) -> Any:
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)
        return {Name(key.value).at(_where(key, source)): _plain(loader, value, source) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, source) for item in node.value]
    value = loader.construct_object(node)
    return Name(value).at(_where(node, source)) if isinstance(value, str) else value


def _where(node: yaml.Node, source: str) -> str:
    return source if source == COMMAND_LINE else f"{source}:{node.start_mark.line + 1}"
