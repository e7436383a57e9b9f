"""The package's one exception for a user's mistake, and the search for the name that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class PEFTError(ValueError):
    """A mistake that the user can mend: what was given, why it can't be, what to do.

    The command line prints its message without a traceback and exits with 2.

    Args:
        faults: one message, or all that were found in one pass.
    """

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults))

    def __reduce__(self) -> tuple[type[PEFTError], tuple[tuple[str, ...]]]:
        # the default would rebuild it from the joined message, and lose the list when a worker process raises it
        return type(self), (self.faults,)


def nearest(name: str, candidates: Iterable[str], limit: int = 3) -> list[str]:
    """Up to `limit` of `candidates` closest to `name`, best first: one alone where only its case differs, none where
    none is close."""
    by_key = {candidate.lower(): candidate for candidate in candidates}
    if name.lower() in by_key:
        return [by_key[name.lower()]]
    matches = difflib.get_close_matches(name.lower(), by_key, n=limit, cutoff=0.5)
    contained = [key for key in by_key if name and (name.lower() in key or key in name.lower())]
    return [by_key[key] for key in dict.fromkeys([*matches, *contained])][:limit]


def suggestion(name: str, candidates: Iterable[str]) -> str:
    """`"; did you mean 'query' or 'query_proj'?"` for the nearest candidates, or `""` where none is close."""
    names = [repr(match) for match in nearest(name, candidates)]
    return f"; did you mean {' or '.join(names)}?" if names else ""


def some(names: Sequence[str], most: int = 3) -> str:
    """The first `most` names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
