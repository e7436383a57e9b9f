"""AdapterMonitor with Weights & Biases: an offline run, read back from its own records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_peft import AdaLoRA, AdapterMonitor
from lightning_peft.state import read_checkpoint
from lightning_peft.tracking.monitor.samples import sample_table
from tests.callback.toys import Toy, data, trainer
from tests.tracking.wandb_records import Recorded, offline, recorded

pytest.importorskip("wandb")
TARGETS = ["body.0", "body.4"]


class Named(Toy):
    """Classes have names, and there is a metric that predictions would move."""

    def __init__(self) -> None:
        super().__init__()
        self.hparams["label_names"] = ["cat", "dog", "owl"]
        self.mean = MeanMetric()

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        super().validation_step(batch, _)
        self.mean.update(batch[0])

    def predict_step(self, batch: list[Tensor], _: int) -> Tensor:
        assert not self.training
        torch.rand(1)
        self.mean.update(1e6)
        return self(batch[0]).softmax(-1)

    def on_validation_epoch_end(self) -> None:
        self.log("val_mean", self.mean.compute())
        self.mean.reset()


def train(folder: Path, **options: Any) -> tuple[L.Trainer, Toy]:
    torch.manual_seed(0)
    module = Named()
    saver = ModelCheckpoint(folder / "runs", "{epoch}", monitor="val_loss", save_last=True, save_top_k=-1)
    method = AdaLoRA(init_r=6, target_r=2, target_modules=TARGETS)
    defaults: dict[str, Any] = {"max_epochs": 3, "log_every_n_steps": 2, "method": method}
    trained = trainer(folder, saver, **{**defaults, **options})
    trained.fit(module, data(), data(24))
    return trained, module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorded, L.Trainer, Toy]:
    import wandb

    folder = tmp_path_factory.mktemp("monitor")
    with offline(folder):
        trained, module = train(folder, logger=WandbLogger(project="tests", save_dir=folder))
        wandb.finish()
    [records] = recorded(folder)
    return records, trained, module


def test_totals_are_numbers_and_layers_are_heat_maps(run: Any) -> None:
    records, _, _ = run
    steps = [*range(1, 24, 2)]
    assert [step for step, _ in records.values("adapter/grad_norm/total")] == steps
    assert [step for step, _ in records.values("train_loss")] == steps
    names = {name for row in records.history for name in row}
    assert not {name for name in names if name.startswith("adapter/") and not name.endswith("/total")}
    assert {name for name in names if name.startswith("heat_map/")} == {
        f"heat_map/{name}" for name in ("grad_norm", "weight_norm", "update_ratio", "rank")
    }
    # one at each epoch's end, of all steps so far
    assert [step for step, _ in records.values("heat_map/rank")] == [7, 15, 23]
    page = records.media("heat_map/rank")
    assert "body.0" in page
    assert "body.4" in page
    assert "23" in page
    assert records.media("heat_map/rank", 0) != page
    assert "head" in records.media("heat_map/grad_norm")


def test_predictions_are_a_table(run: Any) -> None:
    records, _, module = run
    assert len(records.values("samples")) == 3
    table = records.table("samples")
    assert table["columns"] == ["input", "target", "prediction"]
    (x, y), *_ = data(24)
    module.eval()
    likely = module(x).softmax(-1)
    names = module.hparams["label_names"]
    for row, values, label, own in zip(table["data"], x, y, likely, strict=True):
        assert row[0] == str([round(float(value), 6) for value in values])
        assert row[1] == names[label]
        assert row[2] == f"{names[own.argmax()]} ({own.max():.3f})"
    # the sanity check's batch is not among them, and the metric is the one of validation alone
    assert [step for step, _ in records.values("samples")] == [step for step, _ in records.values("val_loss")]
    whole = torch.cat([batch[0] for batch in data(24)]).mean()
    assert records.values("val_mean")[0][1] == pytest.approx(float(whole), abs=1e-6)


def test_checkpoints_are_artifacts_and_the_run_is_described(run: Any) -> None:
    records, trained, _ = run
    own = [artifact for artifact in records.artifacts if artifact.type == "model"]
    last: dict[str, Any] = {alias: artifact for artifact in own for alias in artifact.aliases}
    saver = trained.checkpoint_callback
    steps = {alias: artifact.metadata["global_step"] for alias, artifact in last.items()}
    best = read_checkpoint(saver.best_model_path, "meta")
    assert steps == {"best": best["global_step"], "latest": 24}
    assert len({artifact.digest for artifact in own}) == len(own)
    assert {artifact.type for artifact in records.artifacts if artifact.used} == {"base-model", "dataset"}
    told = records.config["adapter"]
    assert told["method"]["name"] == "AdaLoRA"
    assert told["base"]["fingerprint"] == best["peft"]["base"]
    assert told["dataset"]["rows"] == 64


def test_training_is_the_same_without_it_to_the_bit(run: Any, tmp_path: Path) -> None:
    _, logged, module = run
    trained, plain = train(tmp_path, logger=False)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in module.state_dict().items())
    for name, value in trained.callback_metrics.items():
        assert torch.equal(value, logged.callback_metrics[name]), name


class Dead:
    """A run that takes nothing any more."""

    def __init__(self) -> None:
        self.config: Any = self
        self.offline = True
        self.id = "dead"
        self.asked: list[str] = []

    def refuse(self, *values: Any, **_: Any) -> None:
        self.asked += [str(name) for value in values if isinstance(value, dict) for name in value]
        raise OSError(28, "No space left on device")

    log = update = log_artifact = _log_artifact = define_metric = refuse


class DeadLogger(WandbLogger):
    @property
    def experiment(self) -> Any:
        return self._experiment


@pytest.mark.parametrize("log_model", [False, "all"])
def test_a_run_of_wandb_that_fails_does_not_end_training(log_model: Any, tmp_path: Path) -> None:
    run = Dead()
    logger = DeadLogger(experiment=run, log_model=log_model)
    with pytest.warns(UserWarning, match="AdapterMonitor") as told:
        trained, module = train(tmp_path, logger=logger)
    # one reason is told once, whatever else it keeps from being logged
    assert [str(warning.message) for warning in told if str(warning.message).startswith("AdapterMonitor")] == [
        "AdapterMonitor: DeadLogger.log_hyperparams failed and is left out, the run goes on "
        "(OSError: [Errno 28] No space left on device)"
    ]
    assert trained.global_step == 24
    # Lightning asks each time, as a full disk may be emptied
    assert run.asked.count("train_loss") == 12
    _, alone = train(tmp_path, logger=False)
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in module.state_dict().items())
    # the same logger, of which a strict monitor wants to know
    strict = trainer(tmp_path, AdapterMonitor(strict=True), logger=logger)
    with pytest.raises(OSError, match="No space left"):
        strict.fit(Named(), data(), data(24))


class Tokenizer:
    """Letters."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(96 + token) for token in ids if token or not skip_special_tokens)


class Texts(L.LightningModule):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer, self.tokenizer, self.given = answer, Tokenizer(), 0
        self.layer = nn.Linear(1, 1)

    def predict_step(self, batch: Any, _: int) -> Any:
        self.given = len(batch["input_ids"])
        return self.answer(batch)


def test_texts_are_decoded_and_a_large_batch_is_cut() -> None:
    ids = torch.tensor([[1, 2, 0], [3, 0, 0], [4, 5, 6], [7, 7, 7]])
    batch = {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "labels": torch.where(ids > 1, ids, -100),
        "name": ["a", "b", "c", "d"],
        "scale": torch.tensor(2.0),
    }
    module = Texts(lambda batch: [{"text": name * 2, "score": 0.5} for name in batch["name"]])
    plain = L.Trainer(accelerator="cpu", logger=False, barebones=True)
    assert sample_table(plain, module, batch, 2) == (
        ["input", "target", "text", "score"],
        [["ab", "b", "aa", 0.5], ["c", "c", "bb", 0.5]],
    )
    assert module.given == 2
    images = {"input_ids": ids, "labels": torch.ones(4, 3, 8, 8)}
    module = Texts(lambda batch: torch.ones(len(batch["input_ids"]), 2))
    columns, rows = sample_table(plain, module, images, 8) or ([], [])
    assert columns == ["input", "target", "prediction"]
    assert rows[2] == ["def", "float32 of shape (3, 8, 8)", "[1.0, 1.0]"]
    assert sample_table(plain, Texts(None), "nothing", 2) is None
    assert sample_table(plain, L.LightningModule(), batch, 2) is None
