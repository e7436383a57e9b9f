"""The command as a process of its own: exit codes, standard error, a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "lightning_peft"]
SCRIPT = [sys.executable, "-c", "import sys; from lightning_peft.cli import main; sys.path.pop(0); sys.exit(main())"]


def test_a_mistake_gives_2_and_no_traceback(folder: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "fit", "--config", "lora.yaml", "--peft.method.rr=3"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "lightning-peft: command line: peft.method.init_args.rr: LoRA has no 'rr'; did you mean 'r' or 'rslora'?\n"
    )


def test_a_bug_gives_1_and_its_traceback(folder: Path) -> None:
    words = ["fit", "--config", "lora.yaml", "--model.fails=true"]
    done = subprocess.run([*SCRIPT, *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.strip().endswith("RuntimeError: a bug of the module")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
def test_an_interrupted_run_says_how_to_go_on(folder: Path) -> None:
    words = ["fit", "--config", "lora.yaml", "--model.pause=0.1", "--trainer.max_epochs=500"]
    process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    checkpoints = folder / "runs/lightning_logs/version_0/checkpoints"
    deadline = time.monotonic() + 60
    while not list(checkpoints.glob("*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    place, checkpoint, resume = err.splitlines()[-3:]
    assert place.startswith("Interrupted in epoch ")
    [file] = checkpoints.glob("*.ckpt")
    name = file.relative_to(folder)
    assert checkpoint.startswith(f"Last checkpoint: {name} (")
    assert resume == f"To go on:        lightning-peft {' '.join(words)} --ckpt_path {name}"
