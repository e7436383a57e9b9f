"""`lightning-peft fit` with a WandbLogger: two runs in one folder and one process, read back from their own records.

The second is what `wandb agent` runs of configs/sweep.yaml for one setting.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from lightning_peft import AdaLoRA, load_from_checkpoint
from lightning_peft.cli import main
from lightning_peft.state import read_checkpoint
from lightning_peft.tasks import SequenceClassification
from tests.stand_ins import STAND_INS
from tests.tracking.wandb_records import Recorded, agent_command, offline, recorded, set_by_agent

pytest.importorskip("wandb")
pytestmark = pytest.mark.xdist_group("wandb")  # one run, and one process of wandb, for all of a file
ROOT = Path(__file__).parents[2]
SWEEP: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "sweep.yaml").read_text(encoding="utf-8"))


@dataclass
class Runs:
    """What is there once both are done."""

    folder: Path
    setting: dict[str, Any]
    plain: Recorded
    swept: Recorded


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A small model in place of the quickstart's, in two epochs of two steps."""
    import wandb

    folder = tmp_path_factory.mktemp("fit")
    (folder / "model").mkdir()
    (folder / "configs").symlink_to(ROOT / "configs")
    model, rows = STAND_INS["text_classification"]
    small = ["--model.model", model(folder / "model"), "--data=TextClassificationData", "--data.path", rows(folder)]
    small += ["--trainer.accelerator=cpu", "--trainer.limit_train_batches=2", "--trainer.max_epochs=2"]
    small += ["--trainer.log_every_n_steps=1", "--trainer.enable_model_summary=false"]
    plain = ["fit", "--config", "configs/quickstart.yaml", "--trainer.logger=WandbLogger", *small]
    setting = sampled_setting()
    env, program, *words = agent_command(SWEEP, setting)
    assert (env, program, words[0]) == ("/usr/bin/env", "lightning-peft", "fit")
    place = len(words) - len(setting)  # what the setting says stands last
    with pytest.MonkeyPatch.context() as patch, offline(folder):
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        assert main([*plain, "--trainer.logger.id=plain", "--peft.method=AdaLoRA", "--data.batch_size=4"]) == 0
        assert wandb.run is None
        for name, value in set_by_agent(folder, "swept", setting).items():
            patch.setenv(name, value)
        wandb.teardown()  # it reads them once in a process
        assert main([*words[:place], *small, *words[place:]]) == 0
    return Runs(folder, setting, *recorded(folder))


def sampled_setting() -> dict[str, Any]:
    """One setting of the sweep's parameters, as W&B chooses it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the classes of sweeps are of pydantic's first version
        sweeps = pytest.importorskip("sweeps")
        chosen = sweeps.next_run(sweeps.SweepConfig({**SWEEP, "method": "random"}), []).config
    return {name: json.loads(json.dumps(item["value"])) for name, item in chosen.items()}


def test_each_run_is_its_own_and_leaves_the_others_files(runs: Runs) -> None:
    assert [(run.id, run.exit_code) for run in (runs.plain, runs.swept)] == [("plain", 0), ("swept", 0)]
    root = runs.folder / "runs" / "quickstart"
    assert {path.parts[-3] for path in root.rglob("*.ckpt")} == {"plain", "swept"}
    methods = [
        yaml.safe_load((root / name).read_text())["peft"]["method"]["class_path"]
        for name in ("config.yaml", "config.1.yaml")
    ]
    assert methods == ["lightning_peft.AdaLoRA", "lightning_peft.LoRA"]


def test_the_whole_configuration_is_there_as_it_was_resolved(runs: Runs) -> None:
    for name, run in {"config.yaml": runs.plain, "config.1.yaml": runs.swept}.items():
        file = runs.folder / "runs" / "quickstart" / name
        assert run.config["config"] == yaml.safe_load(file.read_text(encoding="utf-8"))
    assert runs.plain.config["config"]["peft"]["method"]["init_args"]["init_r"] == AdaLoRA().init_r
    assert runs.plain.config["config"]["model"]["init_args"]["learning_rate"] == AdaLoRA.learning_rate


def test_a_sweeps_setting_is_what_is_trained_with(runs: Runs) -> None:
    assert runs.setting
    resolved = runs.swept.config["config"]
    for name, value in runs.setting.items():
        assert runs.swept.config[name] == value
        place = resolved
        for part in name.split("."):
            place = place[part]
        assert place == value
    assert len(runs.swept.values(SWEEP["metric"]["name"])) == 2


def test_what_trains_and_on_which_base_is_told(runs: Runs) -> None:
    checkpoint = next(runs.folder.rglob("plain/**/*.ckpt"))
    spec, told = read_checkpoint(checkpoint)["peft"], runs.plain.config["adapter"]
    assert told["method"]["name"] == "AdaLoRA"
    model = load_from_checkpoint(SequenceClassification, checkpoint)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (told["trainable"], told["total"]) == (trainable, sum(parameter.numel() for parameter in model.parameters()))
    assert told["base"]["fingerprint"] == spec["base"]
    assert told["modules_to_save"] == ["classifier"]
    assert told["dataset"]["path"]["name"] == "a.jsonl"


def test_each_step_has_its_values(runs: Runs) -> None:
    for name in ("train_loss", "adapter/grad_norm/total", "adapter/weight_norm/total", "adapter/update_ratio/total"):
        values = runs.plain.values(name)
        assert [step for step, _ in values] == [0, 1, 2, 3]
        assert all(math.isfinite(value) and value > 0 for _, value in values)
    rates = [rate for _, rate in runs.plain.values("lr/AdamW")]
    assert max(rates) <= AdaLoRA.learning_rate
    assert [step for step, _ in runs.plain.values("val_loss")] == [1, 3]


def test_the_ranks_are_a_heat_map_of_layers_over_steps(runs: Runs) -> None:
    checkpoint = read_checkpoint(next(runs.folder.rglob("plain/**/*.ckpt")))
    end = ".adapters.default.mask"
    ranks = {key.removesuffix(end): int(mask.sum()) for key, mask in checkpoint["state_dict"].items() if end in key}
    assert len(ranks) == 12
    steps = [step for step, _ in runs.plain.values("heat_map/rank")]
    page = runs.plain.media("heat_map/rank", steps.index(checkpoint["global_step"] - 1))
    cells = re.findall(r"<title>([\w.]+), (?:\d+ to )?(\d+): (\d+)</title>", page)
    # a cell spans the steps in which the rank stayed what it is; the last one ends with the page's last step
    assert {layer: int(rank) for layer, step, rank in cells if int(step) == checkpoint["global_step"] - 1} == ranks


def test_the_samples_are_a_table_at_each_validation(runs: Runs) -> None:
    assert [step for step, _ in runs.plain.values("samples")] == [1, 3]
    table = runs.plain.table("samples")
    assert table["columns"][0] == "input"
    assert all("the film was" in row[0] for row in table["data"])
    assert all(row[1] in ("good", "bad") for row in table["data"])


def test_the_adapter_is_an_artifact_and_its_file_a_checkpoint(runs: Runs) -> None:
    for run in (runs.plain, runs.swept):
        adapters = [artifact for artifact in run.artifacts if artifact.name == f"adapter-{run.id}"]
        assert set(adapters[0].aliases) == {"best", "latest"}
        saved = {path.read_bytes() for path in runs.folder.rglob(f"{run.id}/**/*.ckpt")}
        assert {artifact.files["adapter.ckpt"].read_bytes() for artifact in adapters} >= saved
        assert len({artifact.digest for artifact in adapters}) == len(adapters)
        assert adapters[-1].metadata["class_path"] == "lightning_peft.tasks.SequenceClassification"
        assert adapters[-1].metadata["hyper_parameters"]["label_names"] == ["bad", "good"]
        used = {artifact.type: artifact.metadata for artifact in run.artifacts if artifact.used}
        assert used["base-model"]["fingerprint"] == run.config["adapter"]["base"]["fingerprint"]
        assert used["dataset"]["path"] == run.config["adapter"]["dataset"]["path"]
    assert adapters[-1].metadata["method"]["fields"]["r"] == runs.setting["peft.method.init_args.r"]
