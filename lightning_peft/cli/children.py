"""A run in a process of its own, which ends when this one is told to."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

PATIENCE = 30.0
"""Seconds that a run is given to end after it was interrupted; Lightning writes its last files then."""
TICK = 0.2
LAST_LINES = 25
ENDING = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
"""What ends this process beside Ctrl-C."""


class ChildInterrupted(KeyboardInterrupt):
    """The user stopped this process while a child ran; the child has ended."""


def run_child(words: Sequence[str], log: Path, tick: Callable[[], None]) -> int:
    """Run `python -m lightning_peft` with these words in a fresh process, and wait for it.

    Args:
        words: the verb and what comes after it.
        log: the file that gets what it prints, on standard output and error.
        tick: called every fifth of a second meanwhile.

    Returns:
        Its exit code; that of one which a signal ended is the signal's number below zero.

    Raises:
        ChildInterrupted: this process was interrupted (Ctrl-C, SIGTERM, a terminal that is closed); the child was too,
            and has ended.
    """
    # a run's seed and place among others are its own
    others = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    environment = {name: value for name, value in os.environ.items() if name not in others}
    with log.open("wb") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "lightning_peft", *words],
            env={**environment, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C comes to this process alone, which hands it on once
        )
    # a closed terminal's signal is ignored by what nohup starts, and so stays
    numbers = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _stop) for number in numbers}
    try:
        while True:
            try:
                return child.wait(TICK)
            except subprocess.TimeoutExpired:
                tick()
    except KeyboardInterrupt:
        raise ChildInterrupted from None
    finally:
        _end(child)
        for number, handler in before.items():
            signal.signal(number, handler)


def last_lines(log: Path) -> str:
    """What was printed last, without colours."""
    try:
        text = log.read_bytes().decode("utf-8", "replace")  # carriage returns are kept so
    except OSError:
        return ""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    # of a progress bar, what it showed last
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in plain.replace("\r\n", "\n").split("\n")]
    return "\n".join([line for line in lines if line][-LAST_LINES:])


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a child that runs, and what it has started: politely at first."""
    if os.name == "nt":
        child.terminate()
        child.wait()
        return
    for number, patience in ((signal.SIGINT, PATIENCE), (signal.SIGTERM, 5.0), (signal.SIGKILL, None)):
        if child.poll() is not None:
            return
        try:
            os.killpg(child.pid, number)
            child.wait(patience)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            pass  # told once more, it goes on to the next
