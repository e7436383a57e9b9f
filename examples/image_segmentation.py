"""LoRA on SegFormer: it learned to find the digits 0 to 2 on dark ground, and is adapted to striped ground.

    python examples/image_segmentation.py      # 45 seconds of CPU time, no network; extra `examples`

Scenes are made of scikit-learn's handwritten digits, so that the class of each pixel is known. The baseline is a linear
probe: of the network only the head, which gives classes to its features, is trained on the same 128 striped scenes.
"""

from __future__ import annotations

import argparse
import copy

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from lightning_peft import PEFT, LoRA, trainable_parameters
from lightning_peft.tasks import SemanticSegmentation

SIZE = 32
"""Height and width of a scene."""


class Scenes(L.LightningDataModule):
    """Scenes of two of the digits 0 to 2: `pixel_values`, (batch, 3, 32, 32), and `labels`, (batch, 32, 32).

    Label 0 is the ground, 1 the digit 0, and so on. The digits of test scenes are others than those of training scenes.
    """

    num_labels = 4

    def __init__(self, striped: bool, training_scenes: int) -> None:
        super().__init__()
        images, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
        chosen = digits < 3
        images = nn.functional.interpolate(images[chosen].float().view(-1, 1, 8, 8) / 16, 14, mode="bilinear")[:, 0]
        labels = digits[chosen] + 1
        self.train = [scene(images[:350], labels[:350], striped) for _ in range(training_scenes)]
        self.test = [scene(images[350:], labels[350:], striped) for _ in range(200)]

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self.train, batch_size=16, shuffle=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self.test, batch_size=50)


def scene(images: Tensor, labels: Tensor, striped: bool) -> dict[str, Tensor]:
    """Two digits, one in the left and one in the right half, of any colour, and the class of each pixel."""
    pixels, classes = 0.2 * torch.rand(3, SIZE, SIZE), torch.zeros(SIZE, SIZE, dtype=torch.int64)
    if striped:
        place = torch.arange(SIZE)
        across = place[:, None] * torch.rand(1) + place * torch.rand(1)
        pixels += 0.4 * torch.rand(3, 1, 1) * (across.sin() > 0)
    for half in range(2):
        row = int(torch.randint(len(images), ()))
        top, left = int(torch.randint(SIZE - 14, ())), half * SIZE // 2 + int(torch.randint(3, ()))
        rows, columns = slice(top, top + 14), slice(left, left + 14)
        ink, colour = images[row], 0.5 + 0.5 * torch.rand(3, 1, 1)
        pixels[:, rows, columns] = pixels[:, rows, columns] * (1 - ink) + colour * ink
        classes[rows, columns] = torch.where(ink > 0.3, labels[row], classes[rows, columns])
    return {"pixel_values": pixels, "labels": classes}


def fit(task: L.LightningModule, data: L.LightningDataModule, epochs: int, *callbacks: L.Callback) -> float:
    """Train, and give the mean intersection over union on the test scenes."""
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    quiet |= {"enable_progress_bar": False, "check_val_every_n_epoch": epochs}
    trainer = L.Trainer(max_epochs=epochs, callbacks=list(callbacks), **quiet)
    trainer.fit(task, data)
    return trainer.callback_metrics["val_mean_iou"].item()


def main(argv: list[str] | None = None) -> None:
    """Pretrain on one kind of scenes, and adapt to the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="far less training; the probe is of random features")
    given = parser.parse_args(argv)
    L.seed_everything(0)

    sizes = {"hidden_sizes": [16, 32, 64, 64], "num_attention_heads": [1, 2, 2, 2], "decoder_hidden_size": 64}
    config = SegformerConfig(depths=[1, 1, 1, 1], strides=[2, 2, 2, 2], num_labels=4, **sizes)
    network = SegformerForSemanticSegmentation(config)
    untrained, total = copy.deepcopy(network), network.num_parameters()
    task, old = SemanticSegmentation(network, learning_rate=3e-3), Scenes(False, 256 if given.short else 512)
    print(f"pretrained {fit(task, old, 3 if given.short else 10):.3f} mean IoU on dark ground")

    new = Scenes(True, 64 if given.short else 128)
    probed = (untrained if given.short else copy.deepcopy(network)).requires_grad_(False)
    probed.decode_head.classifier.requires_grad_(True)
    epochs = 8 if given.short else 25
    baseline = fit(SemanticSegmentation(probed, learning_rate=1e-2), new, epochs)

    # from here on: what is new
    task = SemanticSegmentation(network, learning_rate=1e-2)
    peft = PEFT(LoRA(r=8, alpha=16, target_modules="all-linear"), modules_to_save=["classifier"])
    result = fit(task, new, epochs, peft)

    trained = sum(parameter.numel() for parameter in trainable_parameters(task).values())
    print(f"baseline {baseline:.3f} (linear probe), result {result:.3f}, ", end="")
    print(f"trained {trained:,} ({trained / total:.1%} of {total:,})")
    if result <= baseline:
        raise SystemExit(f"the mean IoU {result:.3f} is not above the baseline's {baseline:.3f}")


if __name__ == "__main__":
    main()
