"""What this process sends and receives, by kind of collective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

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
