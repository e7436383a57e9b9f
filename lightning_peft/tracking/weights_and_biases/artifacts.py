"""Adapter-only checkpoints as artifacts of Weights & Biases, with what they were made of.

An artifact of wandb is known by its content: what is logged twice is uploaded once, and gets the aliases of both.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

from lightning_peft.state import KEY, read_checkpoint, spec_of
from lightning_peft.state.secrets import without_secrets
from lightning_peft.state.versions import installed
from lightning_peft.tracking.weights_and_biases.sources import Source, plain

if TYPE_CHECKING:
    from wandb import Artifact, Run

ADAPTER_TYPE = "model"
"""Only of this type, or one with the word in it, W&B's registry takes models."""
SOURCE_TYPES = {"base": "base-model", "dataset": "dataset"}
FILE = "adapter.ckpt"
"""The checkpoint's name in its artifact, always the same, as it is part of the content."""
PACKAGES = ("torch", "lightning", "transformers", "bitsandbytes", "wandb")

_logged: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()
"""For each run, the SHA-256 that each alias stands for, and that of each source by name."""


def checkpoints(trainer: pl.Trainer) -> dict[Path, list[str]]:
    """The files that the Trainer's ModelCheckpoints keep, which are `best`, `latest` or both.

    Best is that of the first ModelCheckpoint with a `monitor`; latest is the file that was written last.

    Returns:
        The aliases by file; one that stands there under two names, as `last.ckpt` may, counts once. A checkpoint that
        is a folder of shards is left out.
    """
    savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    best = [Path(saver.best_model_path) for saver in savers if saver.monitor and saver.best_model_path]
    names = {
        name
        for saver in savers
        for name in (saver.best_model_path, saver.last_model_path, *saver.best_k_models)
        if name
    }
    files = [path for path in map(Path, sorted(names)) if path.is_file()]
    found: dict[Path, list[str]] = {path: ["best"] for path in best[:1] if path.is_file()}
    if files:
        latest = max(files, key=lambda path: path.stat().st_mtime_ns)
        same = next((path for path in found if _sha256(path) == _sha256(latest)), latest)
        found.setdefault(same, []).append("latest")
    return found


@rank_zero_only
def log_checkpoint(
    logger: WandbLogger,
    path: str | Path,
    *,
    aliases: Sequence[str],
    metadata: Mapping[str, Any] | None = None,
    uses: Sequence[Source] = (),
) -> Artifact | None:
    """Log an adapter-only checkpoint as a version of the artifact `adapter-<run's id>`, of type `model`.

    A file for which these aliases stand already is not logged again. W&B gives `latest` to what is logged last,
    whatever its aliases: log the best one first. Where the logger has `log_model` set, Lightning uploads the same files
    as `model-<run's id>`, so that none is here; `uses` are noted all the same.

    wandb copies the file before this returns, and uploads it later on; ModelCheckpoint may delete it meanwhile.

    Args:
        logger: the logger, whose run is started where it isn't.
        path: a checkpoint in one file.
        aliases: `best`, `latest`, or both.
        metadata: plain values beside those that the checkpoint tells, which stand: method, base, hyper-parameters,
            metrics, versions and, where LightningCLI made the module, `class_path`; elsewhere, give that here. Texts
            that look secret become `…`.
        uses: what the run was made of, as `sources` tells it. Each is an artifact with its identity as JSON, of type
            `base-model` or `dataset`, which runs with the same share; noted once per run. The base's gets the
            fingerprint that the checkpoint holds.

    Returns:
        The artifact; None where none was logged, and on other ranks than the first.

    Raises:
        PEFTError: the file is unreadable, or it holds no adapter but a whole model.
        OSError: the copy can't be written.
    """
    checkpoint = read_checkpoint(path, "meta")
    spec = spec_of(checkpoint, str(path))
    run: Run = logger.experiment
    held = _logged.setdefault(run, {})
    for source in uses:
        _note(run, _with_fingerprint(source, spec), held)
    digest = _sha256(Path(path))
    # private: Lightning 2.6 says by nothing else that it logs checkpoints itself
    if logger._log_model or all(held.get(alias) == digest for alias in aliases):
        return None
    import wandb

    told = plain(metadata or {}) | {**_told(checkpoint), "sha256": digest}
    artifact = wandb.Artifact(f"adapter-{run.id}", type=ADAPTER_TYPE, metadata=without_secrets(told))
    artifact.add_file(str(path), name=FILE)
    logged = run.log_artifact(artifact, aliases=list(aliases))
    # wandb adds the second by itself
    held.update(dict.fromkeys([*aliases, "latest"], digest))
    return logged


def _told(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself, enough to build the model again."""
    spec: Mapping[str, Any] = checkpoint[KEY]
    parameters = checkpoint.get(pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY) or {}
    data = checkpoint.get(pl.LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY) or {}
    told = {
        "class_path": parameters.get("_class_path"),
        "method": spec["method"],
        "adapter_name": spec["adapter_name"],
        "modules_to_save": spec["modules_to_save"],
        "base": {name: spec.get(name) for name in ("quantization", "base_dtype", "stored")}
        | {"fingerprint": spec["base"]},
        "hyper_parameters": _public(parameters),
        "data": {"class_path": data.get("_class_path"), "hyper_parameters": _public(data)},
        "epoch": checkpoint.get("epoch"),
        "global_step": checkpoint.get("global_step"),
        "metrics": spec.get("metrics"),
        "versions": _versions(spec),
    }
    return {name: plain(value) for name, value in told.items() if value is not None}


def _versions(spec: Mapping[str, Any]) -> dict[str, Any]:
    here = {name: installed(name) for name in PACKAGES}
    return {"lightning-peft": spec.get("version"), "python": platform.python_version(), **here}


def _public(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if not str(name).startswith("_")}


def _with_fingerprint(source: Source, spec: Mapping[str, Any]) -> Source:
    if source.kind != "base":
        return source
    known = {"fingerprint": spec["base"], "stored": spec.get("stored"), "dtype": spec.get("base_dtype")}
    return Source(source.kind, source.name, {**source.identity, **known}, source.address)


def _note(run: Run, source: Source, held: dict[str, str]) -> None:
    """Tell W&B that the run used `source`."""
    import wandb

    name = re.sub(r"[^\w.-]+", "-", f"{'base' if source.kind == 'base' else 'data'}-{source.name}", flags=re.ASCII)
    content = json.dumps(without_secrets(plain(source.identity)), indent=2, sort_keys=True)
    if held.get(name) == content:
        return
    artifact = wandb.Artifact(
        name[:128],
        type=SOURCE_TYPES[source.kind],
        description=source.name,
        metadata=json.loads(content),
    )
    # the identity is in a file, and not in the metadata alone, since by files another version is told
    with artifact.new_file(f"{source.kind}.json", encoding="utf-8") as file:
        file.write(content)
    if source.address:
        artifact.add_reference(source.address, name="origin", checksum=False)
    if run.offline:
        # use_artifact asks the server, and refuses; this is what it does with a new artifact. Private, as of wandb 0.31
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(artifact)
    held[name] = content


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
