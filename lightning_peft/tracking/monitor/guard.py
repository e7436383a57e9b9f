"""What may fail without ending a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_utilities.core.rank_zero import rank_zero_warn


class Guard:
    """Lets a run go on where something that only reports on it fails, and says so once.

    Args:
        who: what the warning begins with.
        strict: raise instead.
    """

    def __init__(self, who: str, strict: bool = False) -> None:
        self._who, self._strict = who, strict
        self._failed: dict[str, str] = {}

    @contextmanager
    def trying(self, what: str) -> Iterator[bool]:
        """Take what is raised for `what`'s failure; a reason that was told is not told again. It gives whether `what`
        has not failed yet, and so is to be tried."""
        try:
            yield what not in self._failed
        except Exception as error:
            if self._strict:
                raise
            reason = f"{type(error).__name__}: {error}"
            if reason not in self._failed.values():
                rank_zero_warn(f"{self._who}: {what} failed and is left out, the run goes on ({reason})")
            self._failed[what] = reason
