"""Tensor parallelism beside FSDP2, two by two ranks: losses, weights and checkpoints are one device's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from lightning_peft import PEFT, LoRA, load_from_checkpoint
from lightning_peft.state import read_checkpoint
from tests.strategies import sharded, split
from tests.strategies.conftest import OfRanks
from tests.strategies.language import Language, run, text, trained
from tests.strategies.sharded import Started, everything
from tests.strategies.test_ddp import same
from tests.strategies.test_fsdp import as_one_device

pytestmark = [pytest.mark.xdist_group("devices"), pytest.mark.slow, pytest.mark.timeout(400)]
GROUPS = (0, 2)
"""The first rank of each."""


@pytest.mark.parametrize("name", split.METHODS_TRIED)
def test_training_is_one_devices(name: str, of_four: OfRanks, tmp_path: Path) -> None:
    module = Language()
    run(tmp_path, "auto", peft=PEFT(split.made(name))).fit(module, text(rows=16))
    ranks = of_four("methods")
    # the bias of a key changes no attention: its gradient is noise, which Adam scales to a step
    weights = 1e-4 if name in ("BitFit", "DoRA") else 1e-5
    as_one_device(name, [ranks[first] for first in GROUPS], module, 1e-5, weights)
    for first in GROUPS:
        same(ranks[first + 1][name], ranks[first][name])
        assert ranks[first][f"{name} losses"] == ranks[first + 1][f"{name} losses"]
    whole, layers = (sharded.base_bytes(part) for part in (module, module.model.model.layers))
    for rank in ranks:
        # of the blocks a quarter, of the head and the embedding a half
        assert rank[f"{name} bytes"] < 0.5 * (whole - layers) + 0.25 * layers + 0.02 * whole


def test_a_checkpoint_goes_on_from_one_device_and_back(of_four: OfRanks, from_one: Path, tmp_path: Path) -> None:
    ranks = of_four("stages")
    one = ranks[0]
    before = read_checkpoint(from_one)
    after = read_checkpoint(one["path"])
    assert before["peft"]["base"] == after["peft"]["base"]
    assert {key: value.shape for key, value in before["state_dict"].items()} == {
        key: value.shape for key, value in after["state_dict"].items()
    }
    for rank in ranks:
        same(rank["saved"], one["saved"])
        same(rank["resumed"], one["saved"])
    module, started = Language(lr=1e-3), Started()
    going_on = run(tmp_path, "auto", started, peft=PEFT(LoRA(r=4)), max_epochs=2)
    going_on.fit(module, text(), ckpt_path=from_one)
    for rank in ranks:
        same(rank["started"], started.tensors)
    same(one["saved"], everything(module, going_on), 1e-5)
    losses = torch.tensor([rank["losses"] for rank in ranks]).mean(0)
    assert (losses - torch.tensor(module.losses)).abs().max() < 1e-5
    module, started = Language(lr=1e-3), Started()
    run(tmp_path, "auto", started, peft=PEFT(LoRA(r=4)), max_epochs=3).fit(module, text(), ckpt_path=one["path"])
    same(started.tensors, one["saved"])
    losses = torch.tensor([rank["resumed losses"] for rank in ranks]).mean(0)
    assert (losses - torch.tensor(module.losses)).abs().max() < 1e-5


def test_all_stages_on_one_trainer(of_four: OfRanks, tmp_path: Path) -> None:
    one = of_four("stages")[0]
    module = load_from_checkpoint(Language, one["path"])
    same(trained(module), {name: one["saved"][name] for name in trained(module)})
    (tested,) = run(tmp_path, "auto", peft=PEFT(LoRA(r=4))).test(module, text(), verbose=False)
    assert one["tested"]["val_loss"] == pytest.approx(tested["val_loss"], rel=1e-6)
    lines = [yaml.safe_load(line) for line in (of_four.folder / "predictions.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(5))
    (ids,) = text(rows=5).dataset[:]
    expected = module.eval().predict_step([ids], 0)
    torch.testing.assert_close(torch.tensor([line["prediction"] for line in lines]), expected, atol=1e-5, rtol=0)


def test_ranks_of_a_group_drop_as_one(of_four: OfRanks) -> None:
    ranks = of_four("dropout")
    plain = of_four("methods")[0]["LoRA losses"]
    for first in GROUPS:
        assert ranks[first]["losses"] == ranks[first + 1]["losses"] != plain
        assert torch.equal(ranks[first]["numbers"], ranks[first + 1]["numbers"])
    assert not torch.equal(ranks[0]["numbers"], ranks[2]["numbers"])
    for rank in ranks:
        same(rank["state"], ranks[0]["state"])


def test_faults_are_told(of_four: OfRanks) -> None:
    ranks = of_four("faults")
    one = ranks[0]
    for rank in ranks:
        assert {name: rank[name] for name in rank if name != "synced"} == {n: one[n] for n in one if n != "synced"}
    q_proj = "model.model.layers.0.self_attn.q_proj"
    assert one["quantized"] == (
        f"quantization, base_weights: {q_proj}.weight is split by tensor parallelism, and can't be quantized or read "
        "from a file then; leave them out, or tensor_parallel_size"
    )
    assert one["own"].startswith(f"{q_proj}.weight is distributed over DeviceMesh(")
    assert one["own"].endswith("call parallelize_module(…, self.device_mesh['tensor_parallel'], …)")
    assert one["whole"] == (
        "PEFTFSDPStrategy.tensor_parallel_size: 2, but Whole has no split layer; in its configure_model, call "
        "parallelize_module(…, self.device_mesh['tensor_parallel'], …)"
    )
    assert one["saved"].splitlines()[0] == (
        "modules_to_save: model.model.layers.0.self_attn.o_proj is split by tensor parallelism, and can't be trained "
        "whole; leave it out of the plan"
    )
    end = "are split by tensor parallelism; leave them out (exclude_modules), or out of the plan of "
    end += "parallelize_module, or use LoRA"
    needs = "its adapters need whole layers, and model.model.layers.0"
    assert one["prefix"] == f"PrefixTuning: {needs}.self_attn and 1 more {end}"
    assert one["unipelt"] == f"UniPELT: {needs} and 9 more {end}"
    assert "layers.0.self_attn.v_proj.1.mix.adapters.default.lora_A has a gradient of size 0.0" in one["heads"]
    assert one["other base"].startswith("the frozen base differs between ranks, in ")
    assert one["size"] == "PEFTFSDPStrategy.tensor_parallel_size: 4 ranks can't be divided into groups of 3"
    assert one["stock"].startswith(f"PEFT: {q_proj}.weight is sharded, of which this process holds a part; ")
    assert one["stock"].endswith("for parallelize_module, PEFTFSDPStrategy(tensor_parallel_size=…)")
    for rank, methods in zip(ranks, of_four("methods"), strict=True):
        assert rank["synced"] == pytest.approx(methods["LoRA losses"], abs=1e-5)
