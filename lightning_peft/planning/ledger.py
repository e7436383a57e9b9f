"""Which bytes are alive in each moment of a step, and what they are."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lightning_peft.planning.fakes import TorchDispatchMode, fake_mode, run
from lightning_peft.planning.kernels import workspace

WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS = KINDS = ("weights", "gradients", "optimizer", "activations")
Bytes = Counter[str]
"""Bytes by kind."""


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps account of every storage that operators make inside of the `with`, until it is freed.

    What is not told otherwise is an activation: it may be kept for the backward pass or be gone in a moment.

    Args:
        rounding: a storage takes a multiple of so many bytes; 512 in CUDA's allocator.
        on_gpu: whether operators are taken for those of a GPU, with the memory that these work in.
    """

    def __init__(self, rounding: int = 1, on_gpu: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rounding, self.on_gpu = rounding, on_gpu
        self.mode = fake_mode()
        self.place = "before"
        """What runs, by which peaks are kept apart."""
        self.live: Bytes = Counter()
        self.peaks: dict[str, Bytes] = {}
        """The bytes alive at the peak of each place."""
        self._known: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._is_elsewhere = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = run(func, args, kwargs or {}, self.mode)
        for tensor in _tensors(out):
            self._note(tensor, ACTIVATIONS)
        if self.on_gpu and (more := workspace(func, args)):
            self._peak(more)
        return out

    def enter(self, place: str) -> None:
        """From here on it is `place` that runs."""
        self.place = place
        self._peak()

    def are(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Tell what tensors are; those that were not known are from now on."""
        for tensor in tensors:
            self._note(tensor, kind)
            reference, size, before = self._known[_key(tensor)]
            if before != kind:
                self.live[before] -= size
                self.live[kind] += size
                self._known[_key(tensor)] = reference, size, kind

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What is made inside of the `with` is in another memory."""
        self._is_elsewhere = True
        try:
            yield
        finally:
            self._is_elsewhere = False

    def knows(self, tensor: Tensor, kind: str) -> bool:
        """Whether a tensor is of that kind."""
        return _key(tensor) in self._known and self._known[_key(tensor)][2] == kind

    def _note(self, tensor: Tensor, kind: str) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._known:
            return
        size = 0 if self._is_elsewhere else -(-storage.nbytes() // self.rounding) * self.rounding

        def freed(_: Any) -> None:
            _, size, kind = self._known.pop(key)
            self.live[kind] -= size

        self._known[key] = weakref.ref(storage, freed), size, kind
        self.live[kind] += size
        self._peak()

    def _peak(self, more: int = 0) -> None:
        so_far = self.peaks.get(self.place)
        if so_far is None or self.live.total() + more > so_far.total():
            self.peaks[self.place] = self.live.copy()
            self.peaks[self.place][ACTIVATIONS] += more


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
