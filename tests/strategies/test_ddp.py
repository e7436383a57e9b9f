"""`peft_ddp` on two ranks: what is sent, what is compared, that training is DDP's, and what a killed rank leaves.

The ranks are processes of gloo on a CPU; of nccl where there are two GPUs.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor, nn

from lightning_peft import PEFT, LoRA, load_from_checkpoint
from lightning_peft.state import read_checkpoint
from tests.callback.toys import data, trainer
from tests.cli import conftest as toy_project
from tests.processes import ROOT, Processes, free_port, ranks
from tests.strategies.conftest import OfRanks
from tests.strategies.kinds import Plain
from tests.strategies.ranks import ACCELERATOR, TIMEOUT

pytestmark = [pytest.mark.xdist_group("devices"), pytest.mark.slow, pytest.mark.timeout(400)]

MEGABYTE = 10**6
SCRIPT = ["-m", "tests.strategies.ranks"]
TORCHRUN = ["-m", "torch.distributed.run", "--run-path", "--start-method", "fork"]
"""Whose workers need not import everything anew."""
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": 1}
"""For restarts: a store that torchrun keeps gives a new process the addresses of one that is gone (pytorch#135712)."""


@pytest.fixture(scope="module")
def found(of_ddp: OfRanks) -> OfRanks:
    """What each rank found, by the name of the function in ranks.py."""
    return of_ddp


@pytest.fixture(scope="module")
def folder(of_ddp: OfRanks) -> Path:
    return of_ddp.folder


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        difference = (tensor.double() - theirs[name].double()).abs().max()
        assert difference <= tolerance, f"{name}: {difference}"


def test_nothing_frozen_is_sent(found: OfRanks) -> None:
    for rank in found("bytes_sent"):
        assert rank["base"] > 8 * MEGABYTE
        for stage in ("fit", "test", "predict"):
            ours, stock = rank[f"peft_ddp {stage}"], rank[f"ddp {stage}"]
            # the count is honest: it sees what DDP sends of the base
            assert stock["broadcast"] > rank["base"]
            assert ours["broadcast"] < rank["adapters"] + 1000
            assert sum(ours.values()) < 3 * rank["adapters"] + 10_000 < MEGABYTE
        assert rank["peft_ddp fit"]["allreduce"] == rank["ddp fit"]["allreduce"]
        same(rank["peft_ddp state"], rank["ddp state"])


def test_bases_that_differ_are_told(found: OfRanks) -> None:
    for rank in found("other_base"):
        assert rank["refused"] == rank["refused in test"]
        assert rank["refused"] == (
            "the frozen base differs between ranks, in 4 of 11 tensors: on rank 1 body.0.weight is not as on rank 0. "
            "It is not broadcast, so every rank has to have the same: load one checkpoint, or call seed_everything "
            "before the model is built; or give the strategy sync_base=True, which broadcasts what differs from rank 0"
        )
        assert rank["other shape"] == (
            "the frozen base is another model on some ranks: unused.weight is (2, 3) torch.float32 on rank 0 and "
            "(2, 4) torch.float32 on rank 1; build the same model on every rank"
        )


def test_bases_that_differ_are_made_equal(found: OfRanks) -> None:
    one, two = found("other_base")
    same(one["synced"], one["wanted"])
    same(two["synced"], one["wanted"])


def test_scales_of_a_quantized_base_are_compared_and_made_equal(found: OfRanks) -> None:
    pytest.importorskip("bitsandbytes")
    one, two = found("quantized_base")
    start = "the frozen base differs between ranks, in 2 of 12 tensors: on rank 1 body.6.weight.quant_state."
    assert one["refused"].startswith(start)
    assert two["refused"] == one["refused"]
    for rank in (one, two):
        for ours, theirs in zip(rank["synced"], one["wanted"], strict=True):
            assert torch.equal(ours, theirs)


def test_configurations_that_differ_are_told_by_both_ranks(found: OfRanks) -> None:
    one, two = found("other_configuration")
    end = "; start every process with the same configuration and code"
    for strategy in ("ddp", "peft_ddp"):
        for rank in (one, two):
            assert rank[f"{strategy} r"] == f"the ranks differ: method.fields.r is 2 on rank 0 and 3 on rank 1{end}"
            assert rank[f"{strategy} saved"] == (
                f"the ranks differ: modules_to_save is ['head'] on rank 0 and ['head', 'body.4'] on rank 1{end}"
            )
            assert rank[f"{strategy} lr"] == (
                "the ranks differ: optimizers.0.groups.0.lr is 0.25 on rank 0 and 0.5 on rank 1\nthe ranks differ: "
                f"optimizers.0.groups.0.initial_lr is 0.25 on rank 0 and 0.5 on rank 1{end}"
            )
            assert rank[f"{strategy} trainer"] == (
                "the ranks differ: trainer.accumulate_grad_batches is 2 on rank 0 and 1 on rank 1\nthe ranks differ: "
                f"trainer.max_epochs is 1 on rank 0 and 2 on rank 1{end}"
            )
        assert (one[f"{strategy} optimizer"], two[f"{strategy} optimizer"]) == ("rank 1: no optimizer", "no optimizer")
        assert two[f"{strategy} fault"].startswith("LoRA.target_modules: 'bodi' matches nothing")
        assert one[f"{strategy} fault"] == f"rank 1: {two[f'{strategy} fault']}"
    for rank in (one, two):
        assert rank["trained"].splitlines()[0] == (
            "the ranks differ: trained body.4.adapters.default.lora_A is (2, 16) torch.float32 on rank 0 and absent on "
            "rank 1"
        )
        assert rank["no callback"] == (
            "on rank 1 the Trainer has no PEFT callback, on others it has; give every rank the same"
        )


@pytest.mark.parametrize("case", ["statistics", "center", "adalora", "accumulated", "manual", "static"])
def test_training_is_stock_ddps_to_the_bit(case: str, found: OfRanks) -> None:
    one, two = found("as_stock")
    same(one[f"peft_ddp {case}"], one[f"ddp {case}"])
    # stock DDP leaves each rank with what its last batch made of a buffer, until it broadcasts the first rank's again
    buffers = {name for name in one[f"ddp {case}"] if name == "center"}
    kept = [{k: v for k, v in two[f"{s} {case}"].items() if k not in buffers} for s in ("peft_ddp", "ddp")]
    same(*kept)
    for name in buffers:
        assert torch.equal(two[f"peft_ddp {case}"][name], one[f"peft_ddp {case}"][name])
        assert one[f"peft_ddp {case}"][name].abs().sum() > 0


def test_gradients_are_sent_once_for_accumulated_batches(found: OfRanks, tmp_path: Path) -> None:
    for rank in found("accumulated"):
        # 8 batches on each rank, in one bucket each, and two of the run's own
        assert (rank["1 calls"], rank["2 calls"]) == (10, 6)
    L.seed_everything(5, verbose=False)
    module = Plain()
    whole = trainer(tmp_path, peft=PEFT(LoRA(r=2), modules_to_save=["head"]), max_epochs=1, enable_checkpointing=False)
    whole.fit(module, data(rows=128, batch_size=32))
    same(found("accumulated")[0]["2"], module.state_dict(), 1e-5)


def test_adapters_that_a_batch_does_not_use(found: OfRanks, tmp_path: Path) -> None:
    one, two = found("unused")
    same(one["found"], two["found"])
    assert one["found"]["body.4.adapters.default.lora_B"].abs().sum() > 0
    for rank in (one, two):
        assert "by setting the string value `strategy='peft_ddp_find_unused_parameters_true'`" in rank["told"]
        assert "`strategy=PEFTDDPStrategy(find_unused_parameters=True)`" in rank["told"]


def test_communication_hook_halves_what_is_sent(found: OfRanks) -> None:
    one, two = found("hook")
    same(one["fp16"], two["fp16"])
    assert one["fp16 bytes"] < 0.51 * one["none bytes"]
    same(one["fp16"], one["none"], 2e-2)
    with pytest.raises(AssertionError):
        same(one["fp16"], one["none"])


def test_all_stages_on_one_trainer(found: OfRanks, folder: Path, tmp_path: Path) -> None:
    one, two = found("stages")
    same(one["trained"], two["trained"])
    assert not one["marks"]
    module = load_from_checkpoint(Plain, one["path"])
    same(module.state_dict(), one["trained"])
    same(load_from_checkpoint(Plain, folder / "after.ckpt").state_dict(), one["trained"])
    alone = trainer(tmp_path, peft=PEFT(LoRA(r=2), modules_to_save=["head"]))
    (tested,) = alone.test(module, data(rows=32), verbose=False)
    assert (one["tested"]["val_loss"] + two["tested"]["val_loss"]) / 2 == pytest.approx(tested["val_loss"], rel=1e-6)
    lines = [yaml.safe_load(line) for line in (folder / "stages" / "predictions.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(7))
    (x, _), *_ = data(rows=7)
    expected = module.eval()(x)
    torch.testing.assert_close(torch.tensor([line["prediction"] for line in lines]), expected, atol=1e-5, rtol=0)
    assert not list((folder / "stages").glob("*rank*"))


def test_resume_on_two_ranks_is_exact(found: OfRanks) -> None:
    one, two = found("resumed")
    assert one["states"] == 2
    for rank in (one, two):
        same(rank["resumed"], rank["whole"])
        assert torch.equal(rank["resumed numbers"], rank["whole numbers"])
        with pytest.raises(AssertionError):
            same(rank["broken"], rank["whole"])
    assert not torch.equal(one["whole numbers"], two["whole numbers"])


def test_a_checkpoint_that_slurm_asks_for_waits_for_no_other_rank(found: OfRanks, folder: Path) -> None:
    one, two = found("told_by_slurm")
    assert (one["calls"], two["calls"]) == ([["scontrol", "requeue", "77"]], [])
    assert one["steps"] == two["steps"] == 4
    same(one["state"], two["state"])
    saved = read_checkpoint(folder / "slurm" / "hpc_ckpt_1.ckpt")
    assert saved["global_step"] == 2
    assert len(saved["peft"]["rng_states"]) == 1


def test_a_killed_rank_ends_the_others_and_a_relaunch_ends_as_an_unbroken_run(found: OfRanks, folder: Path) -> None:
    """The second rank is killed in the second epoch; then, under torchrun, the first while it saves after the third."""
    killed_in_a_batch(folder, SCRIPT)
    assert read_checkpoint(folder / "broken" / "last.ckpt")["epoch"] == 0
    with Processes(folder / "elastic") as processes:
        agent = [*TORCHRUN, "--standalone", "--nproc-per-node", 2, "--max-restarts", 1]
        script = ROOT / "tests" / "strategies" / "ranks.py"
        processes.start([*agent, script, folder, "broken"], DIES="0 2 in a save", **OWN_STORE)
        codes, printed = processes.finish(200)
    assert codes == [0], printed[0][-6000:]
    assert "Signal 9 (SIGKILL)" in printed[0] or "exitcode: -9" in printed[0]
    assert not (folder / "broken" / ".epoch=2-step=12.ckpt.part").exists()
    for whole, broken in zip(found("unbroken"), found("broken"), strict=True):
        assert broken["resumed"]
        assert not whole["resumed"]
        assert (broken["steps"], whole["steps"]) == (16, 16)
        same(broken["state"], whole["state"])
        assert torch.equal(broken["numbers"], whole["numbers"])


def killed_in_a_batch(folder: Path, script: list[str]) -> None:
    """The second of two ranks is killed in the second epoch, and the first ends within its timeout and says why."""
    with ranks(folder / "killed", [*script, folder, "broken"], DIES="1 1 in a batch") as processes:
        died = processes.wait_for(1)
        codes, printed = processes.finish(TIMEOUT)
    assert codes == [1, -signal.SIGKILL]
    assert time.monotonic() - died < TIMEOUT
    told = (
        "A process of another rank has ended or hangs: its own error, or that the system killed it, is told above or "
        "in its log. Start all ranks again, with ckpt_path='last', to go on from the last checkpoint."
    )
    assert printed[0].rstrip().endswith(told)


def test_two_nodes_under_torchrun(tmp_path: Path) -> None:
    """Two agents of torchrun, with an address each, start a process each of one run of the command line."""
    (tmp_path / "cli_toy.py").write_text(toy_project.TOY)
    config = yaml.safe_load(toy_project.BASE + toy_project.PEFT)
    strategy = {"class_path": "PEFTDDPStrategy", "init_args": {"sync_base": True}}
    config["trainer"] |= {"accelerator": ACCELERATOR, "devices": 1, "num_nodes": 2, "strategy": strategy}
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path / "runs")
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    find_toy = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from torch.distributed.run import main; main()"
    torchrun = ["-c", find_toy, *TORCHRUN[2:]]
    with Processes(tmp_path / "logs") as processes:
        for node in range(2):
            agent = ["--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-id", "test"]
            address = ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", f"127.0.0.{node + 1}"]
            run = [ROOT / "lightning_peft" / "__main__.py", "fit", "--config", tmp_path / "lora.yaml"]
            device = {"CUDA_VISIBLE_DEVICES": node} if ACCELERATOR == "cuda" else {}
            processes.start([*torchrun, *agent, *address, *run], **device)
        codes, printed = processes.finish(150)
    assert codes == [0, 0], "\n".join(text[-4000:] for text in printed)
    assert sum("MEMBER: 1/2" in text for text in printed) == sum("MEMBER: 2/2" in text for text in printed) == 1
    (file,) = (tmp_path / "runs").rglob("*.ckpt")
    saved = read_checkpoint(file)
    assert len(saved["peft"]["rng_states"]) == 2
    assert saved["state_dict"]["net.0.adapters.default.lora_B"].abs().sum() > 0


def test_marks_are_taken_off(tmp_path: Path) -> None:
    from lightning_peft.strategies.ddp import MARK, MARKS, _unmark

    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    names = ["0.weight", "1.running_mean"]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
    assert getattr(module, MARKS) == names
    assert hasattr(module[0].weight, MARK)
    assert hasattr(module[1].running_mean, MARK)
    _unmark(module)
    assert not hasattr(module, MARKS)
    assert not any(hasattr(tensor, MARK) for tensor in (*module.parameters(), *module.buffers()))
