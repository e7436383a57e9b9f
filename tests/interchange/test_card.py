"""The card: read by huggingface_hub's own parser, true to the model, and silent about what is the user's alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from lightning_peft import DoRA, LoRA, PEFTError, inject
from lightning_peft.interchange.card import auto_class, changed_fields, is_own_card, model_card
from tests.callback.toys import Toy, data, trainer
from tests.methods.models import MODELS

CHECKPOINT: dict[str, Any] = {
    "peft": {"metrics": {"val_loss": 0.123456, "val_accuracy": 1.0}},
    "datamodule_hyper_parameters": {
        "_class_path": "lightning_peft.data.TextClassificationData",
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "path": "/home/zelda/secret-project/rows.jsonl",
        "files": {"train": "~/rows.csv", "val": "data/val.csv", "test": "C:\\Users\\zelda\\rows.csv"},
        "address": "https://zelda:pass@example.org/rows.csv?signature=abc",
        "local": "file:///home/zelda/rows.csv",
        "batch_size": 8,
        "tokenizer": "org/words",
        "hf_token": "hunter2",
        "api_keys": ["hunter2hunter2hunter2"],
        "api_key": "hunter2",
        "options": {"password": "hunter2", "workers": 2},
        "note": "hf_" + "hunter2" * 4,
        "limit": None,
    },
}


def model(name: str = "bert", **fields: Any) -> nn.Module:
    fields = {"target_modules": ["query"], **fields}
    return inject(MODELS[name](), LoRA(**fields), modules_to_save=["classifier"] if name == "bert" else [])


def test_the_hubs_parser_reads_its_metadata() -> None:
    card = ModelCard(model_card(model(r=4), name="out", base="org/bert-tiny", checkpoint=CHECKPOINT))
    assert card.data.to_dict() == {
        "library_name": "peft",
        "base_model": "org/bert-tiny",
        "pipeline_tag": "text-classification",
        "tags": ["lora", "lightning-peft"],
    }
    assert card.data.to_dict() == ModelCardData(**card.data.to_dict()).to_dict()
    assert "license" not in card.content


def test_it_says_what_was_trained_with_what_and_to_what_end() -> None:
    adapted = model(r=4, alpha=8)
    trained = 2 * (4 * 32 + 32 * 4) + (32 * 3 + 3)
    total = sum(parameter.numel() for parameter in MODELS["bert"]().parameters()) + trained
    text = model_card(adapted, name="out", base="org/bert-tiny", checkpoint=CHECKPOINT)
    for line in (
        "# out",
        "A LoRA adapter for `org/bert-tiny`.",
        "| method | LoRA |",
        "| r | `4` |",
        "| alpha | `8` |",
        "| target_modules | `query` |",
        "| trained whole | `classifier` |",
        f"| trained parameters | {trained:,} of {total:,} ({trained / total:.2%}) |",
        "`TextClassificationData`",
        "| batch_size | `8` |",
        "| val_accuracy | 1 |",
        "| val_loss | 0.1235 |",
        f"| torch | {torch.__version__} |",
        'base = AutoModelForSequenceClassification.from_pretrained("org/bert-tiny", num_labels=3)',
        'model = PeftModel.from_pretrained(base, "out")',
        'model.merge_and_unload().save_pretrained("merged")',
        'model = import_adapter(base, "out")',
    ):
        assert line in text.splitlines(), line
    assert "| dropout |" not in text
    assert changed_fields(LoRA(r=4, alpha=8)) == {"r": 4, "alpha": 8}
    assert changed_fields(DoRA()) == {}


def test_it_tells_no_secrets_and_no_places_of_the_users() -> None:
    text = model_card(model(), name="out", base="/home/zelda/models/bert-tiny", checkpoint=CHECKPOINT)
    for secret in ("hunter2", "zelda", "pass", "signature", "secret-project", "_instantiator", "limit"):
        assert secret not in text, secret
    for shown in ("| path | `rows.jsonl` |", "| tokenizer | `org/words` |", "data/val.csv", "example.org/rows.csv"):
        assert shown in text
    assert "base_model: bert-tiny  # a local folder; put its id on the hub here" in text.splitlines()
    assert "`bert-tiny` (a local folder; only its name is given here)" in text
    assert ModelCard(text).data.base_model == "bert-tiny"


def test_a_base_of_a_package_or_a_relative_folder_is_named_alone(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models/tiny").mkdir(parents=True)
    for base, name in (
        ("package:words/minilm", "minilm"),
        ("models/tiny", "tiny"),
        ("../a/b", "b"),
        ("~/tiny", "tiny"),
    ):
        assert ModelCard(model_card(model(), name="out", base=base)).data.base_model == name
    assert ModelCard(model_card(model(), name="out", base="org/tiny")).data.base_model == "org/tiny"


def test_what_is_not_known_is_not_made_up() -> None:
    text = model_card(inject(MODELS["linear"](), LoRA(target_modules=["up"])), name="out")
    card = ModelCard(text)
    assert card.data.to_dict() == {"library_name": "peft", "tags": ["lora", "lightning-peft"]}
    assert text.count("Not recorded.") == 2
    assert "A LoRA adapter for a Toy." in text
    assert "from transformers" not in text
    assert "pipeline_tag" not in model_card(model("t5", target_modules=["q"]), name="out")


def test_a_merged_model_has_a_card_of_its_own() -> None:
    text = model_card(model("llama", target_modules="all-linear"), name="out", base="org/llama", merged=True)
    card = ModelCard(text)
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert "`org/llama`, fine-tuned by LoRA, with the update folded into its weights." in text
    assert 'model = AutoModelForCausalLM.from_pretrained("out")' in text
    assert "peft import" not in text


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("bert", "AutoModelForSequenceClassification"),
        ("llama", "AutoModelForCausalLM"),
        ("gpt2", "AutoModelForCausalLM"),
        ("t5", "AutoModelForSeq2SeqLM"),
        ("vit", "AutoModelForImageClassification"),
        ("resnet", "AutoModelForImageClassification"),
    ],
)
def test_the_class_that_it_says_to_load_with_loads_it(name: str, auto: str, tmp_path: Path) -> None:
    import transformers

    base = MODELS[name]()
    assert auto_class(base) == auto
    base.save_pretrained(tmp_path)
    assert type(getattr(transformers, auto).from_pretrained(tmp_path)) is type(base)
    assert auto_class(inject(base, LoRA(target_modules=["convolution"] if name == "resnet" else "all-linear"))) == auto


def test_its_own_cards_are_known_from_others(tmp_path: Path) -> None:
    assert not is_own_card(tmp_path)
    (tmp_path / "README.md").write_text(model_card(model(), name="out"))
    assert is_own_card(tmp_path)
    for text in ("# Mine\n- lightning-peft\n", "---\ntags: [lora]\n---\n- lightning-peft\n", ""):
        (tmp_path / "README.md").write_text(text)
        assert not is_own_card(tmp_path)


def test_without_an_adapter_there_is_no_card() -> None:
    with pytest.raises(PEFTError, match=r"^model_card: no active adapter stands on the model$"):
        model_card(MODELS["bert"](), name="out")


def test_a_checkpoint_holds_the_metrics_that_were_logged_last(tmp_path: Path) -> None:
    module = Toy()
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=2)
    run.fit(module, data(), data())
    run.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    expected = {name: float(value) for name, value in run.callback_metrics.items()}
    assert set(expected) == {"train_loss", "val_loss"}
    assert checkpoint["peft"]["metrics"] == expected
    assert all(type(value) is float for value in checkpoint["peft"]["metrics"].values())
    assert f"| val_loss | {expected['val_loss']:.4g} |" in model_card(module, name="out", checkpoint=checkpoint)
    # the next run's metrics differ, and a resume does not mind
    trainer(tmp_path, max_epochs=2).fit(Toy(), data(), ckpt_path=tmp_path / "last.ckpt")


def test_metrics_are_empty_without_a_trainer(tmp_path: Path) -> None:
    from lightning_peft import load_from_checkpoint

    run = trainer(tmp_path, max_epochs=1)
    run.fit(Toy(), data())
    run.save_checkpoint(tmp_path / "last.ckpt")
    module = load_from_checkpoint(Toy, tmp_path / "last.ckpt")
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["peft"]["metrics"] == {}
