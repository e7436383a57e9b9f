"""`peft_fsdp` on two ranks, and on four: losses and weights are one device's, and each rank holds its share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_peft import PEFT, LoRA, PEFTError, PEFTFSDPStrategy, inject, load_from_checkpoint
from lightning_peft.state import read_checkpoint
from lightning_peft.strategies.units import find_units
from tests.strategies import sharded
from tests.strategies.conftest import OfRanks
from tests.strategies.language import Language, made, run, text, trained
from tests.strategies.sharded import everything, plain
from tests.strategies.test_ddp import killed_in_a_batch, same

pytestmark = [pytest.mark.xdist_group("devices"), pytest.mark.timeout(600)]

SCRIPT = ["-m", "tests.strategies.sharded"]
TWO = (
    "methods", "quantized", "chain", "stages", "evaluated", "options", "toys", "faults", "chunks", "shares",
    "unbroken", "streamed",
)  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="session")
def single(folder: Path) -> dict[str, Tensor]:
    """One epoch on one device, with whose checkpoint the others go on; and a file with a base."""
    torch.manual_seed(0)
    base = Language(**sharded.LARGE).model.state_dict()
    save_file({key: tensor.clone() for key, tensor in base.items()}, folder / "base.safetensors")
    module = Language(lr=1e-3)
    fitting = run(folder, "auto", peft=plain())
    fitting.fit(module, text())
    fitting.save_checkpoint(folder / "chain" / "single.ckpt")
    return everything(module, fitting)


@pytest.fixture(scope="session")
def found(folder: Path, single: dict[str, Tensor]) -> OfRanks:
    """What each rank found, by the name of the function in sharded.py."""
    return OfRanks(folder, SCRIPT, TWO)


def as_one_device(name: str, found: list[dict[str, Any]], module: Language, loss: float, weights: float) -> None:
    """That all ranks have the same, and have it as `module`, which was trained on all their batches."""
    for other in found[1:]:
        same(other[name], found[0][name])
    same(found[0][name], trained(module), weights)
    of_ranks = torch.tensor([of_rank[f"{name} losses"] for of_rank in found])
    assert len(module.losses) == of_ranks.shape[1]
    assert (of_ranks.mean(0) - torch.tensor(module.losses)).abs().max() < loss
    assert not torch.equal(of_ranks[0], of_ranks[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", sharded.METHODS_TRIED)
def test_training_is_one_devices(name: str, found: OfRanks, tmp_path: Path) -> None:
    module = Language()
    run(tmp_path, "auto", peft=PEFT(made(name))).fit(module, text())
    # the bias of a key changes no attention: its gradient is noise, which Adam scales to a step
    as_one_device(name, found("methods"), module, 1e-5, 1e-4 if name == "BitFit" else 1e-5)


@pytest.mark.slow
def test_adapters_are_sent_once_a_step_and_the_base_is_held_in_shares(found: OfRanks) -> None:
    for rank in found("methods"):
        adapters = sum(tensor.numel() * 4 for tensor in rank["LoRA"].values())
        sent, calls = rank["LoRA bytes"], rank["LoRA calls"]
        # once as training starts; then four steps, with a flag for each tensor; Lightning's own is few bytes
        assert adapters <= sent["broadcast"] < adapters + 1000
        assert 4 * adapters <= sent["allreduce"] < 4 * (adapters + 4 * len(rank["LoRA"])) + 1000
        assert calls["allreduce"] <= 4 + 2
        assert "reduce_scatter" not in "".join(sent)
        expected = {"model.model.embed_tokens.weight", "model.lm_head.weight"}
        for layer in range(2):
            attention = [f"self_attn.{part}_proj" for part in "qkvo"]
            for part in [*attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]:
                expected.add(f"model.model.layers.{layer}.{part}.weight")
        assert set(rank["LoRA sharded"]) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", sharded.QUANTIZED)
def test_quantized_base_is_sharded(name: str, found: OfRanks, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    module = Language(lr=1e-3, **sharded.WIDE)
    peft = PEFT(LoRA(r=4), quantization=sharded.quantization(name))
    run(tmp_path, "auto", peft=peft, max_epochs=13, max_steps=50).fit(module, text())
    assert len(module.losses) == 50
    assert module.losses[-1] < module.losses[0] - 0.2
    as_one_device(name, found("quantized"), module, 1e-4, 1e-4)
    for rank in found("quantized"):
        assert rank[f"{name} bytes"] <= 0.55 * sharded.base_bytes(module)


@pytest.mark.slow
def test_a_checkpoint_goes_on_under_any_strategy(
    found: OfRanks, single: dict[str, Tensor], folder: Path, tmp_path: Path
) -> None:
    """One device, two ranks of peft_fsdp, two of peft_ddp, one device: an epoch each."""
    ranks = found("chain")
    expected = single
    for strategy in ("peft_fsdp", "peft_ddp"):
        for rank in ranks:
            same(rank[f"{strategy} started"], expected)
            assert rank[f"{strategy} saving"] < 100_000
        expected = ranks[0][f"{strategy} saved"]
        content = read_checkpoint(folder / "chain" / f"{strategy}.ckpt")
        assert not [key for key in content["state_dict"] if "adapters" not in key and "lightning_peft" not in key]
    module, started = Language(lr=1e-3), sharded.Started()
    last = run(tmp_path, "auto", started, peft=plain(), max_epochs=4)
    last.fit(module, text(), ckpt_path=folder / "chain" / "peft_ddp.ckpt")
    same(started.tensors, expected)
    whole = Language(lr=1e-3)
    unbroken = run(tmp_path, "auto", peft=plain(), max_epochs=4)
    unbroken.fit(whole, text())
    same(everything(module, last), everything(whole, unbroken), 1e-4)


@pytest.mark.slow
def test_all_stages_on_one_trainer(found: OfRanks, folder: Path, tmp_path: Path) -> None:
    one, two = found("stages")
    same(one["trained"], two["trained"])
    module = load_from_checkpoint(Language, one["path"])
    same(trained(module), one["trained"])
    for name in ("after", "weights"):
        same(trained(load_from_checkpoint(Language, folder / "stages" / f"{name}.ckpt")), one["trained"])
    (tested,) = run(tmp_path, "auto", peft=plain()).test(module, text(), verbose=False)
    for rank in (one, two):
        assert rank["tested"]["val_loss"] == pytest.approx(tested["val_loss"], rel=1e-6)
        assert rank["validated"]["val_loss"] == pytest.approx(tested["val_loss"], rel=1e-6)
    lines = [yaml.safe_load(line) for line in (folder / "stages" / "predictions.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(5))
    (ids,) = text(rows=5).dataset[:]
    expected = module.eval().predict_step([ids], 0)
    torch.testing.assert_close(torch.tensor([line["prediction"] for line in lines]), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(one["disabled"], Language().eval().predict_step([ids[:2]], 0), atol=1e-5, rtol=0)
    assert one["merge"] == (
        "merge: model.model.embed_tokens.weight is sharded, of which this process holds a part; load the checkpoint in "
        "one process (load_from_checkpoint), and do it there"
    )
    assert one["remove"] == one["merge"].replace("merge", "remove", 1)
    assert one["save"].startswith("save_merged: model.embed_tokens.weight is sharded")
    assert (folder / "exported0" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_fit_after_a_prediction_is_a_fit_alone(found: OfRanks) -> None:
    module = Language().eval()
    for number, rank in enumerate(found("evaluated")):
        assert rank["losses"] == found("faults")[number]["wanted"]
        for rows, predicted in zip(sharded.PREDICTED, rank["of loaders"], strict=True):
            (ids,) = text(rows=rows).dataset[number::2]
            torch.testing.assert_close(predicted, module.predict_step([ids], 0), atol=1e-5, rtol=0)
        assert torch.equal(rank["short"], rank["of loaders"][0])


@pytest.mark.slow
@pytest.mark.parametrize("name", sharded.OPTIONS)
def test_options(name: str, found: OfRanks, tmp_path: Path) -> None:
    ranks = found("options")
    module, _, _ = sharded.fit_with(name, tmp_path, "auto")
    is_bf16 = name.startswith("bf16")
    as_one_device(name, ranks, module, 5e-3 if is_bf16 else 1e-5, 5e-3 if is_bf16 else 1e-5)
    for rank in ranks:
        if is_bf16:
            assert 0.45 < rank[f"{name} gathered"] / rank["accumulated gathered"] < 0.7
        assert ("model.lm_head.weight" in rank[f"{name} sharded"]) == (name != "named")


@pytest.mark.slow
def test_transformers_gives_and_generates_what_it_does(found: OfRanks) -> None:
    for rank in found("options"):
        assert rank["hidden states"] == 3
    assert [rank["generated"] for rank in found("options")] == [2, 5]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["center", "manual", "clipped", "raw", "adalora", "unused"])
def test_training_of_other_modules_is_peft_ddps(case: str, found: OfRanks) -> None:
    for rank in found("toys"):
        ours, theirs = rank[f"peft_fsdp {case}"], rank[f"peft_ddp {case}"]
        assert rank[f"peft_fsdp {case} keys"] == rank[f"peft_ddp {case} keys"]
        assert len(ours) < len(theirs)
        same(ours, {name: theirs[name] for name in ours}, 1e-6)


@pytest.mark.slow
def test_faults_are_told(found: OfRanks) -> None:
    one, two = found("faults")
    for name in ("own", "lr", "other base", "replicas", "names", "no callback", "meta"):
        assert one[name] == two[name]
    assert one["own"] == (
        "PEFT: model.model.layers.0.self_attn.q_proj.weight is sharded, of which this process holds a part; adapters "
        "have to be attached before: leave fully_shard out of the module's code, and give the Trainer "
        "strategy='peft_fsdp'; for parallelize_module, PEFTFSDPStrategy(tensor_parallel_size=…)"
    )
    assert one["lr"] == (
        "the ranks differ: optimizers.0.groups.0.lr is 0.25 on rank 0 and 0.5 on rank 1; start every process with the "
        "same configuration and code"
    )
    assert one["other base"].startswith("the frozen base differs between ranks, in ")
    assert one["replicas"] == "PEFTFSDPStrategy.replicas: 2 ranks can't be divided into 3 groups"
    assert one["names"].startswith("shard: 'layer' matches nothing; did you mean 'layers' or ")
    assert one["no callback"] == "peft_fsdp: no adapters stand on the module; give the Trainer the PEFT callback"
    assert one["meta"] == (
        "peft_fsdp: model.model.embed_tokens.weight is on the meta device; give PEFT(base_weights=…), the file or "
        "folder of its weights"
    )
    assert one["other strategy"] == (
        "strategy: model.model.embed_tokens.weight is sharded, of which this process holds a part; an earlier run "
        "sharded it: go on with 'peft_fsdp', or build the module anew"
    )
    assert one["synced"] == one["wanted"]
    for rank in (one, two):
        assert "A weight was read of a module that was not called, so that it was not gathered" in rank["reading"]
        assert rank["precise"].endswith(
            "\nWeights are gathered in bfloat16, as autocast would cast them, also where the module turns it off: "
            "bring the input to the weight's dtype there; or name the modules to shard in "
            "PEFTFSDPStrategy(shard=[…]), without that one; or use precision='32-true'."
        )
        assert rank["precision"] == (
            "precision: '32-true' can't be, since an earlier run sharded the module so that its weights are gathered "
            "in bfloat16; go on with that run's precision, or build the module anew"
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", sharded.STREAMED)
def test_no_rank_ever_has_the_whole_base(name: str, found: OfRanks, folder: Path, tmp_path: Path) -> None:
    """A base that is read from a file into shards is the one that is read on one device."""
    ranks = found("streamed")
    module = sharded.Empty()
    given = {"quantization": "nf4-dq"} if name == "nf4-dq" else {}
    peft = PEFT(sharded.of_queries(name), base_weights=str(folder / "base.safetensors"), **given)
    fitting = run(tmp_path, "auto", peft=peft, max_steps=2)
    fitting.fit(module, text())
    fitting.save_checkpoint(tmp_path / "single.ckpt")
    as_one_device(name, ranks, module, 1e-5, 1e-4)
    saved = [read_checkpoint(file)["peft"] for file in (tmp_path / "single.ckpt", folder / f"streamed-{name}.ckpt")]
    assert saved[0]["base"] == saved[1]["base"]
    base = sharded.base_bytes(module)
    block = 4 * sum(p.numel() for n, p in Language(**sharded.LARGE).named_parameters() if "layers.0." in n)
    for rank in ranks:
        assert rank[f"{name} bytes"] <= 0.55 * base
        assert rank[f"{name} peak"] <= rank[f"{name} bytes"] + 2.5 * block
        assert name == "nf4-dq" or rank[f"{name} peak"] < 0.75 * base


@pytest.mark.slow
@pytest.mark.parametrize("name", sharded.CHUNKS)
def test_a_sharded_head_computes_losses_in_chunks(name: str, found: OfRanks, tmp_path: Path) -> None:
    options, module = sharded.CHUNKS[name], Language(lr=1e-3)
    peft = PEFT(LoRA(r=4), modules_to_save=options["saved"])
    run(tmp_path, "auto", peft=peft, precision=options["precision"]).fit(module, text())
    ranks = found("chunks")
    for rank in ranks:
        assert rank[f"{name} sharded"]
        assert rank[f"{name} refused"] is None
    within = 1e-5 if options["precision"] == "32-true" else 5e-3
    as_one_device(name, ranks, module, within, within)


@pytest.mark.slow
def test_a_checkpoint_of_shares_goes_on_under_any_strategy(found: OfRanks, folder: Path, tmp_path: Path) -> None:
    last = folder / "shares" / "last.ckpt"
    assert sorted(file.name for file in last.iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"]
    sizes = [(last / f"__{rank}_0.distcp").stat().st_size for rank in range(2)]
    assert 0.3 < sizes[0] / sum(sizes) < 0.7
    assert not list((folder / "shares").glob(".*"))
    assert (folder / "home" / "shares.ckpt" / ".metadata").exists()
    one, two = found("shares")
    same(one["saved"], two["saved"])
    same(one["started"], one["saved"])
    module, started = Language(lr=1e-3), sharded.Started()
    fitting = run(tmp_path, "auto", started, peft=plain(), max_epochs=3)
    fitting.fit(module, text(), ckpt_path=last)
    same(started.tensors, one["saved"])
    loaded = load_from_checkpoint(Language, last)
    same(trained(loaded), {name: one["saved"][name] for name in trained(loaded)})
    (tested,) = run(tmp_path, "auto", peft=plain()).test(loaded, text(), verbose=False)
    assert one["tested"]["val_loss"] == pytest.approx(tested["val_loss"], rel=1e-6)


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_a_relaunch_ends_as_an_unbroken_run(found: OfRanks, folder: Path) -> None:
    killed_in_a_batch(folder, SCRIPT)
    assert read_checkpoint(folder / "broken" / "last.ckpt")["epoch"] == 0
    again = OfRanks(folder, SCRIPT, ["broken"], DIES="0 9 never")
    for whole, broken in zip(found("unbroken"), again("broken"), strict=True):
        assert (broken["resumed"], whole["resumed"]) == (True, False)
        assert broken["steps"] == whole["steps"] == 16
        same(broken["state"], whole["state"])
        assert torch.equal(broken["numbers"], whole["numbers"])


@pytest.mark.slow
def test_copies_of_a_sharded_base(of_four: OfRanks, tmp_path: Path) -> None:
    module = Language()
    run(tmp_path, "auto", peft=plain()).fit(module, text())
    ranks = of_four("hybrid")
    as_one_device("state", [{**rank, "state losses": rank["losses"]} for rank in ranks], module, 1e-5, 1e-5)
    for rank in ranks:
        assert rank["bytes"] <= 0.55 * sharded.base_bytes(module)


def test_sizes_that_can_not_be() -> None:
    with pytest.raises(PEFTError) as told:
        PEFTFSDPStrategy(replicas=0, tensor_parallel_size=0)
    assert told.value.faults == (
        "PEFTFSDPStrategy.replicas: 0 is no number of copies; it must be 1 or more",
        "PEFTFSDPStrategy.tensor_parallel_size: 0 is no number of ranks; it must be 1 or more",
    )
    with pytest.raises(PEFTError, match=r"replicas: 2 copies can't be had of layers that are split too \(tensor_par"):
        PEFTFSDPStrategy(replicas=2, tensor_parallel_size=2)


def paths(model: nn.Module, names: tuple[str, ...] = ()) -> dict[str, int]:
    return {unit.path: len(unit.weights) for unit in find_units(model, names)}


def test_pieces_are_found_by_structure() -> None:
    model = inject(Language(), LoRA(r=2), modules_to_save=["lm_head"])
    blocks = {"model.model.layers.1": 7, "model.model.layers.0": 7}
    head, embedding = {"model.lm_head": 1}, {"model.model.embed_tokens": 1}
    assert paths(model) == {**head, **blocks, **embedding, "model.model": 0}
    assert list(paths(model))[-1] == "model.model"
    assert paths(model, ("layers",)) == {**blocks, "model.model": 0}
    # half of a block is a piece of its own, and comes before the other half
    assert paths(model, ("layers", "mlp"))["model.model.layers.0"] == 4
    with pytest.raises(PEFTError, match=r"shard: 'layers' is a string; give a list, \['layers'\]"):
        find_units(model, "layers")


def test_tied_weights_stay_whole() -> None:
    model = Language()
    model.model.lm_head.weight = model.model.model.embed_tokens.weight
    inject(model, LoRA(r=2))
    assert "model.lm_head" not in paths(model)
    assert "model.model.embed_tokens" not in paths(model)


def test_pieces_of_a_model_without_blocks() -> None:
    class Plain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.small = nn.Linear(2, 2)
            self.attention = nn.MultiheadAttention(32, 4)
            self.body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

    # attention reads the weight of a layer in it, and is one piece with it
    model = inject(Plain(), LoRA(r=2, target_modules=["body.0"]))
    assert paths(model) == {"body.2": 1, "body.0": 1, "attention": 2}
