"""The memory of a run, from its configuration alone."""

from __future__ import annotations

import argparse
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from rich.table import Table

from lightning_peft.callback import PEFT
from lightning_peft.cli.app import PEFTCLI
from lightning_peft.cli.classes import as_list, is_a
from lightning_peft.cli.reporting import console_for_tables
from lightning_peft.methods import METHODS
from lightning_peft.methods.base import Method
from lightning_peft.methods.errors import PEFTError, suggestion
from lightning_peft.planning.building import Setting
from lightning_peft.planning.choosing import Choice, base_of, bytes_of, cheapest, room, storage_name
from lightning_peft.planning.estimates import Estimate, Planner
from lightning_peft.planning.sharing import Layout, layouts
from lightning_peft.quantization.config import PACKING, can_pack
from lightning_peft.tracking.comparison import FULL
from lightning_peft.tracking.tables import format_bytes

HELP = """\
Say what memory a run takes, from its configuration alone: a step is run on tensors without values. Nothing is
downloaded but the model's configuration, and no data is read where the batch's size is known.

The parts are those at the peak of a step, on each device. CUDA, NCCL and libraries take 1.5 GB more, and 95% of the
rest can be filled. Rows are taken to be full, and classes that the data alone could tell to be two.

Of settings that fit, the cheapest is the first in this order: as configured; the base in bf16; gradient_checkpointing;
the base in 4 bits; sharding by peft_fsdp; offload_activations; cpu_offload.

Every other option is one of `fit`."""
LOGGERS = (
    *("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"),
    *("transformers", "bitsandbytes"),
)
"""Those that tell of a run."""
DENSE, PACKED = ("none", "bf16"), ("int8", "nf4-dq")
"""Ways to store a base that are planned where none are named."""


@dataclass
class Given:
    """What a command line says."""

    methods: str | None
    quantizations: str | None
    devices: str | None
    batch: str | None
    fit: str | None
    json: Path | None
    words: list[str]
    """For `fit`."""


@dataclass
class Planned:
    """What a configuration says of a run that is not to take place."""

    module: pl.LightningModule
    data: Any
    setting: Setting
    section: str
    """Where a configuration has the callback's arguments."""
    precision: Any
    accumulate: int
    layout: Layout
    """The Trainer's devices, and their strategy where it is one that is planned."""
    on_gpu: bool


def run_plan(words: Sequence[str]) -> int:
    """Print the table, and with `--fit` what to set.

    Returns:
        0.

    Raises:
        PEFTError: with all that is wrong with the options or the configuration, or why the run can't be simulated.
    """
    given = _given(words)
    size = bytes_of(given.fit) if given.fit else None
    rows, length = _batch(given.batch)
    with _quiet():
        planned = PlanCLI(given.words).planned
        counts = [planned.layout.devices] if given.devices is None else _counts(given.devices)
        settings, faults = _settings(planned.setting, given.methods, given.quantizations)
        planner = Planner(
            planned.module,
            planned.data,
            precision=planned.precision,
            accumulate_grad_batches=planned.accumulate,
            rows=rows,
            length=length,
            on_gpu=planned.on_gpu,
        )
        offloads = (False, planned.layout.cpu_offload)
        ways = [way for count in counts for way in layouts(count) if way.cpu_offload in offloads]
        estimates = [planner.estimate(setting, way) for setting in settings for way in ways]
        choices = (
            {count: cheapest(planner, planned.setting, count, size, planned.layout) for count in counts} if size else {}
        )
    console = console_for_tables()
    console.print(_table(estimates, size))
    lines = [f"{name}: {fault}" for name, fault in faults.items()]
    lines += dict.fromkeys(f"{_label(each)}: {each.fault}" for each in estimates if each.fault)
    lines += [
        _verdict(choice, count, given.fit or "", room(size or 0), planned.section) for count, choice in choices.items()
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if given.json is not None:
        given.json.write_text(
            json.dumps([_fields(each, size) for each in estimates], indent=2) + "\n", encoding="utf-8"
        )
    return 0


class PlanCLI(PEFTCLI):
    """Makes the module, the datamodule and the callback of a configuration, and no Trainer.

    Args:
        words: what comes after the verb.
    """

    planned: Planned

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__(["fit", *words])

    def instantiate_classes(self) -> None:
        """The module without weights, where it can be made so."""
        given = self.config[self.verb]
        config = self.config.clone()
        for name in set(config[self.verb].as_dict()) - {"model", "data", "peft", "optimizer", "lr_scheduler"}:
            config[self.verb][name] = None
        stock = [callback for callback in as_list(given.trainer.callbacks) if is_a(callback, PEFT)]
        config[self.verb].trainer = Namespace(callbacks=stock)  # type: ignore[no-untyped-call]
        try:
            with torch.device("meta"):
                self.config_init = self._instantiate(config)
        except PEFTError:
            raise
        except (RuntimeError, NotImplementedError, ValueError):
            # it loads or looks at its weights as it is made
            self.config_init = self._instantiate(config)
        self.model = self._get(self.config_init, "model")
        self._optimize_later()
        section = self._get(self.config_init, "peft")
        callbacks = self._get(self.config_init, "trainer").callbacks
        if section is not None and section.method is not None:
            callbacks = [PEFT(**section.as_dict()), *callbacks]
        if len(callbacks) > 1:
            raise PEFTError("two PEFT callbacks are in one Trainer; leave one")
        setting = Setting(None)
        for callback in callbacks:
            blocks = callback.gradient_checkpointing
            setting = Setting(
                callback.method,
                callback.base,
                tuple(callback.modules_to_save),
                tuple(blocks) if isinstance(blocks, list) else blocks,
                callback.offload_activations,
            )
        trainer = given.trainer
        self.planned = Planned(
            self.model,
            self._get(self.config_init, "data"),
            setting,
            "trainer.callbacks" if stock else "peft",
            trainer.precision or "32-true",
            trainer.accumulate_grad_batches,
            _layout(trainer),
            trainer.accelerator != "cpu",
        )

    def _run_subcommand(self, subcommand: str) -> None: ...


def _given(words: Sequence[str]) -> Given:
    parser = argparse.ArgumentParser(
        "lightning-peft plan",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--methods", help="LoRA,IA3,… by name with their defaults; all; full is full fine-tuning")
    stored = f"how the base is stored; none is as it is loaded; by default {','.join((*DENSE, *PACKED))}"
    parser.add_argument("--quantizations", help=stored)
    parser.add_argument("--devices", help="numbers of devices, such as 1,2; by default the Trainer's")
    parser.add_argument("--batch", help="rows and length of each device's batch, such as 2x2048; by default the data's")
    parser.add_argument("--fit", help="the memory of a GPU, such as 24GB: marks what fits, and says what to set")
    parser.add_argument("--json", type=Path, help="a file for the numbers, in bytes")
    known, rest = parser.parse_known_args(words)
    if known.json is not None and not known.json.parent.is_dir():
        raise PEFTError(f"json: there is no folder {str(known.json.parent)!r}; make it, or name a file in another")
    if known.json is not None and known.json.is_dir():
        raise PEFTError(f"json: {str(known.json)!r} is a folder; name a file in it")
    return Given(**vars(known), words=rest)


def _layout(trainer: Any) -> Layout:
    """What a parsed section `trainer` says of devices; to memory, Lightning's `ddp` is `peft_ddp`."""
    count, given = _number(trainer.devices) * (trainer.num_nodes or 1), trainer.strategy
    name, options = str(given), dict[str, Any]()
    if isinstance(given, Namespace):
        name, options = given.class_path.rpartition(".")[2], given.init_args.as_dict()
    if re.fullmatch(r"(peft_)?ddp.*|(PEFT)?DDPStrategy", name):
        return Layout("peft_ddp", count)
    is_plain = options.get("replicas", 1) == options.get("tensor_parallel_size", 1) == 1
    if name in ("peft_fsdp", "PEFTFSDPStrategy") and is_plain:
        return Layout("peft_fsdp", count, options.get("cpu_offload", False))
    return Layout(devices=count)


def _settings(own: Setting, methods: str | None, stored: str | None) -> tuple[list[Setting], dict[str, str]]:
    """The settings of a table's rows, the configured one first; and what of them can't be planned, with the reason."""
    settings, faults = [own], dict[str, str]()
    bases = [base_of(name, own.base) for name in _stored(stored, faults)]
    for method in _methods(own.method, methods, faults):
        if method is None:
            settings.append(Setting(None))
            continue
        of_method = Setting(method, own.base, own.modules_to_save, own.gradient_checkpointing, own.offload_activations)
        settings += [replace(of_method, base=base) for base in (own.base, *bases)]
    found: list[Setting] = []
    for setting in settings:
        if setting not in found:
            found.append(setting)
    return found, faults


def _stored(names: str | None, faults: dict[str, str]) -> list[str]:
    if names is not None:
        return [name.strip() for name in names.split(",") if name.strip()]
    if can_pack():
        return [*DENSE, *PACKED]
    faults[", ".join(PACKED)] = f"not planned, as it {PACKING}"
    return [*DENSE]


def _methods(own: Method | None, methods: str | None, faults: dict[str, str]) -> Iterator[Method | None]:
    if methods is None:
        yield own
        if own is not None:
            yield None
        return
    names = [name.strip() for name in methods.split(",") if name.strip()]
    for name in [*METHODS, FULL] if names == ["all"] else names:
        if name == FULL:
            yield None
        elif name not in METHODS:
            known = [*METHODS, FULL, "all"]
            raise PEFTError(
                f"methods: there is no {name!r}{suggestion(name, known) or '; there are ' + ', '.join(known)}"
            )
        elif own is not None and type(own) is METHODS[name]:
            yield own
        else:
            try:
                yield METHODS[name]()
            except (PEFTError, TypeError) as error:
                faults[name] = "; ".join(error.faults) if isinstance(error, PEFTError) else str(error)


def _table(estimates: Sequence[Estimate], size: int | None) -> Table:
    headers = ["method", "base", "devices", "trainable>", "checkpoint>"]
    headers += ["weights>", "gradients>", "optimizer>", "activations>", "peak>"]
    headers += [f"fits {format_bytes(size)}"] if size else []
    table = Table(title="Memory of a step on each device", title_justify="left")
    for header in headers:
        table.add_column(header.rstrip(">"), justify="right" if header.endswith(">") else "left")
    for each in estimates:
        if each.fault:
            table.add_row(*_names(each), *["—"] * (len(headers) - 3))
            continue
        parts = (each.checkpoint_bytes, each.weights, each.gradients, each.optimizer, each.activations, each.peak)
        fits = [] if size is None else ["yes" if each.peak <= room(size) else "no"]
        table.add_row(*_names(each), f"{each.trainable:,}", *map(format_bytes, parts), *fits)
    return table


def _names(each: Estimate) -> tuple[str, str, str]:
    setting, way = each.setting, each.layout
    saved = [" +checkpointing"] if setting.gradient_checkpointing else []
    saved += [" +offload"] if setting.offload_activations else []
    method = FULL if setting.method is None else type(setting.method).__name__
    devices = "1" if way.devices == 1 else f"{way.devices} × {way.name}"
    return f"{method}{''.join(saved)}", storage_name(setting.base), devices


def _label(each: Estimate) -> str:
    method, base, _ = _names(each)
    return f"{method} over {base}"


def _verdict(choice: Choice | None, devices: int, asked: str, free: int, section: str) -> str:
    on = "1 device" if devices == 1 else f"{devices} devices"
    if choice is None:
        return (
            f"{on} of {asked}: nothing fits {format_bytes(free)}, not with {'4 bits, ' if can_pack() else ''}"
            "checkpointing and offloading; use a smaller batch, a shorter max_length or more devices"
        )
    peak = format_bytes(choice.estimate.peak)
    if not choice.changes:
        return f"{on} of {asked}: fits as configured, {peak} of {format_bytes(free)}"
    options = " ".join(
        f"--{name.replace('peft.', f'{section}.')} {str(value).lower() if value is True else value}"
        for name, value in choice.changes.items()
    )
    return f"{on} of {asked}: the cheapest that fits takes {peak} of {format_bytes(free)}: {options}"


def _fields(each: Estimate, size: int | None) -> dict[str, Any]:
    method, base, _ = _names(each)
    kept = (
        "total",
        "trainable",
        "adapter_bytes",
        "checkpoint_bytes",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "peak",
    )
    way = each.layout
    fields = {"method": method, "base": base, "strategy": way.strategy, "devices": way.devices}
    fields |= {"cpu_offload": True} if way.cpu_offload else {}
    if each.fault:
        return {**fields, "fault": each.fault}
    fits = {} if size is None else {"fits": each.peak <= room(size)}
    return {**fields, **{name: getattr(each, name) for name in kept}, **fits}


def _batch(words: str | None) -> tuple[int | None, int | None]:
    if words is None:
        return None, None
    found = re.fullmatch(r"([1-9][0-9]*)(?:[x×]([1-9][0-9]*))?", words)
    if not found:
        raise PEFTError(f"batch: {words!r} is neither rows nor rows and length; give 8, or 2x2048")
    return int(found[1]), int(found[2]) if found[2] else None


def _counts(words: str) -> list[int]:
    counts = [word.strip() for word in words.split(",")]
    if not all(count.isdecimal() and int(count) for count in counts):
        raise PEFTError(f"devices: {words!r} is no list of numbers; give 1, or 1,2,8")
    return [int(count) for count in counts]


def _number(devices: Any) -> int:
    """How many devices a Trainer's `devices` means; one where that is for the machine to say."""
    if isinstance(devices, str) and "," in devices:
        devices = [index for index in devices.split(",") if index.strip()]
    if isinstance(devices, list):
        return len(devices)
    return max(1, int(devices)) if str(devices).isdecimal() else 1


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what a Trainer and loaders say of a run that takes place."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
