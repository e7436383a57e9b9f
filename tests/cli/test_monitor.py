"""What is logged of a run that the command line starts."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import Logger

from tests.cli.conftest import Command

LOGGER = '''
from lightning.pytorch.loggers import Logger


class Told(Logger):
    """Keeps what it is told, and fails if asked to."""

    name, version, save_dir = "told", "0", "runs"
    seen = {}

    def __init__(self, fails: bool = False, api_key: str = "k" * 20):
        super().__init__()
        self.fails = fails

    def log_hyperparams(self, params, *_, **__):
        # the module's own are told by Lightning, which nothing guards
        if self.fails and {"config", "adapter"} & set(params):
            raise ConnectionError("the server is gone")
        self.seen.update(params)

    def log_metrics(self, metrics, step=None):
        pass
'''


def logged(folder: Path) -> list[str]:
    """The names of the last run's metrics."""
    [file] = folder.glob("runs/**/metrics.csv")
    with file.open() as lines:
        return list(csv.DictReader(lines).fieldnames or ())


def test_the_monitor_and_the_meter_are_named_by_their_classes(command: Command, folder: Path) -> None:
    callbacks = [
        {"class_path": "AdapterMonitor", "init_args": {"every_n_steps": 2, "samples": 0}},
        {"class_path": "CostMeter", "init_args": {"overhead": False}},
    ]
    (folder / "watched.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    code, _, err = command("fit", "--config", "lora.yaml", "--config", "watched.yaml")
    assert (code, err.count("AdapterMonitor")) == (0, 0)
    names = logged(folder)
    assert {"adapter/grad_norm/total", "adapter/update_ratio/net.0", "lr/SGD", "speed/samples_per_second"} <= {*names}
    assert {"cost/step_flops", "cost/checkpoint_bytes", "cost/trainable"} <= {*names}
    assert "cost/overhead_merged" not in names
    code, _, err = command("fit", "--config", "lora.yaml", "--trainer.callbacks+=AdapterMonitor",
                           "--trainer.callbacks.every_n_steps=0")  # fmt: skip
    assert code == 2
    assert "AdapterMonitor.every_n_steps: 0 is no number of steps; give 1 or more, or None" in err


@pytest.mark.parametrize("fails", [False, True])
def test_other_loggers_get_the_whole_configuration_without_secrets(
    command: Command, folder: Path, fails: bool, recwarn: pytest.WarningsRecorder
) -> None:
    (folder / "told.py").write_text(LOGGER)
    sys.modules.pop("told", None)
    code, _, _ = command(
        "fit", "--config", "lora.yaml", "--trainer.logger=told.Told", f"--trainer.logger.fails={str(fails).lower()}"
    )
    messages = [
        str(warning.message) for warning in recwarn if "(ConnectionError: the server is gone)" in str(warning.message)
    ]
    assert code == 0
    kind: type[Logger] = sys.modules["told"].Told
    if fails:
        assert messages == [
            "the configuration: logging to Told failed and is left out, the run goes on "
            "(ConnectionError: the server is gone)",
            "AdapterMonitor: the description of the run failed and is left out, the run goes on "
            "(ConnectionError: the server is gone)",
        ]
        return
    config = kind.seen["config"]  # type: ignore[attr-defined]
    assert config["peft"]["method"] == {
        "class_path": "lightning_peft.LoRA",
        "init_args": config["peft"]["method"]["init_args"],
    }
    assert config["peft"]["method"]["init_args"]["r"] == 2
    assert config["trainer"]["logger"]["init_args"]["api_key"] == "…"
    assert config["seed_everything"] == 1
    assert kind.seen["adapter"]["method"]["fields"]["r"] == 2  # type: ignore[attr-defined]
