"""Runs of several processes, started as a cluster's manager or torchrun starts them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.forked import ROOT, Forked

OURS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "PL_GLOBAL_SEED")


def accelerator(count: int = 2) -> str:
    """Where so many processes train: each on a GPU of its own, with nccl; or on the CPU, with gloo."""
    return "cuda" if torch.cuda.device_count() >= count else "cpu"


class Processes:
    """Commands that run at the same time; ended when the `with` is left.

    Args:
        folder: where what they print is written.
        fresh: start Python anew for each, which takes seconds, so that it reads its environment as it begins.
    """

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        self.folder, self.fresh = folder, fresh
        self._started: list[tuple[Forked | subprocess.Popen[bytes], Path]] = []

    def start(self, words: Sequence[object], **environment: object) -> Forked | subprocess.Popen[bytes]:
        """Start Python with these words, in the repository's root."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"process{len(self._started)}.log"
        kept = {name: value for name, value in os.environ.items() if name not in OURS}
        settings = {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1, "PYTHONUNBUFFERED": 1, **environment}
        given, variables = [str(word) for word in words], {**kept, **{name: str(v) for name, v in settings.items()}}
        process = _execute(given, variables, log) if self.fresh else Forked(given, variables, log)
        self._started.append((process, log))
        return process

    def wait_for(self, number: int, timeout: float = 120) -> float:
        """When the process that was started as `number` ended, on the monotonic clock."""
        self._started[number][0].wait(timeout)
        return time.monotonic()

    def finish(self, timeout: float) -> tuple[list[int], list[str]]:
        """Exit codes and what was printed, by process, once all have ended; those that don't in time are killed."""
        deadline = time.monotonic() + timeout
        for process, _ in self._started:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except (TimeoutError, subprocess.TimeoutExpired):
                _kill(process)
        codes = [process.wait() for process, _ in self._started]
        return codes, [log.read_text(errors="replace") for _, log in self._started]

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process, _ in self._started:
            if process.poll() is None:
                _kill(process)


def ranks(
    folder: Path, words: Sequence[object], count: int = 2, fresh: bool = False, **environment: object
) -> Processes:
    """`count` processes of one run on this machine, as a cluster's manager would start them."""
    processes = Processes(folder, fresh)
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": count}
    for rank in range(count):
        processes.start(words, **there, NODE_RANK=0, LOCAL_RANK=rank, **environment)
    return processes


def run_ranks(
    folder: Path,
    words: Sequence[object],
    count: int = 2,
    timeout: float = 150,
    fresh: bool = False,
    **environment: object,
) -> str:
    """What `ranks` print, when all of them have ended well."""
    with ranks(folder, words, count, fresh, **environment) as processes:
        codes, printed = processes.finish(timeout)
    assert codes == [0] * count, "\n".join(f"--- rank {rank} ---\n{text[-6000:]}" for rank, text in enumerate(printed))
    return "".join(printed)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _execute(words: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _kill(process: Forked | subprocess.Popen[bytes]) -> None:
    # with those that it started itself
    os.killpg(process.pid, signal.SIGKILL)
