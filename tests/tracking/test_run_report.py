"""The report of a run against what a Trainer, a module and its files hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft import AdaLoRA, LoRA
from lightning_peft.injection import method_adapters
from lightning_peft.tracking.comparison import read_report, report
from lightning_peft.tracking.comparison.report import RunReport
from tests.callback.toys import Toy, data, trainer


class Watched(Toy):
    """Keeps each batch's loss, and what its validations gave."""

    def __init__(self) -> None:
        super().__init__(lr=0.03)
        self.losses: list[float] = []
        self.validations: list[float] = []

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor | None:
        loss = super().training_step(batch, _)
        assert loss is not None
        self.losses.append(loss.item())
        return loss

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.log("val_nothing", math.nan)


def run(folder: Path, method: Any, **options: Any) -> tuple[Watched, dict[str, Any]]:
    L.seed_everything(5)
    module = Watched()
    saver = ModelCheckpoint(folder, filename="best", monitor="val_loss")
    fitted = trainer(folder, RunReport(str(folder / "report.json")), saver, method=method, **options)
    fitted.fit(module, data(), data())
    found = json.loads((folder / "report.json").read_text())
    assert read_report(folder / "report.json") == found
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    return module, found


def test_a_report_says_what_the_run_was(tmp_path: Path) -> None:
    module, found = run(tmp_path, LoRA(r=2))
    assert (found["method"], found["fields"]["r"], found["modules_to_save"]) == ("LoRA", 2, ["head"])
    assert (found["seed"], found["steps"], found["learning_rate"], found["device"]) == (5, 16, 0.03, "cpu")
    assert [point["step"] for point in found["train"]] == list(range(1, 17))
    assert [point["loss"] for point in found["train"]] == pytest.approx(module.losses, rel=1e-6)
    assert [point["step"] for point in found["validation"]] == [8, 16]
    # what is no number is null, and metrics of training are not among those of validation
    assert found["validation"][-1]["metrics"]["val_nothing"] is None
    assert set(found["validation"][-1]["metrics"]) == {"val_loss", "val_nothing"}
    assert found["validation"][-1]["metrics"]["val_loss"] == pytest.approx(
        float(module.trainer.callback_metrics["val_loss"]), rel=1e-6
    )
    assert 0 < found["seconds"] < 60
    assert found["cost"]["trainable"] == 2 * (8 + 16) + 2 * (16 + 16) + 16 * 3 + 3
    assert found["cost"]["checkpoint_bytes"] == (tmp_path / "best.ckpt").stat().st_size
    assert found["versions"]["torch"] == torch.__version__
    norms = {
        path: math.sqrt(sum(float(tensor.detach().double().square().sum()) for tensor in adapter.parameters()))
        for path, adapter in method_adapters(module, "default").items()
    }
    assert set(found["norms"]) == {"body.0", "body.4"}
    assert found["norms"] == pytest.approx(norms, rel=1e-9)
    assert found["ranks"] == {}


def test_ranks_are_told_where_the_method_changes_them(tmp_path: Path) -> None:
    module, found = run(tmp_path, AdaLoRA(init_r=4, target_r=2, tinit=2, tfinal=4, delta_t=1))
    masks = {path: int(adapter.mask.sum()) for path, adapter in method_adapters(module, "default").items()}  # type: ignore[operator, union-attr]
    assert found["ranks"] == masks
    assert sum(masks.values()) == 4


def test_a_step_of_several_batches_is_one_point_and_long_runs_are_thinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "POINTS", 3)
    module, found = run(tmp_path, LoRA(r=2), accumulate_grad_batches=2)
    assert [point["step"] for point in found["train"]] == [4, 8]
    # the second batch of each step, undivided
    assert [point["loss"] for point in found["train"]] == pytest.approx([module.losses[7], module.losses[15]], rel=1e-6)


def test_without_adapters_there_is_a_report_too_and_none_of_a_run_that_failed(tmp_path: Path) -> None:
    class Broken(Toy):
        def on_train_epoch_end(self) -> None:
            raise RuntimeError("a bug of the module")

    options: dict[str, Any] = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "enable_checkpointing": False}
    path = tmp_path / "deep" / "report.json"
    with pytest.raises(RuntimeError, match="a bug"):
        L.Trainer(callbacks=[RunReport(str(path))], **options).fit(Broken(), data(), data())
    assert not path.exists()
    L.Trainer(callbacks=[RunReport(str(path))], **options).fit(Toy(), data(), data())
    found = read_report(path)
    assert found is not None
    assert (found["method"], found["norms"], found["ranks"]) == (None, {}, {})
    assert found["cost"]["trainable"] == found["cost"]["total"] == sum(p.numel() for p in Toy().parameters())
    path.write_text('{"format": 2}')
    assert read_report(path) is None
    path.write_text("{")
    assert read_report(path) is None
