"""LoRA on YOLOS: it learned to find handwritten digits on dark ground, and is adapted to striped ground.

    python examples/object_detection.py      # a minute of CPU time, no network; extra `examples`

Scenes are made of scikit-learn's handwritten digits, so that the boxes are known. The baseline: both heads, for classes
and boxes, are trained alone on the same 128 striped scenes; LoRA adapts the network beneath them too. The numbers are
the average precision at an overlap of a half (mAP50).
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import YolosConfig, YolosForObjectDetection

from lightning_peft import PEFT, LoRA, trainable_parameters
from lightning_peft.tasks import ObjectDetection

SIZE = 32  # height and width of a scene


class Scenes(L.LightningDataModule):
    """Scenes of one or two digits, the only class; a batch is what `ObjectDetection` says."""

    num_labels = 1

    def __init__(self, striped: bool, training_scenes: int) -> None:
        super().__init__()
        images = torch.from_numpy(load_digits().images).float()[:, None] / 16
        images = nn.functional.interpolate(images, 14, mode="bilinear")[:, 0]
        # the digits of test scenes are others than those of training scenes
        self.train = [scene(images[:1000], striped) for _ in range(training_scenes)]
        self.test = [scene(images[1000:], striped) for _ in range(200)]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=16, shuffle=True, collate_fn=collate)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test, batch_size=50, collate_fn=collate)


def scene(images: Tensor, striped: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """A digit in the left half, and often one in the right half, of any colour; and their boxes."""
    pixels, boxes = 0.2 * torch.rand(3, SIZE, SIZE), []
    if striped:
        place = torch.arange(SIZE)
        across = place[:, None] * torch.rand(1) + place * torch.rand(1)
        pixels += 0.4 * torch.rand(3, 1, 1) * (across.sin() > 0)
    for half in range(int(torch.randint(1, 3, ()))):
        ink, colour = images[int(torch.randint(len(images), ()))], 0.5 + 0.5 * torch.rand(3, 1, 1)
        top, left = int(torch.randint(SIZE - 14, ())), half * SIZE // 2 + int(torch.randint(3, ()))
        part = pixels[:, top : top + 14, left : left + 14]
        part.copy_(part * (1 - ink) + colour * ink)
        inked = (ink > 0.3).nonzero().flip(1)
        first, size = inked.amin(0), inked.amax(0) - inked.amin(0) + 1
        boxes.append(torch.cat([torch.tensor([left, top]) + first + size / 2, size]) / SIZE)
    return pixels, {"boxes": torch.stack(boxes), "class_labels": torch.zeros(len(boxes), dtype=torch.int64)}


def collate(scenes: list[tuple[Tensor, dict[str, Tensor]]]) -> dict[str, Any]:
    """Scenes with boxes of differing number, as a batch."""
    pixels, labels = zip(*scenes, strict=True)
    return {"pixel_values": torch.stack(pixels), "labels": list(labels), "sizes": torch.full((len(scenes), 2), SIZE)}


def fit(network: nn.Module, data: Scenes, rate: float, epochs: int, *callbacks: L.Callback) -> float:
    """Train, and give the mAP50 on the test scenes."""
    task = ObjectDetection(network, learning_rate=rate, metrics=["map_50"])
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"], False)
    quiet |= {"accelerator": "cpu", "max_epochs": epochs, "check_val_every_n_epoch": epochs}
    trainer = L.Trainer(callbacks=list(callbacks), **quiet)
    trainer.fit(task, data)
    return trainer.callback_metrics["val_map_50"].item()


def main(argv: list[str] | None = None) -> None:
    """Pretrain on one kind of scenes, and adapt to the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="far less training; the baseline is over random features")
    given = parser.parse_args(argv)
    L.seed_everything(0)

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    sizes |= {"image_size": [SIZE, SIZE], "patch_size": 4, "num_detection_tokens": 5, "num_labels": 1}
    network = YolosForObjectDetection(YolosConfig(use_mid_position_embeddings=False, **sizes))
    # zeros, as transformers has them, take long to tell one place from another
    nn.init.normal_(network.vit.embeddings.detection_tokens)
    nn.init.normal_(network.vit.embeddings.position_embeddings)
    untrained, total = copy.deepcopy(network), network.num_parameters()
    dark = fit(network, Scenes(False, 256 if given.short else 1024), 2e-3, 5 if given.short else 20)
    print(f"pretrained {dark:.3f} mAP50 on dark ground")
    new, epochs = Scenes(True, 64 if given.short else 128), 8 if given.short else 25
    probed = (untrained if given.short else copy.deepcopy(network)).requires_grad_(False)
    probed.class_labels_classifier.requires_grad_(True)
    probed.bbox_predictor.requires_grad_(True)
    baseline = fit(probed, new, 3e-3, epochs)

    # from here on: what is new
    method = LoRA(r=8, alpha=16, target_modules="all-linear")
    peft = PEFT(method, modules_to_save=["class_labels_classifier", "bbox_predictor"])
    result = fit(network, new, 3e-3, epochs, peft)
    trained = sum(parameter.numel() for parameter in trainable_parameters(network).values())
    print(f"baseline {baseline:.3f} (the heads alone), result {result:.3f}, ", end="")
    print(f"trained {trained:,} ({trained / total:.1%} of {total:,})")
    if result <= baseline:
        raise SystemExit(f"the mAP50 {result:.3f} is not above the baseline's {baseline:.3f}")


if __name__ == "__main__":
    main()
