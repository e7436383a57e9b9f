from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_peft.data import files
from lightning_peft.data.instructions import InstructionData
from lightning_peft.data.labels import IGNORED
from lightning_peft.data.language_modeling import LanguageModelingData
from lightning_peft.data.translation import TranslationData
from lightning_peft.methods.errors import PEFTError
from lightning_peft.tasks.schedules import configure
from tests.data.decoders import CHATML, faults_of, learned_text, save_tokenizer
from tests.processes import run_ranks

Write = Callable[..., str]
GIGABYTE = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), CHATML)


def pairs(rows: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"owl {number}?", "response": f"dog {number}" + " very" * (number % 4)} for number in range(rows)
    ]


def said(data: InstructionData, batches: list[dict[str, torch.Tensor]]) -> list[str]:
    return [text for batch in batches for row in batch["labels"].tolist() for text in learned_text(data.tokenizer, row)]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_the_rows_of_the_table(
    packing: bool, workers: int, write: Write, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PART", 4000)
    options: dict[str, Any] = {"tokenizer": folder, "packing": packing, "max_length": 64, "validation_fraction": 0}
    path = write("a.jsonl", pairs(300))
    found = []
    for streaming in (False, True):
        data = InstructionData(path, streaming=streaming, num_workers=workers * streaming, **options)
        data.prepare_data()
        data.setup()
        found.append(said(data, list(data.train_dataloader())))
    assert found[0] != found[1]
    assert sorted(found[0]) == sorted(found[1])
    assert len(found[0]) == 300


def test_documents_and_pairs_are_streamed_too(write: Write, folder: str) -> None:
    options: dict[str, Any] = {"tokenizer": folder, "streaming": True, "validation_fraction": 0, "max_length": 8}
    texts = [{"text": f"owl {number} " * 5} for number in range(50)]
    for packing in (False, True):
        documents = LanguageModelingData(write("a.jsonl", texts), packing=packing, **options)
        documents.setup()
        batches = list(documents.train_dataloader())
        assert all(batch["input_ids"].shape[1] <= 8 for batch in batches)
        count = sum(int((batch["input_ids"] == 2).sum()) for batch in batches)
        assert count == 50
    rows = [{"source": row["prompt"], "target": row["response"]} for row in pairs(50)]
    translation = TranslationData(write("b.jsonl", rows), **options)
    translation.setup()
    labels = [label for batch in translation.train_dataloader() for label in batch["labels"].tolist()]
    decoded = [translation.tokenizer.decode([token for token in row if token != IGNORED]) for row in labels]
    expected = translation.tokenizer([row["target"] for row in rows], truncation=True, max_length=8)["input_ids"]
    assert sorted(decoded) == sorted(translation.tokenizer.batch_decode(expected))
    assert translation.cut_targets["train"] == sum(
        len(translation.tokenizer(row["target"])["input_ids"]) > 8 for row in rows
    )


def test_the_head_is_checked_before_training(
    write: Write, folder: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = pairs(60)
    rows[6] = {"prompt": "owl", "response": ""}
    rows[8] = {"prompt": "owl " * 80, "response": "dog"}
    options: dict[str, Any] = {"tokenizer": folder, "streaming": True, "max_length": 64}
    assert faults_of(InstructionData(write("a.jsonl", rows), **options)) == [
        "response_column: 1 of 60 rows of the train data have no text in 'response': row 7"
    ]
    del rows[6]
    path = write("a.jsonl", rows)
    assert faults_of(InstructionData(path, **options)) == [
        "max_length: in 1 of 59 rows of its head of the train data the prompt alone fills 64 tokens, and nothing of "
        "the response would be learned: row 8; raise max_length, or leave them out with drop_long=True"
    ]
    data = InstructionData(path, **options, drop_long=True)
    with caplog.at_level("INFO"):
        data.setup()
    assert data.dropped_rows == {"train": 1}
    assert "a stream has no rows to hold out, so there is no validation" in caplog.text
    assert len(said(data, list(data.train_dataloader()))) == 58
    assert data.val_dataloader() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_faulty_rows_behind_the_head_are_told_as_they_come(workers: int, write: Write, folder: str) -> None:
    def told(row: dict[str, Any]) -> str:
        path = write("a.jsonl", [*pairs(1100), row])
        data = InstructionData(path, tokenizer=folder, streaming=True, max_length=64, num_workers=workers)
        data.setup()
        with pytest.raises(PEFTError) as caught:
            list(data.train_dataloader())
        return str(caught.value)

    assert told({"prompt": "owl"}) == (
        'response_column: the row {"prompt": "owl", "response": null}… has no text in \'response\''
    )
    assert told({"prompt": "owl " * 80, "response": "dog"}).endswith("… has a prompt that fills 64 tokens alone")


def test_a_trainer_tells_the_epoch_and_validates_on_a_table(write: Write, folder: str) -> None:
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.order: list[list[list[int]]] = []
            self.validated = 0

        def on_train_epoch_start(self) -> None:
            self.order.append([])

        def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            self.order[-1] += batch["input_ids"].tolist()
            return self.weight.sum()

        def validation_step(self, batch: dict[str, torch.Tensor]) -> None:
            self.validated += len(batch["input_ids"])

        def configure_optimizers(self) -> Any:
            return configure(self, None, None, {"learning_rate": 0.1, "weight_decay": 0.0, "warmup_ratio": 0.1})

    def orders() -> list[list[list[int]]]:
        module = Module()
        data = InstructionData(
            write("a.jsonl", pairs(40)),
            validation_path=write("b.jsonl", pairs(7)),
            tokenizer=folder,
            streaming=True,
            batch_size=40,
        )
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, data)
        assert module.validated == 14
        # a stream doesn't tell when training ends, so the rate stays
        assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1
        return module.order

    first, second = orders()
    assert len(first) == len(second) == 40
    assert sorted(first) == sorted(second)
    assert first != second
    assert orders() == [first, second]


RANKS = """
import json, sys, datasets, lightning as L, torch
from lightning_peft.data import sampling
from lightning_peft.data.instructions import InstructionData

path, folder, cache, out = sys.argv[1:]
datasets.config.HF_DATASETS_CACHE, sampling.AHEAD = cache, 3

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.rows = torch.nn.Parameter(torch.zeros(1)), []
    def training_step(self, batch):
        self.rows += [row for row, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"])]
        return self.weight.sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
    def on_train_end(self):
        rows = [self.trainer.datamodule.tokenizer.decode(row) for row in self.rows]
        with open(f"{out}.{self.global_rank}", "w") as file:
            json.dump([self.trainer.global_step, rows], file)

L.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
          enable_progress_bar=False).fit(
    Module(), InstructionData(path, tokenizer=folder, streaming=True, drop_long=True, max_length=64, batch_size=4))
"""


@pytest.mark.xdist_group("devices")
@pytest.mark.timeout(400)
@pytest.mark.slow
def test_two_processes_take_equally_many_batches_of_disjoint_rows(write: Write, folder: str, tmp_path: Path) -> None:
    # every second row is the first rank's, and many of them are too long: it has far fewer than the second
    rows = [
        {"prompt": f"owl {number} " * (60 if number % 2 == 0 and number % 4 else 1), "response": "dog"}
        for number in range(200)
    ]
    out = tmp_path / "out"
    run_ranks(tmp_path, ["-c", RANKS, write("a.jsonl", rows), folder, tmp_path / "cache", out])
    (steps, first), (others, second) = (json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2))
    assert steps == others == 13
    assert not set(first) & set(second)
    assert (len(first), len(second)) == (50, 52)


MEASURE = """
import json, sys, threading, time
import datasets, torch, transformers
import lightning_peft.data.instructions
from lightning_peft.data.files import load_table

path, folder, cache, streaming, packing = sys.argv[1:]
datasets.config.HF_DATASETS_CACHE = cache
transformers.AutoTokenizer.from_pretrained(folder)  # what loading one imports is no data

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

start, peak, running, begun = anonymous(), [0.0], [True], time.perf_counter()

def watch():
    while running[0]:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.01)

thread = threading.Thread(target=watch)
thread.start()
try:
    if streaming == "True":
        data = lightning_peft.data.instructions.InstructionData(
            path, tokenizer=folder, streaming=True, packing=packing == "True", max_length=512, batch_size=8)
        data.prepare_data()
        data.setup()
        batches = iter(data.train_dataloader())
        next(batches)
        seconds = time.perf_counter() - begun
        for _ in range(19):
            next(batches)
    else:
        assert len(load_table(path)["train"]) > 0
        seconds = time.perf_counter() - begun
finally:
    running[0] = False
    thread.join()
print(json.dumps({"megabytes": peak[0] - start, "seconds": seconds}))
"""


@pytest.fixture(scope="module")
def gigabyte(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A JSONL file of a gigabyte, of prompts and responses of about 500 bytes each."""
    path = tmp_path_factory.mktemp("gigabyte") / "a.jsonl"
    block = "".join(
        json.dumps({"prompt": f"{number} " + "owls watch the dog " * 26, "response": "seven wise foxes jump " * 22})
        + "\n"
        for number in range(1000)
    )
    with path.open("w") as file:
        for _ in range(-(-GIGABYTE // len(block))):
            file.write(block)
    assert path.stat().st_size >= GIGABYTE
    return str(path)


def measure(path: str, folder: str, cache: Path, streaming: bool, packing: bool) -> dict[str, float]:
    command = [sys.executable, "-c", MEASURE, path, folder, str(cache), str(streaming), str(packing)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, check=True, timeout=170, capture_output=True, text=True, env=environment)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    print(f"streaming={streaming} packing={packing}: {found}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_a_gigabyte_is_streamed_in_little_memory(packing: bool, gigabyte: str, folder: str, tmp_path: Path) -> None:
    found = measure(gigabyte, folder, tmp_path, streaming=True, packing=packing)
    assert found["megabytes"] < 200
    assert found["seconds"] < 60
    # nothing is converted
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 10**6


@pytest.mark.slow
def test_a_gigabyte_is_mapped_in_bounded_memory(gigabyte: str, folder: str, tmp_path: Path) -> None:
    found = measure(gigabyte, folder, tmp_path, streaming=False, packing=False)
    assert found["megabytes"] < 500
    assert found["seconds"] < 60
