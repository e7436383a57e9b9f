"""What may fail without ending a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_peft.state.secrets import without_secrets

CALLED = ("log_hyperparams", "log_metrics", "after_save_checkpoint", "finalize")
"""What Lightning calls of a logger in a run."""


class Guard:
    """Lets a run go on where something that only reports on it fails, and says so once.

    Args:
        who: what the warning begins with.
        strict: raise instead.
    """

    def __init__(self, who: str, strict: bool = False) -> None:
        self._who, self.strict = who, strict
        self._failed: dict[str, str] = {}

    @contextmanager
    def trying(self, what: str) -> Iterator[bool]:
        """Take what is raised for `what`'s failure; a reason that was told is not told again. It gives whether `what`
        has not failed yet, and so is to be tried."""
        try:
            yield what not in self._failed
        except Exception as error:
            if self.strict:
                raise
            reason = f"{type(error).__name__}: {error}"
            if reason not in self._failed.values():
                rank_zero_warn(f"{self._who}: {what} failed and is left out, the run goes on ({reason})")
            self._failed[what] = reason


@dataclass(frozen=True)
class _Guarded:
    """One method of one logger, whose failures its guard takes; hyper-parameters are logged without secrets."""

    logger: Logger
    name: str
    guard: Guard

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self.name == "log_hyperparams":
            args, kwargs = without_secrets(args), without_secrets(kwargs)
        with self.guard.trying(f"{type(self.logger).__name__}.{self.name}"):
            getattr(type(self.logger), self.name)(self.logger, *args, **kwargs)


def guard_calls(logger: Logger, guard: Guard) -> None:
    """Let what Lightning itself calls of a logger fail without ending a run, each call on its own, unless the guard is
    strict; and keep secrets from its hyper-parameters.

    It holds for this logger, not for its class, until it is guarded by another one.
    """
    own = vars(logger)
    for name in CALLED:
        if name not in own or isinstance(own[name], _Guarded):
            own[name] = _Guarded(logger, name, guard)


def guard_of(logger: Logger) -> Guard:
    """What takes the failures of a logger's calls; of one that is not guarded, a guard that lets the run go on."""
    held = (call.guard for call in vars(logger).values() if isinstance(call, _Guarded))
    return next(held, None) or Guard(type(logger).__name__)
