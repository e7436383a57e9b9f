"""LightningCLI with a section for adapters, for people who mistype."""

from __future__ import annotations

import itertools
import json
import signal
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from functools import partial, update_wrapper
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Any

import lightning.pytorch as pl
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
    instantiate_class,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

# named by their class alone in a configuration, which takes that they are imported
import lightning_peft.data
import lightning_peft.tasks  # noqa: F401
from lightning_peft.callback import PEFT
from lightning_peft.cli import RUNS
from lightning_peft.cli.classes import as_list, find_class, is_a
from lightning_peft.cli.closing import interruption, print_closing
from lightning_peft.cli.faults import callback_faults, find_faults, method_fault, value_faults
from lightning_peft.cli.inspect import InspectingTrainer
from lightning_peft.cli.reading import read_arguments
from lightning_peft.cli.reporting import Interrupted
from lightning_peft.methods.base import Method
from lightning_peft.methods.errors import PEFTError
from lightning_peft.state import read_checkpoint
from lightning_peft.tracking import AdapterMonitor, PredictionFile
from lightning_peft.tracking.guard import Guard
from lightning_peft.tracking.weights_and_biases.runs import log_configuration, own_run, start_runs


def run(words: list[str]) -> int:
    """Run the verb that is among `words`, as LightningCLI does.

    Raises:
        PEFTError: with all that is wrong with the configuration.
        Interrupted: the user stopped it.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    with own_run():
        PEFTCLI(words)
    return 0


def build_model(words: list[str], known: Mapping[str, Any]) -> pl.LightningModule:
    """The model that a configuration's section `model` describes, as `fit` makes it, and nothing else of it.

    Args:
        words: `--config FILE` and `--model…` options.
        known: values for arguments that the section leaves at None, such as a checkpoint's hyper-parameters.

    Raises:
        PEFTError: with all that is wrong with the configuration.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    model: pl.LightningModule = ModelCLI(["fit", *words], known).model
    return model


class KeepConfigCallback(SaveConfigCallback):
    """Writes the run's configuration, as `config.1.yaml` and so on where the folder has another `config.yaml`; to W&B
    and others it goes as `config`, as the module's hyper-parameters stand beside it there."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write it, once."""
        if not self.already_saved and trainer.log_dir is not None:
            self.config_filename = self._free_name(Path(trainer.log_dir) / self.config_filename)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give it to the loggers that have no folder of their own with it, on the first rank; one that fails goes
        without."""
        guard = Guard("the configuration")
        for logger in trainer.loggers:
            if not isinstance(logger, (CSVLogger, TensorBoardLogger)):
                with guard.trying(f"logging to {type(logger).__name__}"):
                    config = json.loads(self.parser.dump(self.config, skip_none=False, format="json"))
                    log_configuration(logger, {"config": config})

    def _free_name(self, path: Path) -> str:
        content = self.parser.dump(self.config, skip_none=False)
        names = itertools.chain([path], (path.with_suffix(f".{number}{path.suffix}") for number in itertools.count(1)))
        return next(file.name for file in names if not file.exists() or file.read_text(encoding="utf-8") == content)


class PEFTCLI(LightningCLI):
    """LightningCLI whose `peft:` section adds the callback, and which tells all faults at once.

    A model is built as the configuration says, also where `ckpt_path` names a checkpoint of other hyper-parameters.

    Args:
        words: the verb and what comes after it.
    """

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.verb = next(word for word in words if word in RUNS)
        parser = {"exit_on_error": False}
        super().__init__(
            trainer_class=InspectingTrainer,
            save_config_callback=None if self.verb == "inspect" else KeepConfigCallback,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={**parser, "prog": "lightning-peft", self.verb: dict(parser)},
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The verb that is asked for, and what it is given by other means: a parser for each would take a second."""
        every = {**super().subcommands(), "inspect": {"model", "datamodule"}}
        return {self.verb: every[self.verb]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the section `peft`: the callback's arguments, of which the method may be left out, and all with it."""
        parser.add_class_arguments(PEFT, "peft", instantiate=False, sub_configs=True, skip={"method"})
        parser.add_argument(
            "--peft.method",
            type=Method | None,
            default=None,
            help="the method, such as LoRA; null is full fine-tuning",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the words; on a fault, find all of them."""
        try:
            self.config = parser.parse_args(self.words)
        except ArgumentError as error:
            known = self._parser(self.verb).get_defaults(skip_validation=True).as_dict()
            raise PEFTError(find_faults(self.verb, self._options(), list(known)) or [error.message]) from error

    def before_instantiate_classes(self) -> None:
        """Ask the classes for what they refuse, before any does work."""
        config = self.config[self.verb].as_dict()
        faults = [*value_faults(config), *callback_faults(config["peft"] or {})]
        if not (config["peft"] or {}).get("method"):
            faults += method_fault(self._options())
        if faults:
            raise PEFTError(list(dict.fromkeys(faults)))
        self._advise_rate()

    def _advise_rate(self) -> None:
        """Give a model that takes a learning rate, and is given none, the one that suits the method; and an optimizer
        of the model's, where it is given none, the model's."""
        section = self.config[self.verb]
        arguments, method = section.model.get("init_args"), (section.peft or {}).get("method")
        if arguments is None or "learning_rate" not in arguments:
            return
        if method and arguments["learning_rate"] is None:
            cls = find_class(method.class_path, [Method]).cls
            arguments["learning_rate"] = getattr(cls, "learning_rate", None)
        optimizer = arguments.get("optimizer")
        if optimizer and arguments["learning_rate"] is not None and not _names_rate(self._options()):
            optimizer.init_args["lr"] = arguments["learning_rate"]

    def instantiate_classes(self) -> None:
        """As LightningCLI does, by the parser's current function."""
        self.config_init = self._instantiate(self._without_absent_wandb())
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        self._optimize_later()
        self.trainer = self.instantiate_trainer()

    def _without_absent_wandb(self) -> Any:
        """The configuration; where W&B is asked for and not installed, without it, and with Lightning's own choice of a
        logger if there is no other.

        Raises:
            PEFTError: a strict AdapterMonitor is asked for too.
        """
        if find_spec("wandb") is not None:
            return self.config
        trainer = self.config[self.verb].trainer
        loggers = as_list(trainer.logger)
        others = [logger for logger in loggers if not is_a(logger, WandbLogger)]
        monitors = [callback for callback in as_list(trainer.callbacks) if is_a(callback, AdapterMonitor)]
        strict = any((monitor.get("init_args") or {}).get("strict") for monitor in monitors)
        if len(others) == len(loggers):
            return self.config
        told = "wandb is not installed; pip install 'lightning-peft[wandb]'"
        if strict:
            raise PEFTError(f"trainer.logger: {told}")
        rank_zero_warn(f"trainer.logger: {told}. W&B gets nothing of this run")
        config = self.config.clone()
        config[self.verb].trainer.logger = others or True
        return config

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The Trainer, with the callback first: others copy or count what it injects.

        Raises:
            PEFTError: a value that the Trainer refuses.
        """
        section = self._get(self.config_init, "peft")
        if section is not None and section.method is not None:
            others = as_list(self._get(self.config_init, "trainer").callbacks)
            kwargs["callbacks"] = [PEFT(**section.as_dict()), *others]
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise PEFTError(f"trainer: {error}") from error

    def fit(self, **kwargs: Any) -> None:
        """Train, and say what came of it."""
        self.trainer.fit(**kwargs)
        class_path = self._get(self.config, "model").class_path
        rank_zero_only(print_closing)(self.trainer, class_path, self.words)

    def predict(self, **kwargs: Any) -> None:
        """Write predictions into a file, and say where it is; it is the callback's that the Trainer may have."""
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        writers = [callback for callback in callbacks if isinstance(callback, PredictionFile)] or [PredictionFile()]
        callbacks += [writer for writer in writers if writer not in callbacks]
        self.trainer.predict(**{**kwargs, "return_predictions": False})
        for writer in writers:
            rank_zero_only(_print_predictions)(writer.file(self.trainer))

    def _optimize_later(self) -> None:
        """Have the section `optimizer` carried out once the module is asked for its optimizer: LightningCLI's own would
        be made now, of a model without adapters."""
        optimizer, lr_scheduler = (self._get(self.config_init, name) for name in ("optimizer", "lr_scheduler"))
        if optimizer:
            fn = partial(_configured, optimizer=optimizer, lr_scheduler=lr_scheduler)
            update_wrapper(fn, _configured)  # by which Lightning tells that there is one
            self.model.configure_optimizers = MethodType(fn, self.model)

    def _instantiate(self, config: Any) -> Any:
        try:
            return self.parser.instantiate(config)
        except ValueError as error:
            # the parser wraps what a constructor raises, and so its kind would be lost
            cause = next((cause for cause in _causes(error) if isinstance(cause, (PEFTError, ImportError))), error)
            raise cause from cause.__cause__

    def _options(self) -> list[str]:
        position = self.words.index(self.verb)
        return [*self.words[:position], *self.words[position + 1 :]]

    def _run_subcommand(self, subcommand: str) -> None:
        on_interrupt = signal.getsignal(signal.SIGINT)
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if subcommand != "inspect":
            strict = any(isinstance(callback, AdapterMonitor) and callback.strict for callback in callbacks)
            start_runs(self.trainer, strict)
        try:
            super()._run_subcommand(subcommand)
        except SystemExit:
            if not self.trainer.interrupted:
                raise
            signal.signal(signal.SIGINT, on_interrupt)
            raise Interrupted(interruption(self.trainer, self.verb, self.words)) from None

    def _parse_ckpt_path(self) -> None:
        # LightningCLI would lay the checkpoint's hyper-parameters over the configuration, command line included
        options = self.config[self.verb]
        path = options.get("ckpt_path")
        if path and path not in ("best", "last", "hpc") and ":" not in str(path) and not Path(path).is_dir():
            # without the tensors: a bad file is told before data is prepared
            read_checkpoint(path, "meta", options.get("weights_only") is not False)


def _names_rate(words: list[str]) -> bool:
    """Whether a configuration gives the model's optimizer a learning rate of its own, or hides it in another file."""
    found: Any = read_arguments(words)[0]
    for name in ("model", "init_args", "optimizer"):
        if not isinstance(found, dict) or name not in found:
            return True
        found = found[name]
    return isinstance(found, dict) and "lr" in (found.get("init_args") or {})


def _configured(module: pl.LightningModule, optimizer: Any, lr_scheduler: Any) -> Any:
    """What `configure_optimizers` returns for the sections of that name."""
    made = instantiate_class(module.parameters(), optimizer)
    schedule = instantiate_class(made, lr_scheduler) if lr_scheduler else None
    return LightningCLI.configure_optimizers(module, made, schedule)


def _print_predictions(file: Path) -> None:
    with file.open(encoding="utf-8") as lines:
        print(f"Predictions  {file} ({sum(1 for _ in lines):,} rows)")


class ModelCLI(PEFTCLI):
    """Makes the model of a configuration, and neither data nor Trainer.

    Args:
        words: `fit` and what comes after it.
        known: values for the model's arguments that the configuration leaves at None.
    """

    def __init__(self, words: list[str], known: Mapping[str, Any]) -> None:
        self.known = known
        super().__init__(words)

    def instantiate_classes(self) -> None:
        """The model alone."""
        arguments = self.config[self.verb].model.get("init_args") or {}
        for name, value in self.known.items():
            if name in arguments and arguments[name] is None:
                arguments[name] = value
        config = self.config.clone()
        for name in set(config[self.verb].as_dict()) - {"model"}:
            config[self.verb][name] = None
        self.model = self._get(self._instantiate(config), "model")

    def _run_subcommand(self, subcommand: str) -> None: ...


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
