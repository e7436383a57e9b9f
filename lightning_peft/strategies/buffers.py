"""The base's buffers that training moves after all: kept equal on all ranks, as DDP keeps every buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from lightning_peft.methods._host import own_tensors
from lightning_peft.state import checksum, frozen_buffers
from lightning_peft.strategies.agreement import broadcast, everyones


class MovingBuffers:
    """Finds out which of the base's buffers training moves, such as a running mean of the module's own, and gives all
    ranks the first one's before each batch, as DDP would. A buffer that stays as it is is never sent.

    Every rank has to know which are sent, or they would wait for each other: they ask each other before the batches 1,
    2, 4, 8, … of a run, so that one that moves from the first batch on is the same everywhere from the second on.

    Args:
        module: the module, whose buffers are the same on all ranks.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._at_start = _checksums(frozen_buffers(module))
        self._batches = 0
        self.names: list[str] = []
        """Those that move."""

    def before_batch(self) -> None:
        """To be called on every rank before each batch."""
        if self._batches and self._batches & (self._batches - 1) == 0:
            self.find()
        self._batches += 1
        self.send()

    def find(self) -> None:
        """Ask all ranks which buffers have moved."""
        if not self._at_start:
            return
        here = frozen_buffers(self._module)
        now = _checksums({name: here[name] for name in self._at_start if name in here})
        moved = [name for name, value in now.items() if value != self._at_start[name]]
        self.names = sorted({name for names in everyones(sorted({*moved, *self.names})) for name in names})

    @torch.no_grad()
    def send(self) -> None:
        """Take the first rank's values of those that move."""
        for name in self.names:
            path, _, own = name.rpartition(".")
            broadcast(own_tensors(self._module.get_submodule(path))[own])


class KeepsBuffersEqual(Strategy):
    """Mixed in front of a strategy of Lightning's, which sets `buffers` as soon as the module is on its device."""

    buffers: MovingBuffers | None = None

    @property
    def sends_buffers(self) -> bool:
        """Whether buffers are sent while training goes on, as they are when it ends."""
        return True

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Send the base's buffers that training moves."""
        super().on_train_batch_start(batch, batch_idx)
        if self.buffers is not None and self.sends_buffers:
            self.buffers.before_batch()

    def on_validation_start(self) -> None:
        """The same."""
        super().on_validation_start()
        if self.buffers is not None and self.sends_buffers:
            self.buffers.send()

    def on_train_end(self) -> None:
        """The ranks end with one base, the first one's."""
        super().on_train_end()
        if self.buffers is not None:
            self.buffers.find()
            self.buffers.send()

    def teardown(self) -> None:
        """Let go of the module."""
        self.buffers = None
        super().teardown()


def _checksums(buffers: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: checksum(buffer) for name, buffer in buffers.items()}
