"""What tasks log on one device or on two, one after the other, since starting two takes longer than all of it.

Run as `python -m tests.tasks.devices FOLDER` by each of two ranks; what they logged is then in `FOLDER/two.json`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.classification import MulticlassCohenKappa

from lightning_peft.data import (
    DetectionData,
    QuestionAnsweringData,
    SegmentationFolderData,
    SpeechRecognitionData,
    TextClassificationData,
)
from lightning_peft.tasks import (
    CausalLM,
    ObjectDetection,
    QuestionAnswering,
    SemanticSegmentation,
    SequenceClassification,
    SpeechRecognition,
)
from lightning_peft.tasks.boxes import BOX_SCORES
from lightning_peft.tasks.class_metrics import CLASS_METRICS
from lightning_peft.tasks.text_metrics import TEXT_METRICS
from tests.processes import accelerator
from tests.tasks.test_question_answering import Pointer
from tests.tasks.test_sequence_classification import Bag
from tests.tasks.writers import Pairs, build

Case = Callable[[Path], tuple[L.LightningModule, Any]]


class Uneven(IterableDataset[Any]):
    """Seven rows on the first rank, none on another."""

    def __iter__(self) -> Iterator[Any]:
        if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
            return
        for row in range(7):
            yield {"input_ids": torch.tensor([row, row + 1]), "labels": torch.tensor(row % 2)}


class Hears(torch.nn.Module):
    """Logits over eight tokens for every 100 samples, from their mean and spread."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(2, 8)

    def forward(self, input_values: torch.Tensor, **_: Any) -> torch.Tensor:
        frames = input_values.unfold(1, 100, 100)
        logits: torch.Tensor = 20 * self.head(torch.stack([frames.mean(-1), frames.std(-1)], -1))
        return logits


def classification(folder: Path) -> tuple[L.LightningModule, Any]:
    """41 rows: the sampler would count one of them twice."""
    names = [name for name in CLASS_METRICS if name not in ("top3_accuracy", "top5_accuracy", "top10_accuracy")]
    module = SequenceClassification(Bag(), metrics=[*names, MulticlassCohenKappa(3)])
    path, options = str(folder / "reviews.jsonl"), {"tokenizer": str(folder / "bert"), "batch_size": 4}
    return module, TextClassificationData(path, test_path=str(folder / "odd.jsonl"), **options)


def answers(folder: Path) -> tuple[L.LightningModule, Any]:
    """The windows of a question are on both devices, and their number is odd."""
    path = str(folder / "questions.jsonl")
    options = {"tokenizer": str(folder / "bert"), "max_length": 12, "stride": 3, "batch_size": 4}
    return QuestionAnswering(Pointer()), QuestionAnsweringData(path, test_path=path, validation_fraction=0, **options)


def texts(folder: Path) -> tuple[L.LightningModule, Any]:
    """Seven rows and one without labels, so that the devices have other numbers of texts."""
    model = build("Llama", initializer_range=0.5)
    module = CausalLM(model, generation={"max_new_tokens": 3}, generation_metrics=list(TEXT_METRICS))
    return module, Pairs(decoder=True, unlabelled=1, batch_size=2)


def speech(folder: Path) -> tuple[L.LightningModule, Any]:
    """Five sounds of differing lengths."""
    path = str(folder / "spoken")
    options = {"processor": str(folder / "extractor"), "tokenizer": "characters", "validation_fraction": 0}
    return SpeechRecognition(Hears()), SpeechRecognitionData(path, test_path=path, batch_size=2, **options)


def pixels(folder: Path) -> tuple[L.LightningModule, Any]:
    """Five images: the sampler would count one of them twice."""
    path = str(folder / "squares")
    module = SemanticSegmentation(str(folder / "segformer"), metrics=["mean_iou", "per_class_iou", "accuracy"])
    return module, SegmentationFolderData(path, test_path=path, batch_size=1)


def boxes(folder: Path) -> tuple[L.LightningModule, Any]:
    """The same five images, of which the devices have other numbers of boxes."""
    path = str(folder / "squares" / "images")
    module = ObjectDetection(str(folder / "yolos"), metrics=list(BOX_SCORES))
    return module, DetectionData(path, test_path=path, batch_size=1)


def empty(folder: Path) -> tuple[L.LightningModule, Any]:
    """One rank has no row at all."""
    module = SequenceClassification(Bag(classes=2), num_labels=2, metrics=["accuracy", "f1", "confusion_matrix"])
    return module, DataLoader(Uneven(), batch_size=3)


CASES: dict[str, Case] = {
    "classification": classification,
    "answers": answers,
    "texts": texts,
    "speech": speech,
    "pixels": pixels,
    "boxes": boxes,
    "empty": empty,
}


def logged(folder: Path, name: str, **options: Any) -> dict[str, float]:
    """What a case logs in `test`; matrices are then in `FOLDER/name`."""
    torch.manual_seed(0)
    module, data = CASES[name](folder)
    logger = CSVLogger(folder / "logs", name, version=0)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": name != "empty"}
    trainer = L.Trainer(**{"accelerator": "cpu", "devices": 1, "logger": logger, **quiet, **options})
    (found,) = trainer.test(module, data, verbose=False)
    return dict(found)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = {name: logged(folder, name, accelerator=accelerator(), devices=2, strategy="ddp") for name in CASES}
    if os.environ["LOCAL_RANK"] == "0":
        (folder / "two.json").write_text(json.dumps(found))
