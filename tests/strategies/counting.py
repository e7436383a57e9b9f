"""What this process sends and receives, by kind of collective, and the memory that it takes."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Counts, inside of the `with`, the bytes of all tensors that are given to a collective, and its calls.

    Every collective is an operator of torch's namespace c10d (_c10d_functional for functional ones), whoever calls it:
    Python, DDP's own C++ in its broadcasts and in the backward pass, or FSDP2. Where a collective has inputs and
    outputs, the larger of both counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional") and name not in ("barrier", "monitored_barrier_", "wait_tensor"):
            parts = [sum(tensor.numel() * tensor.element_size() for tensor in _tensors(part)) for part in args]
            self.bytes[name.strip("_")] += max(parts, default=0)
            self.calls[name.strip("_")] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """The bytes of all kinds."""
        return sum(self.bytes.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


class Peak(L.Callback):
    """The most anonymous memory that the process takes until training starts, beyond what it had before."""

    def setup(self, *_: Any, **__: Any) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self._start = self.bytes = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, anonymous())

    def on_train_start(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()
        self.bytes -= self._start


def anonymous() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
