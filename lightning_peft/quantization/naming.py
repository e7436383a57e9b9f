"""How the names in a file correspond to those of a model: the same, or with one prefix less, more, or exchanged."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from lightning_peft.methods.errors import PEFTError

MOST_OWNERS = 64
"""An ending such as "weight" that more names share says nothing about a prefix."""
CANDIDATES = 16


@dataclass(frozen=True)
class Prefixes:
    """What a key of a file loses in front, where it has it, and what it gets instead, to be a name of the model."""

    lost: str = ""
    gained: str = ""

    def name(self, key: str) -> str:
        """The name in the model that `key` stands for."""
        return self.gained + key.removeprefix(self.lost)


def find_prefixes(keys: Collection[str], names: Mapping[str, int]) -> Prefixes:
    """The prefixes with which most of `keys` are names of the model; none where they are so as they stand.

    It finds a transformers body in a file of the whole model and the reverse, and a model that is an attribute of a
    LightningModule: in each, all names differ by what stands in front.

    Args:
        keys: of the file.
        names: the model's, each with a number that it shares with the other names of the same tensor.

    Raises:
        PEFTError: several parts of the model fit equally well, such as layers that are all alike.
    """
    if all(key in names for key in keys):
        return Prefixes()
    votes = _votes(keys, names)
    candidates = [Prefixes(), *(pair for pair, _ in votes.most_common(CANDIDATES))]
    fits = {pair: {names[name] for key in keys if (name := pair.name(key)) in names} for pair in candidates}
    best = max(candidates, key=lambda pair: len(fits[pair]))  # the first of equals: no prefix, where that does as well
    rivals = [pair for pair in fits if len(fits[pair]) == len(fits[best]) and fits[pair] != fits[best]]
    if best != Prefixes() and rivals:
        places = ", ".join(sorted({pair.gained.rstrip(".") or "the model itself" for pair in (best, *rivals)})[:5])
        raise PEFTError(
            f"the tensors in the file fit several parts of the model equally well: {places}; load each part by itself, "
            "or give the tensors the model's own names"
        )
    return best


def _votes(keys: Collection[str], names: Mapping[str, int]) -> Counter[Prefixes]:
    """How often a pair of prefixes leaves a key and a name with the same, longest ending."""
    fronts: dict[str, list[str]] = defaultdict(list)
    for name in names:
        for front, ending in _splits(name):
            fronts[ending].append(front)
    votes: Counter[Prefixes] = Counter()
    for key in keys:
        for lost, ending in _splits(key):
            if ending in fronts:
                if len(fronts[ending]) <= MOST_OWNERS:
                    votes.update(Prefixes(lost, gained) for gained in fronts[ending])
                break
    return votes


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """`name` cut before each of its parts, the longest ending first."""
    start = 0
    while True:
        yield name[:start], name[start:]
        start = name.find(".", start) + 1
        if not start:
            return
