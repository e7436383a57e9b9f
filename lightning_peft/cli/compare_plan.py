"""The runs of a comparison: each with its whole configuration, and the file that says whether it has run."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch.callbacks import ProgressBar

from lightning_peft.callback import PEFT
from lightning_peft.cli.app import PEFTCLI
from lightning_peft.cli.classes import as_list, is_a
from lightning_peft.cli.reading import PATH_ENDINGS, read_arguments
from lightning_peft.methods import METHODS
from lightning_peft.methods._probe import LinearProbe
from lightning_peft.methods.errors import PEFTError, some, suggestion
from lightning_peft.tracking.comparison import FULL, PROBE, guessed_mode, read_report
from lightning_peft.tracking.comparison.report import RunReport

ALL = "all"
DEFAULTS: dict[str, Any] = {
    "quantization": None,
    "base_dtype": None,
    "gradient_checkpointing": False,
    "offload_activations": False,
}
"""What full fine-tuning does without of the section `peft`, and the value that is none."""


@dataclass(frozen=True)
class Planned:
    """One run."""

    label: str
    seed: int
    folder: Path
    config: Mapping[str, Any]
    """All of `fit`'s configuration."""

    @property
    def file(self) -> Path:
        """Where the configuration is written when the run is started."""
        return self.folder / "config.yaml"

    @cached_property
    def text(self) -> str:
        """What is written there."""
        return yaml.safe_dump(dict(self.config), sort_keys=False, allow_unicode=True)

    def report(self) -> dict[str, Any] | None:
        """What the run reported; None where it has not ended well, or was another one."""
        return None if self.changes() else read_report(self.folder / "report.json")

    def changes(self) -> list[str]:
        """The options by which the run in the folder was another one; all of them where there is none."""
        try:
            text = self.file.read_text(encoding="utf-8")
            return [] if text == self.text else _differences(_placeless(yaml.safe_load(text)), _placeless(self.config))
        except (OSError, yaml.YAMLError, LookupError, TypeError):
            return list(self.config)


@dataclass(frozen=True)
class Logging:
    """The W&B project and group that runs are logged to, beside their CSV file."""

    project: str
    group: str


class ReadingCLI(PEFTCLI):
    """Reads a configuration as `fit` does, with all its checks, and makes nothing of it."""

    def instantiate_classes(self) -> None:
        """Nothing."""

    def _run_subcommand(self, subcommand: str) -> None: ...

    def section(self) -> dict[str, Any]:
        """The whole configuration, defaults included, in plain types."""
        text = self._parser(self.verb).dump(self.config[self.verb], format="json", skip_unset=False)
        return dict(json.loads(text))


def labels_of(methods: Sequence[str]) -> dict[str, str]:
    """What was asked for by label: the method's name, or the file of a variant.

    Args:
        methods: names of methods, `full`, `probe`, `all`, and files of configurations, commas between them.

    Raises:
        PEFTError: with each name that is none, and each label that would stand for two things.
    """
    asked = [name.strip() for part in methods for name in part.split(",") if name.strip()]
    every = {name: name for name, cls in METHODS.items() if not _required(cls)}
    made: dict[str, str] = {}
    faults = []
    for name in asked:
        is_file = name.endswith(PATH_ENDINGS)
        if not is_file and name != ALL and name not in (*METHODS, FULL, PROBE):
            known = [*METHODS, FULL, PROBE, ALL]
            hint = suggestion(name, known) or "; `lightning-peft methods` lists them, and full, probe and all are more"
            faults.append(f"--methods: there is no method {name!r}{hint}")
            continue
        for label, source in (every if name == ALL else {Path(name).stem if is_file else name: name}).items():
            if made.get(label, source) != source:
                faults.append(f"--methods: {made[label]} and {source} would both be called {label!r}; rename the file")
            made[label] = source
    if faults or not made:
        raise PEFTError(faults or "--methods: names no method; give some, such as LoRA,IA3,full,probe, or all")
    return made


def resolve(sources: Mapping[str, str], words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The whole configuration of `fit` for each label.

    Args:
        sources: as `labels_of` gives them.
        words: `--config FILE` and other options of `fit`; the fields of a method in them hold for that method alone.

    Raises:
        PEFTError: with all that is wrong with any of them; what is wrong with each is told once.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    made: dict[str, dict[str, Any]] = {}
    faults: dict[str, list[str]] = {}
    for label, source in sources.items():
        try:
            made[label] = ReadingCLI(
                ["fit", *words, *_method_words(source, words), "--seed_everything=false"]
            ).section()
            _check(made[label])
        except PEFTError as error:
            for fault in error.faults:
                faults.setdefault(fault, []).append(label)
    if faults:
        everywhere = len(sources)
        raise PEFTError(
            [fault if len(own) == everywhere else f"{', '.join(own)}: {fault}" for fault, own in faults.items()]
        )
    return made


def plan(
    sections: Mapping[str, dict[str, Any]], seeds: Sequence[int], out: Path, logging: Logging | None
) -> list[Planned]:
    """The runs in the order in which they are carried out: all methods with the first seed, then with the next.

    Args:
        sections: as `resolve` gives them.
        seeds: of each method.
        out: the comparison's folder.
        logging: where to log to beside a CSV file in the run's folder; the configuration's own loggers are not used.
    """
    made = []
    for seed in seeds:
        for label, section in sections.items():
            folder = out / "runs" / f"{label}-seed{seed}"
            config = copy.deepcopy(section)
            config["seed_everything"] = seed
            trainer = config["trainer"]
            trainer |= {"default_root_dir": str(folder), "enable_progress_bar": False}
            trainer["logger"] = _loggers(label, seed, folder, logging)
            # Lightning refuses a bar beside `enable_progress_bar: false`
            callbacks = [callback for callback in as_list(trainer.get("callbacks")) if not is_a(callback, ProgressBar)]
            for callback in callbacks:
                arguments = callback.get("init_args") or {}
                if arguments.get("dirpath"):
                    # every run's checkpoints would go to the same folder
                    arguments["dirpath"] = str(folder / "checkpoints")
            report = {"path": str(folder / "report.json")}
            trainer["callbacks"] = [*callbacks, {"class_path": _path(RunReport), "init_args": report}]
            made.append(Planned(label, seed, folder, config))
    return made


def check_folders(planned: Sequence[Planned]) -> None:
    """Refuse to run in the folder of another run that has ended: it would be deleted.

    Raises:
        PEFTError: with each such folder, and what differs.
    """
    faults = []
    for run in planned:
        if read_report(run.folder / "report.json") is not None and (changes := run.changes()):
            faults.append(
                f"--out: {run.folder} holds a run that differs in {some(changes)}; give another --out, or delete it"
            )
    if faults:
        raise PEFTError(faults)


def metric_of(sections: Mapping[str, Mapping[str, Any]], metric: str | None, mode: str | None) -> tuple[str, str]:
    """The validation metric to compare by, and `max` or `min`: what is given, else what the configuration's
    ModelCheckpoint monitors and how, else `val_loss`; a direction that nobody tells is guessed by the name."""
    monitored = {
        arguments["monitor"]: arguments.get("mode")
        for section in sections.values()
        for callback in as_list(section["trainer"].get("callbacks"))
        if callback["class_path"].endswith(".ModelCheckpoint")
        and (arguments := callback.get("init_args") or {}).get("monitor")
    }
    name = metric or next(iter(monitored), "val_loss")
    return name, mode or monitored.get(name) or guessed_mode(name)


def facts_of(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What the runs have in common, for people: model, data and budget."""
    section = next(iter(sections.values()))
    facts = {}
    for name in ("model", "data"):
        given = section.get(name) or {}
        if "class_path" in given:
            arguments = given.get("init_args") or {}
            place = next((arguments[key] for key in ("model", "path") if isinstance(arguments.get(key), str)), "")
            facts[name] = " ".join(filter(None, (given["class_path"].rpartition(".")[2], place)))
    trainer = section["trainer"]
    limits = {"max_epochs": "epochs", "max_steps": "steps", "max_time": "of time"}
    facts["budget"] = ", ".join(
        f"{trainer[key]} {what}" for key, what in limits.items() if trainer.get(key) not in (None, -1)
    )
    return {name: text for name, text in facts.items() if text}


def _method_words(source: str, words: Sequence[str]) -> list[str]:
    """The options that make the method of a configuration the one that `source` names."""
    section = read_arguments(words)[0].get("peft")
    given = section if isinstance(section, dict) else {}
    if source.endswith(PATH_ENDINGS):
        return ["--config", source]
    if source == FULL:
        return [
            "--peft.method=null",
            *(f"--peft.{name}={json.dumps(none)}" for name, none in DEFAULTS.items() if given.get(name)),
        ]
    named = given.get("method")
    named = named.get("class_path") if isinstance(named, dict) else named
    if isinstance(named, str) and named.rpartition(".")[2] == source:
        return []
    # by way of null, as fields of the one would go over to the other
    return ["--peft.method=null", f"--peft.method={_path(LinearProbe) if source == PROBE else source}"]


def _check(section: Mapping[str, Any]) -> None:
    """That the method is where it can be exchanged."""
    if any(is_a(callback, PEFT) for callback in as_list(section["trainer"].get("callbacks"))):
        raise PEFTError(
            "trainer.callbacks: has a PEFT callback, whose method can't be exchanged; write it as section peft"
        )


def _loggers(label: str, seed: int, folder: Path, logging: Logging | None) -> list[dict[str, Any]]:
    csv = {"save_dir": str(folder), "name": "", "version": "logs"}
    loggers: list[dict[str, Any]] = [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": csv}]
    if logging is not None:
        own = {"name": f"{label}-seed{seed}", "save_dir": str(folder), "project": logging.project}
        more = {"group": logging.group, "job_type": label}
        loggers.append({"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": own, "dict_kwargs": more})
    return loggers


def _placeless(config: Mapping[str, Any]) -> Any:
    """A run's configuration wherever its folder is, and however that was spelled."""
    place = json.dumps(config["trainer"]["default_root_dir"])[1:-1]
    return json.loads(json.dumps(config).replace(place, ""))


def _differences(one: Any, other: Any, name: str = "") -> list[str]:
    """The names of the values that differ between nested mappings."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return [] if one == other else [name]
    keys = dict.fromkeys([*one, *other])
    return [
        found for key in keys for found in _differences(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    ]


def _required(cls: type) -> bool:
    """Whether a method can't be made without being given fields."""
    return any(item.default is MISSING and item.default_factory is MISSING for item in fields(cls))


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
