"""LoRA on the embedding tables of a recommender: for a new season the tables stay, and 7 % of their size is learned.

    python examples/recommender.py    # 30 seconds of CPU time, no network; extra `examples`

People buy by taste and fashion; who buys what is drawn at random. A factorization is trained on one season. In the
next, of which a third as much is known, items have come to please other people, and others are in fashion. In the end
it prints how often the following purchase is among the ten of 1,500 items with the highest scores, beside the better of
the model as it was and of the season's best-sellers.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import PEFT, LoRA
from lightning_peft.tracking import count

USERS, ITEMS, TASTES = 4000, 1500, 8


class Recommender(L.LightningModule):
    """A score for each item: how well its vector goes with the person's, and how popular it is."""

    def __init__(self, dim: int = 64, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.users, self.items = nn.Embedding(USERS, dim), nn.Embedding(ITEMS, dim)
        self.popularity = nn.Embedding(ITEMS, 1)
        for table in (self.users, self.items, self.popularity):
            nn.init.normal_(table.weight, std=0.1)
        self.register_buffer("every", torch.arange(ITEMS))

    def forward(self, users: Tensor) -> Tensor:
        """Scores of shape (batch, items)."""
        # the tables are called: an adapter acts where its module is, not where `weight` is read
        return self.users(users) @ self.items(self.every).T + self.popularity(self.every).T

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        users, bought = batch
        return nn.functional.cross_entropy(self(users), bought)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        users, bought = batch
        self.log("hit_rate", hit_rate(self(users), bought))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams["learning_rate"])


def hit_rate(scores: Tensor, bought: Tensor) -> Tensor:
    """How often what was bought is among the ten best scores."""
    return (scores.topk(10).indices == bought[:, None]).any(dim=1).float().mean()


def purchases(taste: Tensor, appeal: Tensor, fashion: Tensor, each: int) -> Tensor:
    """What everybody buys, one after the other and nothing twice; item numbers of shape (users, each)."""
    return (taste @ appeal.T + fashion).softmax(dim=1).multinomial(each)


def loader(bought: Tensor, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of people, (batch,), and an item that each of them bought."""
    users = torch.arange(USERS).repeat_interleave(bought.shape[1])
    return DataLoader(TensorDataset(users, bought.flatten()), batch_size=512, shuffle=shuffle)


def main(argv: list[str] | None = None) -> None:
    """Train on the first season, adapt to the second, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer epochs")
    given = parser.parse_args(argv)
    L.seed_everything(0)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

    taste, appeal, fashion = torch.randn(USERS, TASTES), torch.randn(ITEMS, TASTES), torch.randn(ITEMS)
    first = purchases(taste, appeal, fashion, each=30)
    # what pleased by the first two tastes pleases by the next two now, and half of the fashion is new
    swapped, fashion = appeal[:, [2, 3, 0, 1, 4, 5, 6, 7]], (fashion + torch.randn(ITEMS)) / 2**0.5
    second, following = purchases(taste, swapped, fashion, each=11).split([10, 1], dim=1)
    later = loader(following)

    module = Recommender()
    trainer = L.Trainer(max_epochs=1 if given.short else 6, **quiet)
    trainer.fit(module, loader(first, shuffle=True))
    (frozen,) = trainer.validate(module, later, verbose=False)

    peft = PEFT(LoRA(r=4, target_modules=["users", "items"]), modules_to_save=["popularity"])
    trainer = L.Trainer(max_epochs=2 if given.short else 10, callbacks=[peft], **quiet)
    trainer.fit(module, loader(second, shuffle=True))
    (adapted,) = trainer.validate(module, later, verbose=False)

    sold = second.flatten().bincount(minlength=ITEMS).float()
    best_sellers = hit_rate(sold.expand(USERS, ITEMS), following.flatten()).item()
    baseline, result = max(frozen["hit_rate"], best_sellers), adapted["hit_rate"]
    parts = count(module)
    print(f"the old model {frozen['hit_rate']:.3f}, best-sellers {best_sellers:.3f}")
    print(f"baseline {baseline:.3f}, result {result:.3f}, ", end="")
    print(f"trained {parts.trainable:,} ({parts.trainable / parts.frozen:.1%} of {parts.frozen:,})")
    if result <= baseline:
        raise SystemExit(f"the hit rate {result:.3f} is not above the baseline's {baseline:.3f}")


if __name__ == "__main__":
    main()
