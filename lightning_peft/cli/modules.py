"""The LightningModules behind checkpoints and HF PEFT directories: built, loaded, and written to a checkpoint."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_peft import tasks
from lightning_peft.callback import load_adapter, load_from_checkpoint
from lightning_peft.cli import classes
from lightning_peft.cli.app import build_model
from lightning_peft.interchange.hf_peft_files import read_config, read_tensors
from lightning_peft.interchange.locations import resolve
from lightning_peft.methods.errors import PEFTError
from lightning_peft.state import KEY, AtomicCheckpointIO, read_checkpoint, spec_of

TASKS = {
    "SEQ_CLS": "SequenceClassification",
    "CAUSAL_LM": "CausalLM",
    "SEQ_2_SEQ_LM": "Seq2Seq",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
}
"""The task class of this package for HF peft's `task_type`."""
HEADS = (".classifier.weight", ".score.weight", ".classifier.out_proj.weight")


def load_adapted(path: str, words: list[str]) -> tuple[pl.LightningModule, dict[str, Any]]:
    """The module with the checkpoint's adapter on it, and the checkpoint.

    Args:
        path: the checkpoint.
        words: `--model=CLASS` for a class whose arguments the checkpoint holds; `--config=FILE` and other `--model…`
            options for a base that is built from them; none where the checkpoint says all.

    Raises:
        PEFTError: the file holds no adapter, the base can't be built, or the adapter does not fit it.
    """
    content = read_checkpoint(path)
    spec_of(content, path)
    parameters: Mapping[str, Any] = content.get("hyper_parameters") or {}
    option, _, name = words[0].partition("=") if len(words) == 1 else ("", "", "")
    if not words:
        _check_class(path, str(parameters.get("_class_path", "")))
        return load_from_checkpoint(pl.LightningModule, path), content
    if option == "--model":
        return load_from_checkpoint(_named_class(name, parameters), path), content
    module = build_model(words, parameters)
    load_adapter(module, content, path)
    return module, content


def _check_class(path: str, class_path: str) -> None:
    """That the class which the checkpoint names is there: nothing is imported because a checkpoint says so."""
    if not class_path:
        raise PEFTError(f"{path}: does not say which class it is of; give --model CLASS, or --config FILE")
    module, _, name = class_path.rpartition(".")
    if not hasattr(sys.modules.get(module), name):
        raise PEFTError(f"{path}: is of {class_path}, which no file is made to import; say --model {class_path}")


def _named_class(name: str, parameters: Mapping[str, Any]) -> Any:
    found = classes.find_class(name, [pl.LightningModule])
    if found.fault or found.cls is None:
        raise PEFTError(f"--model: {found.fault or f'{name} is no class'}")
    accepted = classes.parameters(found.cls)
    missing = [other for other, parameter in accepted.items() if parameter.required and other not in parameters]
    if missing:
        raise PEFTError(
            f"--model {name}: needs {', '.join(missing)}, which the checkpoint does not hold; give --config FILE, or "
            f"--model.{missing[0]} beside it"
        )
    return found.cls


def options_for(folder: Path, base: str | None) -> list[str]:
    """The `--model…` options that build the base of an HF PEFT directory.

    Args:
        folder: the directory.
        base: the base's place, where it is not the one that the directory names.

    Raises:
        PEFTError: the directory does not say what to build.
    """
    config = read_config(folder)
    task_type, place = config.get("task_type"), base or config.get("base_model_name_or_path")
    cls = getattr(tasks, TASKS.get(str(task_type), ""), None)
    if cls is None:
        known = ", ".join(kind for kind, name in TASKS.items() if hasattr(tasks, name))
        raise PEFTError(
            f"{folder}: its task_type is {task_type or 'null'}, for which there is no model here (there are {known}); "
            "give --config FILE, whose section `model` builds the base"
        )
    if not place:
        raise PEFTError(f"{folder}: does not name its base; give --base, its hub id or folder, or --config FILE")
    words = [f"--model={cls.__module__}.{cls.__name__}", f"--model.model={place}"]
    if "num_labels" in inspect.signature(cls).parameters:
        heads = [tensor for key, tensor in read_tensors(folder).items() if key.endswith(HEADS) and tensor.dim() == 2]
        words.append(f"--model.num_labels={heads[0].shape[0] if heads else _labels_of(str(place))}")
    return words


def _labels_of(place: str) -> int:
    from transformers import AutoConfig

    try:
        return int(AutoConfig.from_pretrained(resolve(place, "base")).num_labels)
    except (OSError, ValueError) as error:
        raise PEFTError(f"base: {place!r} can't be loaded: {' '.join(str(error).split())[:200]}") from error


class _FreshStart(AtomicCheckpointIO):
    """Leaves the random number generators out: a run that starts from the file is seeded as any other."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        checkpoint[KEY].pop("rng_states", None)
        super().save_checkpoint(checkpoint, path, storage_options)


def write_fresh_checkpoint(module: pl.LightningModule, path: Path) -> None:
    """Write the adapters of `module` as a checkpoint from before the first step, which `fit` can resume too."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[_FreshStart()],
    )
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=False)
