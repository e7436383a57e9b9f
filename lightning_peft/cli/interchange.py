"""The verbs between checkpoints and the formats of others: export, import, merge, push."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lightning_peft.cli import INTERCHANGE
from lightning_peft.methods.errors import PEFTError, suggestion

CONFIGURATION = {
    "--config FILE": "a configuration whose section `model` builds the base; may be given several times",
    "--model CLASS": "its class alone, where the checkpoint holds the arguments; --model.NAME VALUE gives others",
}
OVERWRITE = {"--overwrite": "write into what is there already and is no earlier output"}
DTYPES = ("bfloat16", "float16", "float32", "float64")


class Verb(NamedTuple):
    """What a verb takes: places in order, and options with a line each."""

    places: tuple[str, str]
    options: dict[str, str]


VERBS = {
    "export": Verb(
        ("CKPT", "DIR"),
        {
            **CONFIGURATION,
            "--base ORG/NAME": "where others find the base; by default where it was loaded from",
            **OVERWRITE,
        },
    ),
    "import": Verb(
        ("SOURCE", "CKPT"),
        {
            **CONFIGURATION,
            "--base PLACE": "the base's hub id or folder, in place of the one that SOURCE names",
            **OVERWRITE,
        },
    ),
    "merge": Verb(
        ("CKPT", "DIR"),
        {
            **CONFIGURATION,
            "--dtype NAME": f"the dtype to store: {', '.join(DTYPES)}; by default the base's",
            **OVERWRITE,
        },
    ),
    "push": Verb(("DIR", "ORG/NAME"), {"--private": "make the repository private"}),
}


@dataclass
class Request:
    """The words after a verb, sorted."""

    places: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)
    model: list[str] = field(default_factory=list)
    """The options that describe the model, as `fit` takes them."""


def run_interchange(verb: str, words: list[str]) -> int:
    """Run one of these verbs.

    Raises:
        PEFTError: with all that is wrong with the words, or with what they name.
    """
    if {"-h", "--help"} & set(words):
        print(_help(verb))
        return 0
    request = parse(verb, words)
    {"export": _export, "import": _import, "merge": _merge, "push": _push}[verb](request)
    return 0


def parse(verb: str, words: list[str]) -> Request:
    """Sort the words after `verb`.

    Raises:
        PEFTError: with every word that is unknown, missing or too much.
    """
    known = {option.split()[0]: " " in option for option in VERBS[verb].options}
    request, faults, rest = Request(), list[str](), list(words)
    while rest:
        word = rest.pop(0)
        option, has_value, value = word.partition("=")
        name = "--config" if option == "-c" else "--model" if option.startswith("--model.") else option
        if not word.startswith("-"):
            request.places.append(word)
            continue
        if name not in known:
            faults.append(f"{verb}: there is no option {option!r}{suggestion(option, known)}")
            continue
        if has_value and not known[name]:
            faults.append(f"{verb}: {option} takes no value")
        if known[name] and not has_value:
            if not rest or rest[0].startswith("--"):
                faults.append(f"{verb}: {option} lacks its value")
                continue
            value = rest.pop(0)
        if name in ("--config", "--model"):
            request.model.append(f"{option}={value}")
        else:
            request.options[name] = value
    places = VERBS[verb].places
    if not faults:
        # else a word may be the value of an option that is not known
        missing, extra = places[len(request.places) :], request.places[len(places) :]
        faults += [f"{verb}: {' and '.join(missing)} missing; {_usage(verb)}"] if missing else []
        faults += [f"{verb}: {' '.join(extra)!r} is too much; {_usage(verb)}"] if extra else []
    if faults:
        raise PEFTError(faults)
    return request


def _export(request: Request) -> None:
    from lightning_peft.cli.modules import load_adapted

    checkpoint, folder = request.places[0], Path(request.places[1])
    _check_folder(folder, "adapter_config.json", request)
    if (folder / "config.json").exists():
        raise PEFTError(f"{folder} holds a model, on which transformers would load the adapter; give another folder")
    module, content = load_adapted(checkpoint, request.model)

    from lightning_peft.interchange.card import is_local, model_card
    from lightning_peft.interchange.hf_peft import export_adapter
    from lightning_peft.interchange.roots import peft_root
    from lightning_peft.interchange.standalone import base_place

    base = request.options.get("--base")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # with the card or not at all; and an earlier adapter stays as it was where this one can't be expressed
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
        unfinished = export_adapter(module, Path(name) / folder.name, base_model=base)
        card = model_card(module, name=folder.name, base=base, checkpoint=content)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        shutil.copytree(unfinished, folder, dirs_exist_ok=True)
    _print_files(folder)
    print(f'Load it   from peft import PeftModel\n          model = PeftModel.from_pretrained(base, "{folder}")')
    place = base or base_place(peft_root(module)[1])
    if place and is_local(place):
        print(f"Note      adapter_config.json names the base by its place here, {place}; --base ORG/NAME says another")
    print(f"Share it  lightning-peft push {folder} ORG/NAME")


def _merge(request: Request) -> None:
    from lightning_peft.cli.modules import load_adapted

    checkpoint, folder = request.places[0], Path(request.places[1])
    dtype = _dtype(request.options.get("--dtype"))
    _check_folder(folder, "config.json", request)
    module, content = load_adapted(checkpoint, request.model)

    from lightning_peft.interchange.card import auto_class, model_card
    from lightning_peft.interchange.roots import peft_root
    from lightning_peft.interchange.standalone import save_merged

    save_merged(module, folder, dtype=dtype)
    card = model_card(module, name=folder.name, checkpoint=content, merged=True)
    (folder / "README.md").write_text(card, encoding="utf-8")
    _print_files(folder)
    auto = auto_class(peft_root(module)[1])
    print(f'Load it   from transformers import {auto}\n          model = {auto}.from_pretrained("{folder}")')


def _import(request: Request) -> None:
    source, target = request.places[0], Path(request.places[1])
    if target.is_dir():
        raise PEFTError(f"{target} is a folder; give the name of a file, such as {target / 'adapter.ckpt'}")
    if target.exists() and "--overwrite" not in request.options:
        raise PEFTError(f"{target} exists; give another name, or --overwrite")
    if request.model and "--base" in request.options:
        raise PEFTError("import: --base is for the base that SOURCE names; beside --config, say --model.model")

    from lightning_peft.interchange.wandb_artifacts import is_address

    if is_address(source):
        _import_artifact(source, target, request)
        return

    from lightning_peft.callback.module import Plan, adapt
    from lightning_peft.cli.app import build_model
    from lightning_peft.cli.modules import options_for, write_fresh_checkpoint
    from lightning_peft.injection import records
    from lightning_peft.interchange.hf_peft import import_adapter
    from lightning_peft.interchange.hf_peft_files import fetched

    folder = fetched(source, None)
    module = build_model(request.model or options_for(folder, request.options.get("--base")), {})
    module.configure_model()
    import_adapter(module, folder)
    [(name, record)] = records(module).items()
    adapt(module, Plan(record.method, name, list(record.modules_to_save)))
    module.configure_model()
    write_fresh_checkpoint(module, target)
    _print_imported(target, record.method, list(record.modules_to_save))


def _import_artifact(source: str, target: Path, request: Request) -> None:
    from lightning_peft.interchange.wandb_artifacts import fetch_checkpoint
    from lightning_peft.state import method_of, read_checkpoint, spec_of

    if request.model or "--base" in request.options:
        raise PEFTError(f"import: {source} is a checkpoint already; leave --config, --model and --base to its use")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
        file = fetch_checkpoint(source, Path(name))
        spec = spec_of(read_checkpoint(file, "meta"), source)
        method = method_of(spec)
        file.replace(target)
    more = {field: spec[field] for field in ("quantization", "base_dtype") if spec.get(field)}
    _print_imported(target, method, list(spec["modules_to_save"]), more)


def _push(request: Request) -> None:
    from lightning_peft.interchange.hub import push, uploaded_files

    folder, repo = request.places
    address = push(folder, repo, private="--private" in request.options)
    print(f"Uploaded  {len(uploaded_files(Path(folder)))} files to {address}")


def _print_imported(target: Path, method: Any, saved: list[str], more: dict[str, Any] | None = None) -> None:
    import yaml

    from lightning_peft.interchange.card import changed_fields

    section: dict[str, Any] = {"method": {"class_path": type(method).__name__}}
    if fields := changed_fields(method):
        section["method"]["init_args"] = fields
    if saved:
        section["modules_to_save"] = saved
    text = yaml.safe_dump({"peft": {**section, **(more or {})}}, sort_keys=False).rstrip()
    _print_files(target)
    print(f"Use it    --ckpt_path {target}, with this section in the configuration:\n\n{text}")


def _dtype(name: str | None) -> Any:
    if name is None:
        return None
    if name not in DTYPES:
        hint = suggestion(name, DTYPES) or f"; there are {', '.join(DTYPES)}"
        raise PEFTError(f"merge: --dtype: {name!r} is none{hint}")
    import torch

    return getattr(torch, name)


def _check_folder(folder: Path, marker: str, request: Request) -> None:
    from lightning_peft.interchange.card import is_own_card

    if folder.exists() and not folder.is_dir():
        raise PEFTError(f"{folder} is a file; give a folder")
    earlier = (folder / marker).exists() and is_own_card(folder)
    if folder.is_dir() and any(folder.iterdir()) and not earlier and "--overwrite" not in request.options:
        raise PEFTError(f"{folder} is not empty, and no earlier output; give another folder, or --overwrite")


def _print_files(place: Path) -> None:
    from lightning_peft.tracking.tables import format_bytes

    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    sizes = {str(path): path.stat().st_size for path in files}
    width = max(map(len, sizes))
    lead = "Wrote     "
    for name, size in sizes.items():
        print(f"{lead}{name:<{width}}  {format_bytes(size)}")
        lead = " " * len(lead)


def _usage(verb: str) -> str:
    return f"lightning-peft {verb} {' '.join(VERBS[verb].places)}"


def _help(verb: str) -> str:
    options = "\n".join(f"  {option:<18}{line}" for option, line in VERBS[verb].options.items())
    return f"{INTERCHANGE[verb][0].upper()}{INTERCHANGE[verb][1:]}.\n\nusage: {_usage(verb)} [options]\n\n{options}"
