"""Python programs in processes of their own that start at once: they are forked off one that has imported it all."""

from __future__ import annotations

import io
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import connection, get_context
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTED = ["lightning_peft.callback", "lightning_peft.strategies", "lightning_peft.tasks", "lightning_peft.data"]
"""What takes seconds to import: once, in the process that the others are forked from."""
_context = get_context("forkserver")
_context.set_forkserver_preload(IMPORTED)


class Forked:
    """A running program, with `subprocess.Popen`'s names.

    Args:
        words: what `python` is given: a file, or `-m` and a module, or `-c` and code; and arguments.
        environment: all that the program finds in `os.environ`.
        log: where standard output and error are written.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._process = _context.Process(target=_run, args=(list(words), dict(environment), str(log)))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As `Popen`'s: the negative signal's number of a program that was killed."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, as soon as it has ended.

        Raises:
            TimeoutError: it runs still.
        """
        connection.wait([self._process.sentinel], timeout)
        self._process.join(0 if timeout is not None else None)
        if self._process.exitcode is None:
            raise TimeoutError(f"{self.pid} has run for {timeout} seconds")
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)


def _run(words: list[str], environment: dict[str, str], log: str) -> None:
    """What Python does with `words`, in this process."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(n, "wb", 0), write_through=True) for n in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))

    import torch

    # OpenMP has read its variable already, in the process that this one is forked from
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")
