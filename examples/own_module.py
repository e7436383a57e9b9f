"""PEFT on a LightningModule of one's own, whose code stays as it is: only the callback is added.

    python examples/own_module.py    # 15 seconds of CPU time, no network; extra `examples`

A classifier of handwritten digits is trained, as people train one. Then come digits as in a mirror, and 200 of them to
adapt it with. In the end it prints the accuracy beside that of a logistic regression on these 200, and how small the
checkpoint is that holds what was learned.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft import PEFT, LoRA, load_from_checkpoint
from lightning_peft.tracking import count


class DigitClassifier(L.LightningModule):
    """A module as it might be in anybody's project. It knows nothing of adapters."""

    def __init__(self, learning_rate: float = 2e-3, weights: str | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 64, 3, padding=1), nn.GELU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.GELU(), nn.Linear(128, 10)),
        )
        self.accuracy = MulticlassAccuracy(10, average="micro")
        if weights is not None:
            self.load_state_dict(torch.load(weights, weights_only=True))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        # seen up to a pixel off, in either direction
        down, right = torch.randint(-1, 2, (2,)).tolist()
        images = images.roll((down, right), dims=(2, 3))
        loss = nn.functional.cross_entropy(self.net(images), digits)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, digits = batch
        self.accuracy(self.net(images), digits)
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["learning_rate"])


def loader(images: Tensor, digits: Tensor, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of images, (batch, 1, 8, 8), and their digits."""
    return DataLoader(TensorDataset(images, digits), batch_size=32, shuffle=shuffle)


def main(argv: list[str] | None = None) -> None:
    """Train, adapt, load again, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer epochs")
    given = parser.parse_args(argv)
    L.seed_everything(0)
    folder = Path("runs/own_module")
    quiet: dict[str, Any] = {"default_root_dir": folder, "logger": False, "enable_progress_bar": False}

    images, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    upright = (images.float() / 16).view(-1, 1, 8, 8)
    mirrored = upright.flip(3)
    old, new, test = slice(1000), slice(1000, 1200), slice(1200, None)

    pretrained = DigitClassifier()
    trainer = L.Trainer(max_epochs=5 if given.short else 15, enable_checkpointing=False, **quiet)
    trainer.fit(pretrained, loader(upright[old], digits[old], shuffle=True))
    (before,) = trainer.validate(pretrained, loader(mirrored[test], digits[test]), verbose=False)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(pretrained.state_dict(), folder / "pretrained.pt")

    # what is new is one callback
    peft = PEFT(LoRA(r=8, target_modules=["net.0", "net.2", "net.6", "net.8"]))
    trainer = L.Trainer(max_epochs=15 if given.short else 40, callbacks=[peft], **quiet)
    module = DigitClassifier(weights=str(folder / "pretrained.pt"))
    trainer.fit(module, loader(mirrored[new], digits[new], shuffle=True))
    trainer.save_checkpoint(folder / "mirrored.ckpt")

    # DigitClassifier(weights=…) is built again, and gets the adapters of the checkpoint
    module = load_from_checkpoint(DigitClassifier, folder / "mirrored.ckpt")
    (after,) = L.Trainer(**quiet).validate(module, loader(mirrored[test], digits[test]), verbose=False)
    result = after["val_accuracy"]
    regression = LogisticRegression(max_iter=1000).fit(mirrored[new].flatten(1), digits[new])
    baseline = regression.score(mirrored[test].flatten(1), digits[test])
    parts = count(module)
    print(f"unadapted {before['val_accuracy']:.3f}, checkpoint {(folder / 'mirrored.ckpt').stat().st_size:,} bytes")
    print(f"baseline {baseline:.3f} (logistic regression), result {result:.3f}, ", end="")
    print(f"trained {parts.trainable:,} ({parts.trainable / parts.frozen:.1%} of {parts.frozen:,})")
    if result <= baseline:
        raise SystemExit(f"the accuracy {result:.3f} is not above the baseline's {baseline:.3f}")


if __name__ == "__main__":
    main()
