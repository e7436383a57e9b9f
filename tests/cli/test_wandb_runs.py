"""A W&B that lets nobody in: a run of the command line goes on without it, unless it is asked not to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

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
