"""How well tags such as `B-place` and `I-place` mark the right spans."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torchmetrics import Metric

from lightning_peft.tasks.task import IGNORED

_TAG = re.compile(r"O|[BIESLU]-.+")
_INSIDE, _LAST = frozenset("IEL"), frozenset("ESLU")


def are_entity_tags(names: Sequence[str]) -> bool:
    """Whether all names are tags of the schemes BIO (IOB1 and IOB2), BIOES or BILOU, and not just `O`."""
    return all(_TAG.fullmatch(name) for name in names) and any(name != "O" for name in names)


class EntityF1(Metric):
    """Precision, recall and F1 of entities, each right where its first word, last word and type are; micro-averaged.

    Entities are read from tags as the CoNLL evaluation does it: `I-`, `E-` and `L-` continue the entity of the word
    before where it has the same type and didn't end there (`E-`, `S-`, `L-`, `U-`), and start an entity anywhere else.

    Args:
        names: the tags, by label.
    """

    inside: torch.Tensor
    last: torch.Tensor
    outside: torch.Tensor
    kinds: torch.Tensor
    correct: torch.Tensor
    predicted: torch.Tensor
    actual: torch.Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        types = sorted({name[2:] for name in names})
        facts = [(name[0] in _INSIDE, name[0] in _LAST, name[0] == "O", types.index(name[2:])) for name in names]
        inside, last, outside, kinds = (torch.tensor(column) for column in zip(*facts, strict=True))
        for name, table in (("inside", inside), ("last", last), ("outside", outside), ("kinds", kinds)):
            self.register_buffer(name, table, persistent=False)
        for state in ("correct", "predicted", "actual"):
            self.add_state(state, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: torch.Tensor, labels: torch.Tensor) -> None:
        """Enter labels of shape (batch, tokens), int64; tokens whose true label is -100 are left out."""
        counted = labels != IGNORED
        rows = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)[counted]
        found, found_ends = self._spans(predictions[counted], rows)
        true, true_ends = self._spans(labels[counted], rows)
        self.correct += ((found == true) & (found_ends == true_ends) & (true >= 0)).sum()
        self.predicted += (found >= 0).sum()
        self.actual += (true >= 0).sum()

    def compute(self) -> dict[str, torch.Tensor]:
        """`entity_precision`, `entity_recall` and `entity_f1`, each 0 where there is nothing to divide by."""
        parts = {"precision": self.predicted, "recall": self.actual, "f1": (self.predicted + self.actual) / 2}
        return {f"entity_{name}": self.correct / total.clamp(min=1) for name, total in parts.items()}

    def _spans(self, tags: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each word of all rows in line: the type of the entity that starts there and its last word, or -1."""
        types, entity = self.kinds[tags], ~self.outside[tags]
        before, after = slice(None, -1), slice(1, None)
        goes_on = entity[before] & ~self.last[tags[before]] & self.inside[tags[after]]
        goes_on &= (types[before] == types[after]) & (rows[before] == rows[after])
        edge = goes_on.new_zeros(min(1, len(tags)))
        starts = entity & ~torch.cat([edge, goes_on])
        ends = entity & ~torch.cat([goes_on, edge])
        lasts = torch.full_like(tags, -1)
        lasts[starts] = ends.nonzero().flatten()
        return torch.where(starts, types, -1), lasts
