"""A W&B that lets nobody in, dies, or isn't there: a run of the command line goes on without it, unless it is asked not
to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_peft.state import read_checkpoint
from tests.cli.conftest import Command
from tests.tracking.wandb_records import offline, recorded

wandb = pytest.importorskip("wandb")
pytestmark = pytest.mark.xdist_group("wandb")  # one run, and one process of wandb, for all of a file
FIT = ("fit", "--config", "lora.yaml", "--trainer.logger=WandbLogger", "--trainer.limit_train_batches=1")
STRICT = '--trainer.callbacks={"class_path": "AdapterMonitor", "init_args": {"strict": true}}'
TOLD = "W&B: [^\n]*(?i:api.key)[^\n]*; "


@pytest.fixture
def without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B as somebody has it who never logged in; the server is not even asked."""
    with offline(tmp_path / "wandb"):
        monkeypatch.delenv("WANDB_MODE")
        yield


@pytest.mark.usefixtures("without_a_key")
def test_the_run_is_recorded_offline(folder: Path, command: Command) -> None:
    with pytest.warns(UserWarning, match=f"^{TOLD}the run is recorded offline, and `wandb sync` uploads it later on$"):
        code, _, _ = command(*FIT)
    assert code == 0
    wandb.teardown()  # its process writes the last records as it ends
    [run] = recorded(folder)
    assert run.exit_code == 0
    assert run.config["adapter"]["method"]["name"] == "LoRA"
    assert [artifact.name for artifact in run.artifacts if artifact.type == "model"] == [f"adapter-{run.id}"]


@pytest.mark.usefixtures("without_a_key")
def test_a_strict_monitor_ends_it_before_it_starts(folder: Path, command: Command) -> None:
    code, printed, errors = command(*FIT, STRICT)
    assert (code, printed) == (2, "")
    assert re.search(f"^lightning-peft: {TOLD}log in, or set WANDB_MODE=offline$", errors, re.MULTILINE)
    assert recorded(folder) == []


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B as somebody has it who didn't install it."""
    monkeypatch.setattr("lightning_peft.cli.app.find_spec", lambda name: None)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", None)


@pytest.mark.usefixtures("absent")
@pytest.mark.parametrize("loggers", [["WandbLogger"], ["CSVLogger", "WandbLogger"]])
def test_where_it_is_not_installed_others_log(loggers: list[str], folder: Path, command: Command) -> None:
    made = [{"class_path": name, "init_args": {"save_dir": "own"}} for name in loggers]
    options = f"--trainer.logger={json.dumps(made if len(made) > 1 else made[0])}"
    missing = "trainer.logger: wandb is not installed; pip install 'lightning-peft[wandb]'"
    with pytest.warns(UserWarning, match=rf"^{re.escape(missing)}\. W&B gets nothing of this run$"):
        code, _, _ = command(*FIT, options)
    assert code == 0
    # without another, the one that Lightning takes by itself
    place = "own/lightning_logs" if len(loggers) > 1 else "lightning_logs"
    assert sorted(path.name for path in (folder / place / "version_0").iterdir())[:1] == ["checkpoints"]
    code, _, errors = command(*FIT, options, STRICT)
    assert (code, errors) == (2, f"lightning-peft: {missing}\n")


DYING = '''
"""wandb's own process dies before the fourth step."""
import os, signal
from pathlib import Path
import lightning as L

class Dying(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == 3:
            for file in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
                for child in file.read_text().split():
                    if b"wandb-core" in Path(f"/proc/{child}/cmdline").read_bytes():
                        os.kill(int(child), signal.SIGKILL)
                        print("killed", os.waitpid(int(child), 0)[0] == int(child))
'''


@pytest.mark.slow
@pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task").is_dir(), reason="finds wandb's process as Linux tells it")
def test_a_run_goes_on_after_it_has_died(folder: Path) -> None:
    (folder / "dying.py").write_text(DYING)
    options = ["--trainer.logger=WandbLogger", "--trainer.log_every_n_steps=1", "--trainer.callbacks=dying.Dying"]
    words = [sys.executable, "-m", "lightning_peft", "fit", "--config", "lora.yaml", "--trainer.max_epochs=5", *options]
    environment = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    # in a process of its own, as wandb has one for all runs of one
    run = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("killed True") == 1
    assert run.stderr.count("AdapterMonitor: WandbLogger.log_metrics failed and is left out, the run goes on (") == 1
    assert run.stderr.count("W&B: the end of the run failed and is left out, the run goes on (") == 1
    [checkpoint] = folder.glob("**/*.ckpt")
    assert read_checkpoint(checkpoint)["global_step"] == 10
