"""LoRA on a ResNet's convolutions: it learned the digits 0 to 4, and is adapted to 5 to 9.

    python examples/image_classification.py      # 20 seconds of CPU time, no network; extra `examples`

The images are scikit-learn's handwritten digits. The baseline is a linear probe: a logistic regression on what the
frozen network makes of the same 200 training images. Batch normalization stays as it was learned; the callback sees to
that.
"""

from __future__ import annotations

import argparse
import copy

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from transformers import ResNetConfig, ResNetForImageClassification

from lightning_peft import PEFT, LoRA, trainable_parameters


class Digits(L.LightningDataModule):
    """Digits from `first` on, five of them: images, float32 of shape (batch, 1, 32, 32), and labels from 0 to 4."""

    def __init__(self, first: int, training_images: int) -> None:
        super().__init__()
        images, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
        chosen = (digits >= first) & (digits < first + 5)
        images = nn.functional.interpolate(images[chosen].float().view(-1, 1, 8, 8) / 16, 32, mode="bilinear")
        labels = digits[chosen] - first
        self.train = TensorDataset(images[:training_images], labels[:training_images])
        self.test = TensorDataset(images[-400:], labels[-400:])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test, batch_size=100)


class Classifier(L.LightningModule):
    """An ordinary module around a network that gives logits."""

    def __init__(self, network: nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.network, self.learning_rate = network, learning_rate
        self.accuracy = MulticlassAccuracy(5, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images).logits, labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self.network(images).logits, labels)
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[LRScheduler]]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
        return [optimizer], [CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


def fit(module: L.LightningModule, data: L.LightningDataModule, epochs: int, *callbacks: L.Callback) -> float:
    """Train, and give the accuracy on the test images."""
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    quiet |= {"enable_progress_bar": False, "check_val_every_n_epoch": epochs}
    trainer = L.Trainer(max_epochs=epochs, callbacks=list(callbacks), **quiet)
    trainer.fit(module, data)
    return trainer.callback_metrics["accuracy"].item()


@torch.no_grad()
def features(network: ResNetForImageClassification, rows: TensorDataset) -> Tensor:
    """What the body makes of images, of shape (rows, 128)."""
    return network.eval().resnet(rows.tensors[0]).pooler_output.flatten(1)


def main(argv: list[str] | None = None) -> None:
    """Pretrain on five digits, and adapt to the other five."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer epochs")
    given = parser.parse_args(argv)
    L.seed_everything(0)

    sizes = {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1]}
    config = ResNetConfig(num_channels=1, layer_type="basic", num_labels=5, **sizes)
    network = ResNetForImageClassification(config)
    fit(Classifier(network, 2e-3), Digits(0, 500), 2 if given.short else 10)

    new = Digits(5, 200)
    probe = LogisticRegression(max_iter=1000).fit(features(network, new.train), new.train.tensors[1])
    baseline = probe.score(features(network, new.test), new.test.tensors[1])

    # from here on: what is new
    adapted = copy.deepcopy(network)
    adapted.classifier[1] = nn.Linear(128, 5)
    module = Classifier(adapted, 5e-3)
    peft = PEFT(LoRA(r=8, alpha=16, target_modules=r".*\.convolution"), modules_to_save=["classifier"])
    result = fit(module, new, 16 if given.short else 30, peft)

    trained = sum(parameter.numel() for parameter in trainable_parameters(module).values())
    total = sum(parameter.numel() for parameter in network.parameters())
    print(f"baseline {baseline:.3f} (linear probe), result {result:.3f}, ", end="")
    print(f"trained {trained:,} ({trained / total:.1%} of {total:,})")
    if result <= baseline:
        raise SystemExit(f"the accuracy {result:.3f} is not above the baseline's {baseline:.3f}")


if __name__ == "__main__":
    main()
