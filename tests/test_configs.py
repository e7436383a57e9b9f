"""Every file in configs/: it is short, says how to launch it, and runs, with stand-ins for what is on the hub.

sweep.yaml is no configuration of a run; tests/test_sweep.py is about it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_peft.cli import main
from tests.stand_ins import STAND_INS

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "sweep")
pytestmark = pytest.mark.usefixtures("datasets_cache")


def words(name: str, folder: Path) -> list[str]:
    """The configuration on small models and data, on one CPU."""
    model, data = STAND_INS[name]
    (folder / "model").mkdir()
    where = ["--model.model", model(folder / "model"), "--data.path", data(folder)]
    small = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--data.num_workers=0"]
    return ["--config", str(FOLDER / f"{name}.yaml"), *where, *small, "--trainer.enable_progress_bar=false"]


@pytest.mark.parametrize("name", sorted(STAND_INS))
def test_it_trains_for_two_steps_and_its_checkpoint_is_evaluated(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = words(name, tmp_path)
    assert (
        main(["fit", *given, "--trainer.limit_train_batches=2", "--trainer.max_epochs=1", "--data.batch_size=4"]) == 0
    )
    assert "trainable%" in capsys.readouterr().out
    (checkpoint,) = (tmp_path / "runs" / name).rglob("*.ckpt")
    monitor = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["trainer"]["callbacks"][0]["init_args"]["monitor"]
    assert f"{monitor}=" in checkpoint.name
    assert main(["validate", *given, "--ckpt_path", str(checkpoint)]) == 0
    assert monitor in capsys.readouterr().out


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_short_and_says_how_to_launch_it(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"lightning-peft fit --config configs/{name}.yaml" in text.split("\n\n")[0]
    assert len(text.splitlines()) <= 50
    assert set(yaml.safe_load(text)) == {"seed_everything", "model", "data", "peft", "trainer"}
    assert yaml.safe_load(text)["trainer"]["default_root_dir"] == f"runs/{name}"


def test_every_task_has_one() -> None:
    from lightning_peft import tasks

    used = {yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["model"]["class_path"] for name in CONFIGS}
    assert used == set(tasks.__all__)
    assert set(STAND_INS) == set(CONFIGS) - {"quickstart"}
