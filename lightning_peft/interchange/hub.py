"""An exported adapter, or a merged model, to a repository on the Hugging Face hub."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_peft.methods.errors import PEFTError, suggestion

NEVER = (
    "*.ckpt", "*.ckpt/*", ".*", "*/.*", "optimizer*", "*/optimizer*", "scheduler.pt", "*/scheduler.pt", "rng_state*",
    "*/rng_state*",
)  # fmt: skip
"""What is left out: checkpoints, the state of training, and dot-files. `*` matches slashes too."""
ADAPTER = ("adapter_config.json", "adapter_model.*")
MODEL = ("config.json", "model*.safetensors")
WRITES = "a token with permission to write"


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload by lightning-peft",
) -> str:
    """Upload the files of `folder` to `repo`, which is made where it does not exist.

    The hub is the one at `HF_ENDPOINT`; the token is `HF_TOKEN` or the one that `hf auth login` stored.

    Args:
        folder: holds an exported adapter or a merged model. Checkpoints, optimizers' states and dot-files are left out.
        repo: `org/name`, or `name` for the token's owner.
        private: make it private; one that exists stays as it is.
        revision: the branch, made where it does not exist; by default `main`.
        message: the commit's.

    Returns:
        The address of the repository, or of the branch.

    Raises:
        PEFTError: the folder holds neither adapter nor model, the name can't be one, there is no token or it may not
            write there, or the hub can't be reached.
    """
    from huggingface_hub import HfApi, get_token

    source = Path(folder)
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    faults = [*_folder_faults(source), *_name_faults(repo)]
    token = get_token()
    if token is None:
        faults.append(f"there is no token; run `hf auth login`, or set HF_TOKEN to {WRITES} ({endpoint})")
    if faults:
        raise PEFTError([f"push: {fault}" for fault in faults])
    api = HfApi(endpoint=endpoint, token=token)
    try:
        created = api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(created.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=created.repo_id,
            folder_path=source,
            revision=revision,
            commit_message=message,
            ignore_patterns=list(NEVER),
        )
    except Exception as error:
        told = _reason(error, endpoint, repo)
        if told is None:
            raise
        # not `from error`: what it came from may hold the request with its token
        raise PEFTError(f"push: {told.replace(str(token), '…')}") from None
    return str(created) if revision is None else f"{created}/tree/{revision}"


def uploaded_files(folder: Path) -> list[Path]:
    """The files of `folder` that `push` uploads, sorted."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(path for path in files if not _left_out(path.relative_to(folder).as_posix()))


def _left_out(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in NEVER)


def _folder_faults(folder: Path) -> list[str]:
    if not folder.is_dir():
        near = [str(other) for other in folder.parent.iterdir()] if folder.parent.is_dir() else []
        return [f"there is no folder {str(folder)!r}{suggestion(str(folder), near)}"]
    for config, weights in (ADAPTER, MODEL):
        if (folder / config).is_file() and any(folder.glob(weights)):
            return []
    return [
        f"{folder} holds no adapter ({' and '.join(ADAPTER)}) and no model ({' and '.join(MODEL)}); write one first by "
        "`lightning-peft export` or `lightning-peft merge`"
    ]


def _name_faults(repo: str) -> list[str]:
    from huggingface_hub import utils
    from huggingface_hub.errors import HFValidationError

    hub_utils: Any = utils
    try:
        hub_utils.validate_repo_id(repo)
    except HFValidationError as error:
        rule = str(error).split("\n")[0].split(", got")[0].split(": '")[0].rstrip(".")
        return [f"{repo!r} can't be a repository: {rule}; give ORG/NAME"]
    return []


def _reason(error: BaseException, endpoint: str, repo: str) -> str | None:
    """What went wrong, in words; None for what is no fault of the request or the network."""
    from huggingface_hub import errors

    hub_errors: Any = errors
    for cause in _causes(error):
        if isinstance(cause, errors.HfHubHTTPError):
            return _answer(cause, endpoint, repo)
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return f"{endpoint} can't be reached: HF_HUB_OFFLINE is set; unset it to upload"
        if isinstance(cause, (hub_errors.HTTPError, ConnectionError, TimeoutError)):
            return f"{endpoint} can't be reached ({_line(cause)}); check the network, and HF_ENDPOINT"
    return f"{endpoint} refuses it: {_line(error)}" if isinstance(error, ValueError) else None


def _answer(error: Any, endpoint: str, repo: str) -> str:
    status = error.response.status_code
    if status == 401:
        return f"{endpoint} does not accept the token (401); set HF_TOKEN to {WRITES}, or run `hf auth login`"
    if status == 403:
        said = f": {error.server_message}" if error.server_message else ""
        return (
            f"the token may not write to {repo!r} (403{said}); use {WRITES} of a member of {repo.partition('/')[0]!r}"
        )
    if status == 404:
        return f"{endpoint} has no {repo!r}, or the token may not see it (404); check the name"
    return f"{endpoint} answers {status}: {error.server_message or _line(error)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
