from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_peft.data import files, sampling
from lightning_peft.data.files import load_table
from lightning_peft.data.language_modeling import LanguageModelingData
from lightning_peft.data.sampling import LengthGroupedSampler, Stream, StreamLoader, lengths
from lightning_peft.methods.errors import PEFTError
from tests.data.decoders import save_tokenizer

Write = Callable[..., str]


def epoch(sizes: list[int], epoch: int, ranks: int = 1, batch: int = 4, seed: int = 0) -> list[list[int]]:
    """The rows of one epoch, by rank."""
    samplers = [LengthGroupedSampler(sizes, batch, ranks, rank, seed) for rank in range(ranks)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=200), ranks=st.integers(1, 5), batch=st.integers(1, 7))
def test_ranks_share_every_row_and_have_equally_many(sizes: list[int], ranks: int, batch: int) -> None:
    shares = epoch(sizes, 1, ranks, batch)
    each = -(-len(sizes) // ranks)
    assert [len(share) for share in shares] == [each] * ranks
    assert all(len(LengthGroupedSampler(sizes, batch, ranks, rank)) == each for rank in range(ranks))
    rows = [row for share in shares for row in share]
    assert set(rows) == set(range(len(sizes)))
    # only so many come twice as are needed to share evenly
    assert len(rows) - len(sizes) == -len(sizes) % ranks


@pytest.mark.parametrize("ranks", [1, 4])
def test_batches_of_similar_length_are_padded_less(ranks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 500, (4000,), generator=generator).tolist()

    def padding(rows: list[int]) -> int:
        batches = [[sizes[row] for row in rows[at : at + 8]] for at in range(0, len(rows), 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    grouped = sum(padding(rows) for rows in epoch(sizes, 0, ranks, batch=8))
    order = torch.randperm(4000, generator=generator).tolist()
    assert grouped * 10 < padding(order)
    # at the same step the ranks have batches of the same length, so that none waits for another
    first = [rows[:8] for rows in epoch(sizes, 0, ranks, batch=8)]
    longest = [max(sizes[row] for row in batch) for batch in first]
    assert max(longest) - min(longest) < 50


def test_order_is_fixed_by_seed_and_epoch() -> None:
    sizes = [number % 37 for number in range(500)]
    assert epoch(sizes, 3, 2) == epoch(sizes, 3, 2)
    assert epoch(sizes, 3, 2) != epoch(sizes, 4, 2)
    assert epoch(sizes, 3, 2) != epoch(sizes, 3, 2, seed=1)


def test_group_by_length_of_a_datamodule(write: Write, tmp_path: Path) -> None:
    rows = [{"text": "owls " * (1 + number * 7 % 60)} for number in range(200)]
    folder = save_tokenizer(tmp_path / "tokenizer")

    def padded(grouped: bool) -> float:
        options: dict[str, Any] = {"packing": False, "validation_fraction": 0, "batch_size": 8}
        data = LanguageModelingData(write("a.jsonl", rows), tokenizer=folder, group_by_length=grouped, **options)
        data.setup()
        sizes = lengths(data._encoded["train"])
        assert sizes == [len(ids) for ids in data._encoded["train"]["input_ids"]]
        masks = [batch["attention_mask"] for batch in data.train_dataloader()]
        assert sum(int(mask.sum()) for mask in masks) == sum(sizes)
        return 1 - sum(sizes) / sum(mask.numel() for mask in masks)

    assert padded(True) * 5 < padded(False)


# streams


class Ranks:
    """As much of a Trainer as a stream asks for, without a process group."""

    def __init__(self, rank: int, ranks: int, others: int = 10**9) -> None:
        self.distributed_sampler_kwargs = {"num_replicas": ranks, "rank": rank}
        self.current_epoch = 0
        self.strategy = SimpleNamespace(root_device="cpu", reduce=self.reduce)
        self.others = others
        self.asked = 0

    def reduce(self, tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
        """The least of what this rank has and what the others have left."""
        assert reduce_op == "min"
        self.asked += 1
        least = tensor.clamp(max=max(0, self.others))
        self.others -= int(tensor)
        return least


def numbers(path: str, trainer: Any = None, seed: int = 0, workers: int = 0) -> list[list[int]]:
    """Two epochs' rows, in the order in which they come."""
    stream = Stream(load_table(path, streaming=True)["train"])
    loader = StreamLoader(stream, trainer, seed, batch_size=5, num_workers=workers, collate_fn=_numbers)
    found = []
    for epoch in range(2):
        if trainer is not None:
            trainer.current_epoch = epoch
        found.append([number for batch in loader for number in batch])
    return found


def _numbers(rows: list[dict[str, Any]]) -> list[int]:
    return [row["n"] for row in rows]


@pytest.fixture
def hundred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of 100 rows in about ten shards."""
    path = tmp_path / "hundred.jsonl"
    path.write_text("".join(json.dumps({"n": number}) + "\n" for number in range(100)))
    monkeypatch.setattr(files, "PART", 90)
    return str(path)


@pytest.mark.parametrize("workers", [0, 3])
def test_a_stream_is_shuffled_by_epoch_and_seed(workers: int, hundred: str) -> None:
    first, second = numbers(hundred, Ranks(0, 1), workers=workers)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert first not in (sorted(first), sorted(first, reverse=True))
    assert numbers(hundred, Ranks(0, 1), workers=workers) == [first, second]
    assert numbers(hundred, Ranks(0, 1), seed=1, workers=workers)[0] != first
    # without a trainer there are no epochs
    assert numbers(hundred, workers=workers) == [first, first]


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_read_disjoint_rows_of_a_stream(workers: int, hundred: str) -> None:
    shares = [numbers(hundred, Ranks(rank, 3), workers=workers) for rank in range(3)]
    for epoch in range(2):
        rows = [number for share in shares for number in share[epoch]]
        assert sorted(rows) == list(range(100))
        assert max(len(share[epoch]) for share in shares) <= 34 + 3 * workers


def test_ranks_end_with_the_first_that_has_no_more(hundred: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "AHEAD", 4)
    trainer = Ranks(0, 2, others=6)
    stream = Stream(load_table(hundred, streaming=True)["train"])
    loader = StreamLoader(stream, trainer, 0, batch_size=5, collate_fn=_numbers)  # type: ignore[arg-type]
    # ten batches here, six on the other rank
    assert len(list(loader)) == 6
    assert trainer.asked == 2


def test_a_worker_s_fault_is_told_without_its_traceback(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n' * 1200 + '{"n"}\n')
    for workers in (0, 1):
        with pytest.raises(PEFTError) as caught:
            numbers(str(path), workers=workers)
        assert caught.value.faults == (f"path: {path}, line 1201: not JSON: Expecting ':' delimiter at character 5",)
