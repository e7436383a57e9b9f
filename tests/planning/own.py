"""Modules and data as people write them, without a task of this package or transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

WIDTH, LENGTH = 16, 8
Pair = tuple[Tensor, Tensor]


class Rows(Dataset[Pair]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Pair:
        return torch.zeros(LENGTH, WIDTH), torch.tensor(0)


class Data(L.LightningDataModule):
    """Batches of pairs; what there is to know of them it knows once it is set up."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = 0
        self.times = 0

    def setup(self, stage: str) -> None:
        self.classes = 2
        self.times += 1

    def train_dataloader(self) -> Any:
        return DataLoader(Rows(), 4)


@dataclass
class Batch:
    x: Tensor
    y: Tensor


def collate(rows: Sequence[Pair]) -> Batch:
    return Batch(torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows]))


class Dataclasses(Data):
    def train_dataloader(self) -> Any:
        return DataLoader(Rows(), 4, collate_fn=collate)


class TwoLoaders(Data):
    def train_dataloader(self) -> Any:
        return {"a": DataLoader(Rows(), 4), "b": DataLoader(Rows(), 4)}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.up(x).relu())
        return out


class Own(L.LightningModule):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.depth = depth
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])
        self.head = nn.Linear(WIDTH, 2)
        self.example_input_array = torch.zeros(4, LENGTH, WIDTH), torch.zeros(4, dtype=torch.int64)

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))

    def loss(self, batch: Pair) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def training_step(self, batch: Any) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([each for each in self.parameters() if each.requires_grad])


class Indexed(Own):
    def forward(self, x: Tensor) -> Any:
        for index in range(self.depth):
            x = self.blocks[index](x)
        return self.head(x.mean(1))


class OfData(Own):
    """Its head is for its data to say."""

    def setup(self, stage: str) -> None:
        self.head = nn.Linear(WIDTH, self.trainer.datamodule.classes)  # type: ignore[attr-defined]


class Careful(Own):
    """Looks at its loss."""

    def training_step(self, batch: Any) -> Tensor:
        loss = self.loss(batch)
        if torch.isnan(loss) or torch.isinf(loss) or not torch.isfinite(loss):
            raise ValueError("the loss is no number")
        return loss


class OfDataclasses(Own):
    def training_step(self, batch: Batch) -> Tensor:
        return self.loss((batch.x, batch.y))


class OfTwoLoaders(Own):
    def training_step(self, batch: dict[str, Pair]) -> Tensor:
        return self.loss(batch["a"]) + self.loss(batch["b"])


class Tower(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, stride=stride, padding=1)
        self.norm = nn.GroupNorm(1, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x)).relu()
        return out


class Convolutions(Own):
    """Each tower of stride 2 gives half of what it reads."""

    def __init__(self, strides: Sequence[int]) -> None:
        super().__init__(0)
        self.blocks = nn.ModuleList([Tower(stride) for stride in strides])
        self.example_input_array = torch.zeros(4, 1024, WIDTH), torch.zeros(4, dtype=torch.int64)

    def forward(self, x: Tensor) -> Any:
        x = x.mT
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(2))
