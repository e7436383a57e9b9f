"""Checkpoints out of Weights & Biases, by the address of an artifact."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lightning_peft.methods.errors import PEFTError, suggestion
from lightning_peft.state import read_checkpoint, spec_of

FORM, EXAMPLE = "wandb://ENTITY/PROJECT/NAME:ALIAS", "wandb://me/reviews/adapter-3kq:best"
TYPE = "model"
"""Of which the checkpoints of this package and of WandbLogger are."""
USUAL = ("adapter.ckpt", "model.ckpt")
"""What the two call a checkpoint in its artifact."""
MISSING = "there is no such artifact"
LOG_IN = "run `wandb login`, or set WANDB_API_KEY"


def is_address(source: str) -> bool:
    """Whether `source` is meant as an artifact's address."""
    return source.startswith("wandb:")


def fetch_checkpoint(address: str, folder: Path) -> Path:
    """Download the adapter-only checkpoint of an artifact.

    Nothing in it is run: it is read with `weights_only=True`.

    Args:
        address: `wandb://entity/project/name:alias`, with an alias such as `best` or a version such as `v3`; in a
            registry, the organization and `wandb-registry-NAME` stand for the first two.
        folder: where the file is put.

    Returns:
        The file.

    Raises:
        PEFTError: the address has another form; nobody is logged in; W&B can't be reached, or has no such artifact; it
            holds no checkpoint, or one without an adapter.
        ModuleNotFoundError: wandb is not installed.
    """
    entity, project, name, alias = _parts(address)
    import wandb

    api = None
    try:
        api = wandb.Api()
        artifact = api.artifact(f"{entity}/{project}/{name}:{alias}")
        entry = artifact.get_entry(_checkpoint_in(list(artifact.manifest.entries), address))
        file = Path(entry.download(root=str(folder)))
    except PEFTError:
        raise
    except Exception as error:
        told = _reason(error, f"{entity}/{project}")
        if told is None:
            raise
        if told == MISSING:
            told += _nearest(api, entity, project, name, alias)
        raise PEFTError(f"{address}: {told}") from error
    spec_of(read_checkpoint(file, "meta"), address)
    return file


def _reason(error: Exception, project: str) -> str | None:
    """What went wrong, in words; None for what is no fault of the request or the network."""
    import wandb

    text = " ".join(str(error).split())[:200]
    if isinstance(error, wandb.errors.UsageError) and "api key" in text.lower().replace("_", " "):
        return f"W&B knows no key of yours here; {LOG_IN}"
    if isinstance(error, wandb.errors.AuthenticationError):
        return f"W&B does not let you in ({text}); {LOG_IN}"
    if "not found under entity" in text:
        return f"there is no project {project}, or it is not shown to you"
    if "not found" in text:
        return MISSING
    # requests' are OSErrors, and those of wandb's own process have no public class
    known = isinstance(error, (wandb.errors.Error, ValueError, OSError)) or type(error).__module__.startswith("wandb.")
    return f"W&B does not give it ({text or type(error).__name__}); check the network" if known else None


def _parts(address: str) -> tuple[str, str, str, str]:
    match = re.fullmatch(r"wandb://([^/:]+)/([^/:]+)/([^/:]+):([^/:]+)", address)
    if match is None:
        lacks_alias = re.fullmatch(r"wandb://[^/:]+/[^/:]+/[^/:]+", address) is not None
        example = f"{address}:best or {address}:v0" if lacks_alias else EXAMPLE
        raise PEFTError(f"{address!r} is no address of an artifact; give {FORM}, for example {example}")
    entity, project, name, alias = match.groups()
    return entity, project, name, alias


def _checkpoint_in(names: list[str], address: str) -> str:
    found = [name for name in names if name.endswith(".ckpt")]
    usual = [name for name in USUAL if name in found]
    if usual or len(found) == 1:
        return [*usual, *found][0]
    shown = ", ".join(sorted(found or names)[:5]) or "nothing"
    if found:
        raise PEFTError(f"{address}: holds several checkpoints ({shown}), and none of them is {' or '.join(USUAL)}")
    raise PEFTError(f"{address}: holds no checkpoint (*.ckpt) but {shown}")


def _nearest(api: Any, entity: str, project: str, name: str, alias: str) -> str:
    """What of the address is wrong, and what there is; empty where W&B does not say."""
    try:
        there = {found.name: found for found in api.artifact_collections(f"{entity}/{project}", TYPE)}
        if name not in there:
            some = ", ".join(sorted(there)[:5]) or "none"
            return suggestion(name, there) or f"; in {entity}/{project} there is {some}"
        aliases = list(there[name].aliases)
        return suggestion(alias, aliases) or f"; {name} has {', '.join(aliases[:5]) or 'no alias'}"
    except Exception as error:
        if _reason(error, "") is None:
            raise
        return ""
