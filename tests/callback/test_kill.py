"""A run that is killed at any moment goes on from its last complete checkpoint, to the bits of an unbroken one."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_peft import load_from_checkpoint
from lightning_peft.state import AtomicCheckpointIO, read_checkpoint
from tests.callback.toys import Toy
from tests.forked import Forked

SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from lightning_peft.state import AtomicCheckpointIO
io, count = AtomicCheckpointIO(), 0
while True:
    count += 1
    io.save_checkpoint({"count": count, "w": torch.full((400_000,), float(count))}, Path(sys.argv[1]) / "last.ckpt")
    if count == 3: (Path(sys.argv[1]) / "ready").touch()
"""

FIT = """
import sys, logging, warnings
warnings.filterwarnings("ignore"); logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
from pathlib import Path
import lightning as L, torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.callback.toys import Toy, data, trainer
torch.set_num_threads(1)
folder, epochs = Path(sys.argv[1]), int(sys.argv[2])
L.seed_everything(5, verbose=False)
module, last = Toy(), folder / "last.ckpt"
if last.exists():
    L.seed_everything(77, verbose=False)
run = trainer(folder, ModelCheckpoint(folder, save_last=True, save_top_k=-1), max_epochs=epochs)
loader = torch.utils.data.DataLoader(data(256).dataset, 8, shuffle=True)
run.fit(module, loader, ckpt_path=last if last.exists() else None)
torch.save(module.state_dict(), folder / "end.pt")
"""


def start(code: str, folder: Path, *arguments: object) -> Forked:
    folder.parent.mkdir(exist_ok=True)
    return Forked(["-c", code, str(folder), *map(str, arguments)], os.environ, folder.with_suffix(".log"))


def wait_until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_while_saving(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(6):
        process = start(SAVE_FOREVER, tmp_path)
        wait_until((tmp_path / "ready").exists)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        (tmp_path / "ready").unlink()
        checkpoint = read_checkpoint(tmp_path / "last.ckpt")
        assert checkpoint["count"] >= 3
        assert torch.equal(checkpoint["w"], torch.full((400_000,), float(checkpoint["count"])))
    assert {path.name for path in tmp_path.iterdir()} <= {"last.ckpt", ".last.ckpt.part"}


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    epochs, broken, unbroken = 6, tmp_path / "broken", tmp_path / "unbroken"
    process = start(FIT, unbroken, epochs)
    assert process.wait() == 0, unbroken.with_suffix(".log").read_text()
    kills = 0
    for after in (1, 3):
        process = start(FIT, broken, epochs)
        wait_until(lambda: len(list(broken.glob("epoch*.ckpt"))) >= after or process.poll() is not None)  # noqa: B023
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 2
    process = start(FIT, broken, epochs)
    assert process.wait() == 0, broken.with_suffix(".log").read_text()
    expected, ended = (torch.load(folder / "end.pt", weights_only=True) for folder in (unbroken, broken))
    assert expected.keys() == ended.keys()
    for key, value in expected.items():
        assert torch.equal(ended[key], value), key
    load_from_checkpoint(Toy, broken / "last.ckpt")


def test_a_failed_write_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"count": 1}, path)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"count": 2}, path)
    monkeypatch.undo()
    assert read_checkpoint(path) == {"count": 1}
