"""How a base and data are named, and by what another one is told from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from lightning_peft import LoRA, inject
from lightning_peft.tracking.weights_and_biases import sources as room
from lightning_peft.tracking.weights_and_biases.sources import Source, class_path, plain, sources
from tests.callback.toys import Toy, data


class Encoder(L.LightningModule):
    """A transformers model inside."""

    def __init__(self, model: str | None = None, place: str = "", revision: str | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        self.encoder = BertModel(BertConfig(vocab_size=10, **sizes), add_pooling_layer=False)
        self.encoder.config._name_or_path = place
        self.encoder.config._commit_hash = revision


class Rows(L.LightningDataModule):
    """A DataModule whose arguments are given."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.save_hyperparameters(arguments)


def base(module: L.LightningModule) -> Source:
    return sources(L.Trainer(logger=False), module)[0]


def dataset(**arguments: Any) -> Source:
    trainer = L.Trainer(logger=False)
    trainer.datamodule = Rows(**arguments)  # as `fit` does
    return sources(trainer, Toy())[1]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_base_from_the_hub_has_its_id_its_revision_and_its_page() -> None:
    found = base(Encoder(place="org/name", revision="c0ffee"))
    identity = {"class": "transformers.models.bert.modeling_bert.BertModel", "revision": "c0ffee"}
    assert found == Source("base", "org/name", identity, "https://huggingface.co/org/name")
    # what the module was given is what the user wrote, and a package's folder
    assert base(Encoder("package:some/model", place="/somewhere/some/model")).name == "package:some/model"
    assert base(Encoder("package:some/model")).address == ""


def test_a_folder_is_told_by_its_name_and_a_module_of_ones_own_by_its_class(tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    for place in ("org/name", str(tmp_path / "org" / "name"), "./org/name/"):
        found = base(Encoder(place=place))
        assert (found.name, found.address) == ("name", "")
    assert base(Encoder()).name == "BertModel"
    assert base(Toy()) == Source("base", "Toy", {"class": "tests.callback.toys.Toy"})


def test_adapters_on_it_change_no_name() -> None:
    module = Encoder(place="org/name")
    before = base(module)
    inject(module, LoRA(r=2))
    assert base(module) == before
    assert class_path(module) == f"{__name__}.Encoder"


def test_data_is_told_by_what_it_is_and_not_by_how_it_is_loaded() -> None:
    found = dataset(path="org/rows:small", text_column="text", seed=1, batch_size=8, num_workers=2, test_path=None)
    identity = {"class": f"{__name__}.Rows", "path": "org/rows:small", "text_column": "text", "seed": 1}
    assert found == Source("dataset", "org/rows:small", identity, "https://huggingface.co/datasets/org/rows")
    assert found.identity == dataset(path="org/rows:small", text_column="text", seed=1, batch_size=64).identity
    assert found.identity != dataset(path="org/rows:small", text_column="text", seed=2).identity
    assert dataset(rows=4).name == "Rows"


def test_a_file_is_told_by_its_content_wherever_it_lies(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.csv").write_text("1,2\n")
    here, there = dataset(path="here/a.csv"), dataset(path=str(tmp_path / "there" / "a.csv"))
    assert here == there
    assert (here.name, here.address) == ("a.csv", "")
    (tmp_path / "there" / "a.csv").write_text("1,3\n")
    assert dataset(path="there/a.csv").identity != here.identity
    whole = dataset(path="here").identity["path"]["sha256"]
    assert whole == dataset(path="here").identity["path"]["sha256"]
    (tmp_path / "here" / "a.csv").rename(tmp_path / "here" / "b.csv")
    assert dataset(path="here").identity["path"]["sha256"] != whole


def test_a_large_file_is_read_at_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "SAMPLE", 10)
    content = bytearray(range(100))
    digests = []
    for changed in (None, 3, 97, 50):
        own = bytearray(content)
        if changed is not None:
            own[changed] = 255
        (tmp_path / "a.bin").write_bytes(own)
        digests.append(dataset(path="a.bin").identity["path"]["sha256"])
    assert len(set(digests)) == 3
    assert digests[0] == digests[3]
    (tmp_path / "a.bin").write_bytes(content[:50] + content[51:])
    assert dataset(path="a.bin").identity["path"]["sha256"] not in digests


def test_a_folder_of_too_many_files_is_told_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "FILES", 2)
    (tmp_path / "many").mkdir()
    for number in range(3):
        (tmp_path / "many" / str(number)).write_text("a")
    assert dataset(path="many").identity["path"] == {"name": "many", "sha256": None}


def test_loaders_without_a_datamodule_are_told_by_their_dataset() -> None:
    trainer = L.Trainer(logger=False, max_steps=1, enable_checkpointing=False, enable_progress_bar=False)
    assert [source.kind for source in sources(trainer, Toy())] == ["base"]
    trainer.fit(Toy(), data(24), data(8))
    identity = {"class": "torch.utils.data.dataset.TensorDataset", "rows": 24}
    assert sources(trainer, Toy())[1] == Source("dataset", "TensorDataset", identity)


def test_values_become_those_of_json() -> None:
    given = {1: (1, 2.5, True, None, "a"), "nan": float("nan"), "path": Path("a/b"), "other": torch.float16}
    assert plain(given) == {"1": [1, 2.5, True, None, "a"], "nan": None, "path": "a/b", "other": "dtype"}
    assert plain({"deep": [{"module": nn.ReLU()}]}) == {"deep": [{"module": "ReLU"}]}
