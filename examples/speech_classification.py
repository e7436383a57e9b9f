"""LoRA on a small speech encoder, which was trained on some glides between vowels and learns to tell others.

    python examples/speech_classification.py    # a minute of CPU time, no network; extra `examples`

The sounds, such as `ai` and `ia`, are synthesized: a voice of any pitch through the resonances of English vowels, and
noise. In the end it prints the accuracy over the eight glides that have an `i`, which the encoder had not heard, beside
that of a linear probe: a logistic regression on what it makes of them without the adapters.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import soundfile
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification

from lightning_peft import PEFT, LoRA, disable_adapters
from lightning_peft.data import AudioFolderData
from lightning_peft.tasks import SpeechClassification
from lightning_peft.tracking import count

RATE, SECONDS = 8000, 0.3
VOWELS = {
    "i": (270, 2290, 3010),
    "e": (530, 1840, 2480),
    "a": (730, 1090, 2440),
    "o": (570, 840, 2410),
    "u": (300, 870, 2240),
}
"""Resonances in hertz, means over men (Peterson and Barney, J. Acoust. Soc. Am. 24, 1952)."""


def sound(start: str, end: str, random: np.random.Generator) -> np.ndarray:
    """A vowel that becomes another; float64 of shape (samples,)."""
    part = np.linspace(0, 1, int(RATE * SECONDS))
    size = random.uniform(0.9, 1.2)  # of the speaker: the shorter, the higher the resonances
    resonances = [size * (a + (b - a) * part) for a, b in zip(VOWELS[start], VOWELS[end], strict=True)]
    pitch = random.uniform(90, 250) * (1 + random.uniform(-0.2, 0.2) * part)
    turns, samples = np.cumsum(pitch) / RATE, np.zeros_like(part)
    for harmonic in range(1, int(RATE / 2 / pitch.max())):
        loudness = sum(1 / (1 + ((harmonic * pitch - resonance) / 80) ** 2) for resonance in resonances)
        samples += loudness / harmonic**0.5 * np.sin(2 * np.pi * harmonic * turns)
    return 0.3 * samples / samples.std() + random.normal(0, 0.03, len(samples))


def write_sounds(folder: Path, classes: list[str], sizes: dict[str, int], random: np.random.Generator) -> None:
    """A folder of WAV files for each class, which is named by its two vowels; `sizes` of each by split."""
    for split, name in itertools.product(sizes, classes):
        (folder / split / name).mkdir(parents=True, exist_ok=True)
        for number in range(sizes[split]):
            soundfile.write(folder / split / name / f"{number}.wav", sound(*name, random), RATE)


@torch.inference_mode()
def features(model: nn.Module, batches: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the encoder makes of sounds without the adapters, as means over time, and the labels."""
    with disable_adapters(model):
        made = [(model.wav2vec2(batch["input_values"])[0].mean(dim=1), batch["labels"]) for batch in batches]
    vectors, labels = (torch.cat(parts).numpy() for parts in zip(*made, strict=True))
    return vectors, labels


def main(argv: list[str] | None = None) -> None:
    """Pretrain on some glides, adapt to others, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer sounds and epochs")
    given = parser.parse_args(argv)
    L.seed_everything(0)
    random = np.random.default_rng(0)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    folder = Path("runs/speech_classification")
    shutil.rmtree(folder, ignore_errors=True)  # sounds of another run would be classes too
    old, new = ("aeu", "iou") if given.short else ("aeou", "aeiou")
    known = ["".join(pair) for pair in itertools.permutations(old, 2)]
    others = [name for name in map("".join, itertools.permutations(new, 2)) if name not in known]
    write_sounds(folder / "known", known, {"train": 40 if given.short else 60}, random)
    write_sounds(folder / "others", others, {"train": 60 if given.short else 80, "validation": 40}, random)
    options: dict[str, Any] = {"processor": str(folder / "model"), "batch_size": 16}

    Wav2Vec2FeatureExtractor(sampling_rate=RATE).save_pretrained(folder / "model")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    convolutions = {"conv_dim": (32, 64, 64), "conv_kernel": (16, 8, 4), "conv_stride": (8, 5, 2)}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    dropouts = dict.fromkeys(["hidden_dropout", "activation_dropout", "attention_dropout", "layerdrop"], 0.0)
    # as in the larger models; it learns more steadily
    norms = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
    head = {"num_labels": len(known), "classifier_proj_size": 64, "apply_spec_augment": False}
    config = Wav2Vec2Config(vocab_size=32, **sizes, **convolutions, **positions, **dropouts, **norms, **head)
    encoder = Wav2Vec2ForSequenceClassification(config)
    trainer = L.Trainer(max_epochs=12 if given.short else 15, **quiet)
    data = AudioFolderData(str(folder / "known"), validation_fraction=0, **options)
    trainer.fit(SpeechClassification(encoder, learning_rate=3e-3, warmup_ratio=0.1), data)
    encoder.wav2vec2.save_pretrained(folder / "model")

    data = AudioFolderData(str(folder / "others"), **options)
    task = SpeechClassification(str(folder / "model"), learning_rate=1e-2)
    peft = PEFT(LoRA(r=8), modules_to_save=["projector", "classifier"])
    trainer = L.Trainer(max_epochs=10 if given.short else 15, check_val_every_n_epoch=5, callbacks=[peft], **quiet)
    trainer.fit(task, data)

    model = task.model.eval().cpu()
    probe = LogisticRegression(max_iter=2000).fit(*features(model, data.train_dataloader()))
    baseline = probe.score(*features(model, data.val_dataloader()))
    result = trainer.callback_metrics["val_accuracy"].item()
    parts = count(task)
    print(f"baseline {baseline:.3f}, result {result:.3f}, ", end="")
    print(f"trained {parts.trainable:,} ({parts.trainable / parts.frozen:.1%} of {parts.frozen:,})")
    if result <= baseline:
        raise SystemExit(f"the accuracy {result:.3f} is not above the baseline's {baseline:.3f}")


if __name__ == "__main__":
    main()
