"""export, merge, import and push: from a checkpoint that the command line wrote to what others load, and back."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import Tensor

from lightning_peft import PEFT, LoRA, load_from_checkpoint
from lightning_peft.cli import main
from lightning_peft.tasks import SequenceClassification
from tests.cli.conftest import Command
from tests.interchange.hub_stand_in import TOKEN, hub

WORDS = ["good", "bad", "fine", "poor", "film", "book", "plot", "a", "the", "was"]
CONFIG = """\
seed_everything: 1
model: {class_path: SequenceClassification, init_args: {model: bert, learning_rate: 0.05}}
data: {class_path: TextClassificationData, init_args: {path: rows.jsonl, batch_size: 8}}
trainer:
  max_epochs: 1
  limit_train_batches: 2
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  logger: {class_path: CSVLogger, init_args: {save_dir: runs}}
"""
PEFT_SECTION = """\
peft:
  method: {class_path: LoRA, init_args: {r: 4, target_modules: [query, value]}}
  modules_to_save: [classifier]
"""
INPUTS = {"input_ids": torch.tensor([[2, 7, 11], [4, 6, 3]]), "attention_mask": torch.ones(2, 3, dtype=torch.long)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny BERT and its tokenizer (bert), rows.jsonl, lora.yaml, and best.ckpt of two steps."""
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("trained")
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 512}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(vocabulary), initializer_range=0.2, **sizes)).save_pretrained(folder / "bert")
    labels = ["bad"] * 21 + ["good"] * 14 + ["fine"] * 7
    rows = [{"text": f"the {WORDS[4 + n % 3]} was {label}", "label": label} for n, label in enumerate(labels)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "lora.yaml").write_text(CONFIG + PEFT_SECTION)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(sys, "path", list(sys.path))
        assert main(["fit", "--config", "lora.yaml"]) == 0
        [checkpoint] = folder.glob("runs/**/*.ckpt")
        shutil.move(checkpoint, folder / "best.ckpt")
        yield folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `lightning-peft` in a copy of the trained folder, which becomes the current one."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def command(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@torch.no_grad()
def logits(model: Any) -> Tensor:
    output = model.eval()(**INPUTS)
    return output if isinstance(output, Tensor) else output.logits


def expected() -> Tensor:
    return logits(load_from_checkpoint(SequenceClassification, "best.ckpt"))


def test_an_exported_adapter_loads_in_peft_with_the_same_logits(run: Command) -> None:
    import peft
    from transformers import AutoModelForSequenceClassification

    code, out, _ = run("export", "best.ckpt", "out")
    assert code == 0
    assert [line.split()[-3] for line in out.splitlines()[:3]] == [
        "out/README.md",
        "out/adapter_config.json",
        "out/adapter_model.safetensors",
    ]
    assert 'model = PeftModel.from_pretrained(base, "out")' in out
    assert "Note      adapter_config.json names the base by its place here, bert; --base ORG/NAME says another" in out
    base = AutoModelForSequenceClassification.from_pretrained("bert", num_labels=3)
    adapted = peft.PeftModel.from_pretrained(base, "out")
    torch.testing.assert_close(logits(adapted), expected(), rtol=1e-5, atol=1e-5)
    card = huggingface_hub.ModelCard.load("out/README.md")
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-classification"
    assert re.search(r"\| val_accuracy \| 0\.\d+ \|", card.text)
    assert "`TextClassificationData`" in card.text
    assert "| path | `rows.jsonl` |" in card.text


@pytest.mark.slow
def test_a_merged_model_loads_without_this_package(run: Command, tmp_path: Path) -> None:
    code, out, _ = run("merge", "best.ckpt", "merged")
    assert code == 0
    assert 'AutoModelForSequenceClassification.from_pretrained("merged")' in out
    torch.save((INPUTS, expected()), "expected.pt")
    process = """
import sys, torch, transformers
sys.modules["lightning_peft"] = None
inputs, expected = torch.load("expected.pt")
model = transformers.AutoModelForSequenceClassification.from_pretrained("merged")
torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
assert transformers.AutoTokenizer.from_pretrained("merged")("good")["input_ids"] == [2]
"""
    subprocess.run([sys.executable, "-c", process], check=True)
    assert huggingface_hub.ModelCard.load("merged/README.md").data.library_name == "transformers"
    assert run("merge", "best.ckpt", "half", "--dtype=bfloat16")[0] == 0
    assert json.loads(Path("half/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", ["nf4-dq", "int8"])
def test_over_a_quantized_base_both_forms_compute_the_same(run: Command, kind: str) -> None:
    import peft
    from transformers import AutoModelForSequenceClassification

    assert run("fit", "--config", "lora.yaml", f"--peft.quantization={kind}")[0] == 0
    checkpoint = str(next(Path("runs").glob("*/version_1/**/*.ckpt")))
    adapted = load_from_checkpoint(SequenceClassification, checkpoint)
    assert "SCB" in str(adapted.state_dict().keys()) or "absmax" in str(adapted.state_dict().keys())
    assert run("merge", checkpoint, "merged")[0] == 0
    merged = AutoModelForSequenceClassification.from_pretrained("merged")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-5, atol=1e-5)
    # the adapter's own tensors are the same, whatever they stand on
    assert run("export", checkpoint, "out")[0] == 0
    dense = load_from_checkpoint(SequenceClassification, checkpoint, quantization=None, allow_other_base=True)
    base = AutoModelForSequenceClassification.from_pretrained("bert", num_labels=3)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(base, "out")), logits(dense), rtol=1e-5, atol=1e-5)
    card = Path("merged/README.md").read_text()
    assert f"| base quantized to | {kind} |" in card


def metrics(out: str) -> dict[str, str]:
    return dict(re.findall(r"(val_\w+)\s+│\s+([\d.]+)", out))


def test_an_imported_adapter_validates_with_the_same_metrics_and_can_be_trained_on(run: Command) -> None:
    _, out, _ = run("validate", "--config", "lora.yaml", "--ckpt_path", "best.ckpt")
    before = metrics(out)
    assert set(before) == {"val_loss", "val_accuracy", "val_macro_f1", "val_majority"}
    assert run("export", "best.ckpt", "out")[0] == 0
    code, out, _ = run("import", "out", "new/imported.ckpt")
    assert code == 0
    lead, _, section = out.partition("\n\n")
    assert lead.endswith("Use it    --ckpt_path new/imported.ckpt, with this section in the configuration:")
    assert yaml.safe_load(section) == yaml.safe_load(PEFT_SECTION)
    Path("imported.yaml").write_text(CONFIG + section)

    code, out, _ = run("validate", "--config", "imported.yaml", "--ckpt_path", "new/imported.ckpt")
    assert code == 0
    assert metrics(out) == before
    torch.testing.assert_close(
        logits(load_from_checkpoint(pl.LightningModule, "new/imported.ckpt")), expected(), rtol=1e-6, atol=1e-6
    )
    assert run("fit", "--config", "imported.yaml", "--ckpt_path", "new/imported.ckpt")[0] == 0
    [further] = Path().glob("runs/**/*.ckpt")
    assert torch.load(further, weights_only=True)["global_step"] == 2
    content = torch.load("new/imported.ckpt", weights_only=True)
    assert content["global_step"] == 0
    assert "rng_states" not in content["peft"]


def test_import_takes_the_base_from_elsewhere(run: Command) -> None:
    run("export", "best.ckpt", "out", "--base", "org/bert")
    assert json.loads(Path("out/adapter_config.json").read_text())["base_model_name_or_path"] == "org/bert"
    config = json.loads(Path("out/adapter_config.json").read_text())
    for words in (["--base", "bert"], ["--config", "lora.yaml", "--model.num_labels=3"]):
        code, _, _ = run("import", "out", "imported.ckpt", "--overwrite", *words)
        assert code == 0
        assert torch.equal(logits(load_from_checkpoint(pl.LightningModule, "imported.ckpt")), expected())
    Path("out/adapter_config.json").write_text(json.dumps({**config, "task_type": None}))
    code, _, err = run("import", "out", "imported.ckpt", "--overwrite")
    assert code == 2
    assert err.startswith("lightning-peft: out: its task_type is null, for which there is no model here (there are SEQ")
    assert err.endswith("); give --config FILE, whose section `model` builds the base\n")


def test_export_takes_the_base_from_a_configuration(run: Command) -> None:
    for words in (
        ["--config", "lora.yaml"],
        ["--config=lora.yaml", "--model.weight_decay=0"],
        ["--model=SequenceClassification"],
    ):
        code, _, _ = run("export", "best.ckpt", "out", *words, "--overwrite")
        assert code == 0
    assert sorted(os.listdir("out")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    code, _, err = run("export", "best.ckpt", "other", "--config", "lora.yaml", "--model.modl=x")
    assert code == 2
    assert "SequenceClassification has no 'modl'; did you mean 'model'" in err
    assert not Path("other").exists()


OWN = """
import torch
import lightning as L
from torch import nn
from transformers import BertConfig, BertForSequenceClassification


class Own(L.LightningModule):
    def __init__(self, width: int, seed: int = 0):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(seed)
        sizes = dict(num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=12, hidden_size=width)
        self.bert = BertForSequenceClassification(BertConfig(**sizes))

    def forward(self, **inputs):
        return self.bert(**inputs).logits


class Plain(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 4)
"""


def checkpoint_of(module: pl.LightningModule, method: LoRA, path: str) -> None:
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(callbacks=[PEFT(method)], **options)
    trainer.strategy.connect(module)
    for callback in trainer.callbacks:
        if isinstance(callback, PEFT):
            callback.setup(trainer, module, "fit")
    module.configure_model()
    trainer.save_checkpoint(path, weights_only=False)


def test_a_class_of_the_users_is_imported_when_he_names_it_and_not_when_the_checkpoint_does(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"own_{tmp_path.name.rstrip('0123456789')}"[:20]
    Path(f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = __import__(name)
    checkpoint_of(own.Own(width=8), LoRA(r=2, target_modules=["query"]), "own.ckpt")
    code, _, err = run("export", "own.ckpt", "out")
    assert code == 2
    assert err == "lightning-peft: own.ckpt: does not say which class it is of; give --model CLASS, or --config FILE\n"
    assert run("export", "own.ckpt", "out", "--model", f"{name}.Own")[0] == 0
    assert run("merge", "own.ckpt", "merged", "--model", f"{name}.Own")[0] == 0
    content = torch.load("own.ckpt", weights_only=True)
    content["hyper_parameters"] |= {"_class_path": "antigravity.Flight", "_instantiator": "lightning.pytorch.cli.x"}
    torch.save(content, "named.ckpt")
    code, _, err = run("export", "named.ckpt", "other")
    assert code == 2
    assert err.endswith("is of antigravity.Flight, which no file is made to import; say --model antigravity.Flight\n")
    assert "antigravity" not in sys.modules
    del content["hyper_parameters"]
    torch.save(content, "bare.ckpt")
    code, _, err = run("export", "bare.ckpt", "other", "--model", f"{name}.Own")
    assert code == 2
    assert f"--model {name}.Own: needs width, which the checkpoint does not hold; give --config FILE, or" in err
    assert run("export", "bare.ckpt", "other", f"--model={name}.Own", "--model.width=8")[0] == 0

    checkpoint_of(own.Plain(), LoRA(r=2, target_modules=["net"]), "plain.ckpt")
    code, _, err = run("merge", "plain.ckpt", "plain", "--model", f"{name}.Plain")
    assert code == 2
    assert err.startswith("lightning-peft: save_merged: Plain holds no transformers model; call merge(model), ")


def test_nothing_is_overwritten_unasked(run: Command) -> None:
    assert run("export", "best.ckpt", "out")[0] == 0
    assert run("export", "best.ckpt", "out")[0] == 0
    assert run("merge", "best.ckpt", "merged")[0] == 0
    assert run("merge", "best.ckpt", "merged")[0] == 0
    notes = Path("notes")
    notes.mkdir()
    (notes / "a.txt").write_text("mine")
    for verb, folder in (
        ("export", "notes"),
        ("merge", "notes"),
        ("merge", "bert"),
        ("merge", "out"),
        ("export", "merged"),
    ):
        code, out, err = run(verb, "best.ckpt", folder)
        assert (code, out) == (2, "")
        assert err == (
            f"lightning-peft: {folder} is not empty, and no earlier output; give another folder, or --overwrite\n"
        )
    assert run("export", "best.ckpt", "notes", "--overwrite")[0] == 0
    assert (notes / "a.txt").read_text() == "mine"
    code, _, err = run("merge", "best.ckpt", "bert", "--overwrite")
    assert code == 2
    assert err.splitlines()[-1] == "lightning-peft: save_merged: bert is the base's own folder; give another one"
    code, _, err = run("export", "best.ckpt", "merged", "--overwrite")
    assert code == 2
    assert "merged holds a model, on which transformers would load the adapter" in err
    code, _, err = run("import", "out", "best.ckpt")
    assert (code, err) == (2, "lightning-peft: best.ckpt exists; give another name, or --overwrite\n")
    code, _, err = run("import", "out", "bert")
    assert err == "lightning-peft: bert is a folder; give the name of a file, such as bert/adapter.ckpt\n"


FAULTS: list[tuple[list[str], list[str]]] = [
    (["export"], ["export: CKPT and DIR missing; lightning-peft export CKPT DIR"]),
    (["push", "out"], ["push: ORG/NAME missing; lightning-peft push DIR ORG/NAME"]),
    (["export", "a", "b", "c"], ["export: 'c' is too much; lightning-peft export CKPT DIR"]),
    (
        ["merge", "a", "b", "--dtyp", "x", "--confg=c.yaml"],
        [
            "merge: there is no option '--dtyp'; did you mean '--dtype'?",
            "merge: there is no option '--confg'; did you mean '--config'?",
        ],
    ),
    (["merge", "a", "b", "--dtype", "bf16"], ["merge: --dtype: 'bf16' is none; did you mean 'bfloat16'"]),
    (["merge", "a", "b", "--dtype"], ["merge: --dtype lacks its value"]),
    (["export", "a", "b", "--overwrite=no"], ["export: --overwrite takes no value"]),
    (["export", "no.ckpt", "b"], ["no.ckpt: there is no such checkpoint file; in . there is best.ckpt"]),
    (["import", "a", "b", "--base", "x", "--model", "y"], ["import: --base is for the base that SOURCE names"]),
]


@pytest.mark.parametrize(("words", "faults"), FAULTS, ids=[" ".join(words) for words, _ in FAULTS])
def test_a_mistake_in_the_words_gives_2_and_says_what_was_meant(
    run: Command, words: list[str], faults: list[str]
) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    lines = [line.removeprefix("lightning-peft: ").strip() for line in err.splitlines()]
    told = lines if len(faults) == 1 else lines[1:]
    assert len(told) == len(faults)
    assert all(line.startswith(fault) for line, fault in zip(told, faults, strict=True)), err


@pytest.mark.parametrize("verb", ["export", "import", "merge", "push"])
def test_each_verb_has_help_and_a_line_in_the_overall_help(run: Command, verb: str) -> None:
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert out.splitlines()[2].startswith(f"usage: lightning-peft {verb} ")
    assert re.search(rf"^  {verb} ", run("--help")[1], re.MULTILINE)


@pytest.mark.slow
def test_an_exported_folder_is_pushed(run: Command, tmp_path: Path) -> None:
    assert run("export", "best.ckpt", "out")[0] == 0
    Path("out/last.ckpt").write_text("not this")
    with hub() as server:
        settings = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        environment = {**os.environ, **settings, "HF_ENDPOINT": server.endpoint, "HF_TOKEN": TOKEN}

        words = [sys.executable, "-m", "lightning_peft", "push", "out", "me/out", "--private"]
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"Uploaded  3 files to {server.endpoint}/me/out\n"
        assert server.repositories["me/out"].private
        files = server.repositories["me/out"].branches["main"][1]
        assert {name: Path("out", name).read_bytes() for name in files} == files
        assert len(files) == 3
