"""In which order training rows come: by length, or as a stream gives them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

if TYPE_CHECKING:
    from datasets import Dataset

GROUP = 50
"""Batches' worth of rows that are sorted by length together: enough to pad little, few enough to stay random."""
SHUFFLED = 10_000
"""Rows of a stream that are held to draw the next one from."""


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
        order += order[: self.total_size - len(order)]
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


class StreamLoader(DataLoader[Any]):
    """Batches of a stream of `datasets`, shuffled in a buffer by seed and epoch; ranks and workers have rows of their
    own.

    Args:
        stream: an `IterableDataset` of `datasets`.
        trainer: tells the epoch and the ranks; None is one rank, and no epochs.
        seed: with the epoch, fixes the order.
        **options: as in torch's DataLoader.
    """

    def __init__(self, stream: Any, trainer: L.Trainer | None, seed: int, **options: Any) -> None:
        from datasets.distributed import split_dataset_by_node

        ranks = (trainer and trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        stream = split_dataset_by_node(stream, rank=ranks["rank"], world_size=ranks["num_replicas"])
        self._trainer = trainer
        super().__init__(stream.shuffle(seed, buffer_size=SHUFFLED), **options)

    def __iter__(self) -> Any:
        stream: Any = self.dataset
        stream.set_epoch(self._trainer.current_epoch if self._trainer is not None else 0)
        return super().__iter__()


def lengths(table: Dataset) -> list[int]:
    """The number of tokens of each row."""
    import pyarrow.compute

    counted: list[int] = pyarrow.compute.list_value_length(table.with_format("arrow")["input_ids"][:]).to_pylist()
    return counted
