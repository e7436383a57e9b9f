"""Small modules for runs on several ranks, each with a thing that ranks may have otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_peft import trainable_parameters
from tests.callback.toys import Toy

WIDTH = 1000


class Wide(Toy):
    """With a base of 8 MB, and buffers of 0.8 MB that stay as they are."""

    def build(self) -> None:
        super().build()
        with torch.random.fork_rng():
            torch.manual_seed(self.hparams["seed"])
            self.body.insert(1, nn.Linear(16, WIDTH))
            self.body.insert(2, nn.Linear(WIDTH, WIDTH))
            self.body.insert(3, nn.Linear(WIDTH, WIDTH))
            self.body.insert(4, nn.Linear(WIDTH, 16))
            self.register_buffer("table", torch.randn(100, WIDTH))
            self.register_buffer("cache", torch.randn(100, WIDTH), persistent=False)


class Centred(Toy):
    """With a buffer of its own that training moves."""

    def build(self) -> None:
        super().build()
        self.register_buffer("center", torch.zeros(16))

    def training_step(self, batch: Any, index: int) -> Any:
        self.center.mul_(0.9).add_(self.body(batch[0]).detach().mean(0))
        return super().training_step(batch, index)


class Plain(Toy):
    """Without what makes a rank's batches differ from one batch of both: dropout and batch statistics."""

    def build(self) -> None:
        super().build()
        self.body[1] = nn.Identity()
        self.body[3] = nn.Identity()

    def on_fit_start(self) -> None:
        generator = torch.Generator().manual_seed(4)
        for parameter in trainable_parameters(self).values():
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


class Alternating(Plain):
    """Runs through its last layer in every second batch alone."""

    def training_step(self, batch: Any, index: int) -> Any:
        hidden = self.body[:4](batch[0])
        hidden = self.body[4](hidden) if index % 2 else hidden
        return nn.functional.cross_entropy(self.head(hidden), batch[1])


class Seeded(Toy):
    """Whose ranks draw other random numbers from the first batch on."""

    def on_train_start(self) -> None:
        if self.global_step == 0:
            torch.manual_seed(100 + self.global_rank)
