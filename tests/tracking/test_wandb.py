"""What the tracking room writes into an offline run of W&B, read back from the run's own records."""

from __future__ import annotations

import errno
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_peft import PEFTError
from lightning_peft.state import read_checkpoint
from lightning_peft.tracking.weights_and_biases.artifacts import checkpoints, log_checkpoint
from lightning_peft.tracking.weights_and_biases.heat_map import heat_map_html
from lightning_peft.tracking.weights_and_biases.runs import log_configuration, log_heat_map, log_table, wandb_loggers
from lightning_peft.tracking.weights_and_biases.sources import Source, class_path, sources
from tests.callback.toys import Toy, data, lora, trainer
from tests.tracking.wandb_records import Logged, Recorded, offline, recorded

pytest.importorskip("wandb")
pytestmark = pytest.mark.xdist_group("wandb")  # one run, and one process of wandb, for all of a file
TOKEN = "hf_" + "a" * 30
CSV = "a,b\n1,2\n"
HUB = "https://huggingface.co/org/name"
LAYERS = ["body.0", "body.4 <&>"]


class Rows(L.LightningDataModule):
    """Data with a file of its own."""

    def __init__(self, path: str, batch_size: int = 8, api_token: str = TOKEN) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return data(16)

    def val_dataloader(self) -> Any:
        return data(8)


@dataclass
class Run:
    """What is there once the run is finished."""

    records: Recorded
    """What it wrote."""
    folder: Path
    best: Path
    latest: Path
    logged: list[Any]
    """What log_checkpoint returned for the best, twice, and for the latest, twice."""
    uses: list[Source]
    refused: list[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs of training, and then each function once or several times."""
    import wandb

    folder = tmp_path_factory.mktemp("wandb")
    (folder / "rows.csv").write_text(CSV)
    torch.manual_seed(0)
    with offline(folder):
        logger = WandbLogger(project="tests", save_dir=folder)
        saver = ModelCheckpoint(folder / "runs", "{epoch}", monitor="val_loss", save_last=True, save_top_k=1)
        trained, module = trainer(folder, saver, logger=CSVLogger(folder)), Toy()
        trained.fit(module, datamodule=Rows(str(folder / "rows.csv")))
        trained.loggers.append(logger)
        assert wandb_loggers(trained) == [logger]
        logger.log_metrics({"loss": 0.5}, step=2)
        experiment = logger.experiment
        log_configuration(logger, {"peft": {"method": {"r": 2}}, "list": [1, TOKEN], "hub_token": "0123456789abcdef"})
        log_configuration(logger, {"peft": {"method": {"r": 4}}, "pad_token": "<pad>"})  # as a resumed run does
        log_heat_map(experiment, "rank", LAYERS, [2, 4], [[8, 4], [8, None]], 4)
        log_heat_map(experiment, "rank", LAYERS, [2, 4, 6], [[8, 4, 2], [8, None, 8]], 6)
        log_table(experiment, "samples", ["text", "label"], [["good", 1], ["<b>", None]], 4)
        log_table(experiment, "samples", ["text", "label"], [["bad", "none"]], 6)
        uses, files = sources(trained, module), checkpoints(trained)
        noted = {"class_path": class_path(module), "loss": float("nan"), "secret": TOKEN}
        logged = [
            log_checkpoint(logger, path, aliases=aliases, metadata=noted, uses=uses)
            for path, aliases in files.items()
            for _ in range(2)
        ]
        best, latest = files
        assert files == {best: ["best"], latest: ["latest"]}
        log_checkpoint(logger, latest, aliases=["best", "latest"], uses=[Source("base", "org/name", {}, HUB)])
        torch.save({"state_dict": {"w": torch.ones(2)}}, folder / "whole.ckpt")
        refused = []
        for path in (folder / "whole.ckpt", folder / "absent.ckpt"):
            with pytest.raises(PEFTError) as error:
                log_checkpoint(logger, path, aliases=["latest"])
            refused.append(str(error.value))
        with pytest.MonkeyPatch.context() as full:
            full.setattr(wandb.Artifact, "add_file", _no_space)
            with pytest.raises(OSError, match="No space left"):
                log_checkpoint(logger, best, aliases=["other"])
        wandb.finish()
        for call in (
            lambda: log_table(experiment, "samples", ["text"], [["late"]], 8),
            lambda: log_heat_map(experiment, "rank", ["a"], [1], [[1.0]], 8),
            lambda: log_configuration(logger, {"late": 1}),
            lambda: log_checkpoint(logger, best, aliases=["other"]),
        ):
            with pytest.raises(wandb.Error, match="is finished"):
                call()
    [records] = recorded(folder)
    return Run(records, folder, best, latest, logged, uses, refused)


def _no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def adapters(run: Run) -> list[Logged]:
    return [artifact for artifact in run.records.artifacts if artifact.name.startswith("adapter-")]


def used(run: Run) -> dict[str, Logged]:
    return {artifact.name: artifact for artifact in run.records.artifacts if artifact.used}


def test_values_stand_at_their_optimizer_steps(run: Run) -> None:
    assert run.records.exit_code == 0
    assert run.records.values("loss") == [(2, 0.5)]
    assert [step for step, _ in run.records.values("rank")] == [4, 6]
    assert [step for step, _ in run.records.values("samples")] == [4, 6]


def test_the_configuration_is_nested_and_the_later_value_stands_and_secrets_dont(run: Run) -> None:
    config = run.records.config
    assert config["peft"] == {"method": {"r": 4}}
    assert config["list"] == [1, "…"]
    assert config["hub_token"] == "…"
    assert config["pad_token"] == "<pad>"
    assert "late" not in config


def test_the_tables_are_there_with_all_their_values(run: Run) -> None:
    first, last = run.records.table("samples", 0), run.records.table("samples")
    assert (first["columns"], first["data"]) == (["text", "label"], [["good", 1], ["<b>", None]])
    assert (last["columns"], last["data"]) == (["text", "label"], [["bad", "none"]])


def test_each_heat_map_is_a_page_of_its_own_step(run: Run) -> None:
    assert [run.records.values("rank")[index][1]["_type"] for index in (0, 1)] == ["html-file"] * 2
    assert run.records.media("rank", 0) == heat_map_html("rank", LAYERS, [2, 4], [[8, 4], [8, None]])
    assert "body.0, 6: 2" in run.records.media("rank")


def test_a_checkpoint_is_one_file_of_a_versioned_artifact_and_nothing_is_logged_twice(run: Run) -> None:
    best, latest, both = adapters(run)
    name = f"adapter-{run.records.id}"
    assert {(artifact.name, artifact.type, artifact.used) for artifact in adapters(run)} == {(name, "model", False)}
    # wandb itself adds latest, and so the order matters
    assert [set(artifact.aliases) for artifact in adapters(run)] == [{"best", "latest"}, {"latest"}, {"best", "latest"}]
    assert [artifact is None for artifact in run.logged] == [False, True, False, True]
    assert [list(artifact.files) for artifact in adapters(run)] == [["adapter.ckpt"]] * 3
    assert best.files["adapter.ckpt"].read_bytes() == run.best.read_bytes()
    assert latest.files["adapter.ckpt"].read_bytes() == run.latest.read_bytes()
    # what has the same content, and so the same digest, is one version to W&B, and uploaded once
    assert both.digest == latest.digest != best.digest


def test_the_file_outlives_the_checkpoint_that_it_was_made_of(run: Run) -> None:
    copy = adapters(run)[0].files["adapter.ckpt"]
    assert not copy.samefile(run.best)
    assert copy.is_relative_to(run.folder)


def test_the_metadata_is_enough_to_build_the_model_again(run: Run) -> None:
    told, spec = adapters(run)[0].metadata, read_checkpoint(run.best)["peft"]
    assert told["method"] == {"name": "LoRA", "fields": lora().fields()}
    assert (told["adapter_name"], told["modules_to_save"]) == ("default", ["head"])
    assert told["base"] == {"fingerprint": spec["base"], "quantization": None, "base_dtype": None, "stored": ""}
    assert told["class_path"] == "tests.callback.toys.Toy"
    assert told["hyper_parameters"] == {"seed": 0, "lr": 0.05}
    assert told["data"]["hyper_parameters"] == {
        "path": str(run.folder / "rows.csv"),
        "batch_size": 8,
        "api_token": "…",
    }
    assert (told["epoch"], told["global_step"]) == (0, 2)
    assert told["metrics"] == pytest.approx(spec["metrics"])
    assert set(told["metrics"]) == {"train_loss", "val_loss"}
    assert told["loss"] is None
    assert told["secret"] == "…"
    assert told["versions"]["torch"] == torch.__version__
    assert told["versions"]["lightning-peft"] == spec["version"]
    assert told["sha256"] == hashlib.sha256(run.best.read_bytes()).hexdigest()


def test_the_base_and_the_data_are_used_once_each(run: Run) -> None:
    spec, artifacts = read_checkpoint(run.best)["peft"], [item for item in run.records.artifacts if item.used]
    assert [(artifact.name, artifact.type) for artifact in artifacts] == [
        ("base-Toy", "base-model"),
        ("data-rows.csv", "dataset"),
        ("base-org-name", "base-model"),
    ]
    base, rows, hub = artifacts
    assert (
        json.loads(base.files["base.json"].read_text())["fingerprint"] == base.metadata["fingerprint"] == spec["base"]
    )
    assert base.metadata["class"] == "tests.callback.toys.Toy"
    assert rows.metadata == {
        "class": f"{__name__}.Rows",
        "path": {"name": "rows.csv", "sha256": hashlib.sha256(f"\0{len(CSV)}\0{CSV}".encode()).hexdigest()},
        "api_token": "…",
    }
    assert hub.references == {"origin": HUB}


def test_what_cant_be_logged_is_told(run: Run) -> None:
    whole, absent = run.refused
    assert whole.startswith(f"{run.folder / 'whole.ckpt'}: holds no adapter.")
    assert absent.startswith(f"{run.folder / 'absent.ckpt'}: there is no such checkpoint file")


def test_no_secret_is_in_any_file_that_is_not_lightnings_own(run: Run) -> None:
    for artifact in run.records.artifacts:
        assert TOKEN not in json.dumps(artifact.metadata)
        assert all(name == "adapter.ckpt" or TOKEN not in file.read_text() for name, file in artifact.files.items())
