"""In which order training rows come: by length, or as a stream gives them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_peft.methods.errors import PEFTError

if TYPE_CHECKING:
    from datasets import Dataset

GROUP = 50
"""Batches' worth of rows that are sorted by length together: enough to pad little, few enough to stay random."""
SHUFFLED = 10_000
"""Rows of a stream that are held to draw the next one from."""
AHEAD = 8
"""Batches of a stream after which the ranks ask each other whether all have more."""


class LengthGroupedSampler(DistributedSampler[Any]):
    """Random rows such that a batch's are of similar length; batches come in random order.

    It is the ranks' own sampler, since one that Lightning would wrap is not told the epoch.

    Args:
        lengths: the number of tokens of each row.
        batch_size: rows per batch and rank.
        num_replicas: the number of ranks that share the rows.
        rank: which of them this is.
        seed: with the epoch, fixes the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, num_replicas: int, rank: int, seed: int = 0) -> None:
        super().__init__(range(len(lengths)), num_replicas, rank, seed=seed)  # type: ignore[arg-type]
        self.lengths, self.batch_size = lengths, batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        order = (order * self.num_replicas)[: self.total_size]
        step = self.batch_size * self.num_replicas
        batches = []
        for start in range(0, len(order), GROUP * step):
            group = sorted(order[start : start + GROUP * step], key=self.lengths.__getitem__, reverse=True)
            batches += [group[at : at + step] for at in range(0, len(group), step)]
        # the one that is not full has to stay last
        full = [batch for batch in batches if len(batch) == step]
        rest = [batch for batch in batches if len(batch) < step]
        shuffled = [full[place] for place in torch.randperm(len(full), generator=generator).tolist()]
        return iter([row for batch in [*shuffled, *rest] for row in batch[self.rank :: self.num_replicas]])


@dataclass(frozen=True)
class Stream:
    """A stream of rows as they are read, and how to encode them.

    Rows are shared out and shuffled before they are encoded: no rank tokenizes another's, and the buffer holds texts,
    which are smaller than lists of tokens.

    Attributes:
        raw: an `IterableDataset` of `datasets`.
        maps: the arguments of one `map` after another.
    """

    raw: Any
    maps: tuple[dict[str, Any], ...] = ()

    def map(self, function: Any, **options: Any) -> Stream:
        """The stream with one more `IterableDataset.map`; `function` None leaves the rows as they are."""
        return replace(self, maps=(*self.maps, {"function": function, **options}))

    def rows(self, num_replicas: int, rank: int, seed: int) -> Any:
        """The encoded rows of a rank, shuffled, as an `IterableDataset`."""
        stream = self.raw
        if num_replicas > 1:
            # by rows and not by files, so that the ranks' shares differ by a row of each shard at most
            ranks = {"num_replicas": num_replicas, "rank": rank}
            stream = stream.filter(_of_rank, with_indices=True, batched=True, fn_kwargs=ranks)
        stream = stream.shuffle(seed, buffer_size=SHUFFLED)
        for options in self.maps:
            stream = stream.map(**options)
        return stream


def _of_rank(_: Any, indices: list[int], num_replicas: int, rank: int) -> list[bool]:
    return [index % num_replicas == rank for index in indices]


class StreamLoader(DataLoader[Any]):
    """Batches of a stream, shuffled in a buffer by seed and epoch, each rank and worker with its own rows.

    All ranks give the same number of batches: they end with the first that has no more, since the others would wait
    for its gradients forever.

    Args:
        stream: the stream.
        trainer: tells the epoch and the ranks; None is one rank, and no epochs.
        seed: with the epoch, fixes the order.
        **options: as in torch's DataLoader.
    """

    def __init__(self, stream: Stream, trainer: L.Trainer | None, seed: int, **options: Any) -> None:
        ranks = (trainer and trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        super().__init__(stream.rows(**ranks, seed=seed), **options)
        self._trainer = trainer
        self._alone = ranks["num_replicas"] == 1

    def __iter__(self) -> Any:
        self.dataset.set_epoch(self._trainer.current_epoch if self._trainer is not None else 0)  # type: ignore[attr-defined]
        batches = super().__iter__()
        try:
            if self._alone:
                yield from batches
                return
            all_have = AHEAD
            while all_have == AHEAD:
                ahead = list(islice(batches, AHEAD))
                all_have = self._least(len(ahead))
                yield from ahead[:all_have]
        except PEFTError as error:
            # torch puts a worker's traceback into the message
            raise PEFTError(str(error).rsplit("PEFTError: ", 1)[-1].strip().splitlines()) from None

    def _least(self, count: int) -> int:
        assert self._trainer is not None
        strategy = self._trainer.strategy
        least: Any = strategy.reduce(torch.tensor(count, device=strategy.root_device), reduce_op="min")
        return int(least)


def lengths(table: Dataset) -> list[int]:
    """The number of tokens of each row."""
    import pyarrow.compute

    counted: list[int] = pyarrow.compute.list_value_length(table.with_format("arrow")["input_ids"][:]).to_pylist()
    return counted
