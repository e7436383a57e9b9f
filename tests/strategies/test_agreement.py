"""What the ranks compare, and how a difference is told; the registered names. On one process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, StrategyRegistry
from torch import Tensor, nn

import lightning_peft
from lightning_peft import PEFT, DoRA, LoRA, PEFTDDPStrategy, PEFTError, inject
from lightning_peft.callback.compatibility import check_trainer
from lightning_peft.state import checksum, frozen_buffers, frozen_tensors
from lightning_peft.strategies import agreement
from lightning_peft.strategies.buffers import MovingBuffers
from tests.callback.toys import Toy
from tests.cli.conftest import Command, command, folder  # noqa: F401
from tests.processes import ROOT, run_ranks


def as_ranks(monkeypatch: pytest.MonkeyPatch, *others: Any) -> list[str]:
    """Let this process be rank 0, and `others` answer for the rest: with their facts, and by them with a digest."""
    asked: list[str] = []

    def everyones(value: Any) -> list[Any]:
        asked.append(type(value).__name__)
        if isinstance(value, bytes):
            return [value, *(bytes([number]) for number in range(len(others)))]
        return [value, *others]

    monkeypatch.setattr(agreement, "everyones", everyones)
    return asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.int64])
@pytest.mark.parametrize("size", [1, 7, 8, 1000])
def test_checksum_sees_every_value(dtype: torch.dtype, size: int) -> None:
    values = torch.randint(0, 2, (size,)).to(dtype)
    before = checksum(values)
    assert 0 <= before < 2**64
    assert checksum(values.clone()) == before
    for place in {0, size // 2, size - 1}:
        other = values.clone()
        other[place] = (1 - values[place].to(torch.int64)).to(dtype)
        assert checksum(other) != before


@given(st.binary(min_size=1, max_size=64), st.integers(0, 63), st.integers(0, 63))
@example(b"\x00\x00\x91\x00\x00\x00\x01\x00\x00\x00\x89\x00\x00", 2, 10)
def test_checksum_sees_an_exchange(content: bytes, one: int, two: int) -> None:
    one, two = one % len(content), two % len(content)
    exchanged = bytearray(content)
    exchanged[one], exchanged[two] = exchanged[two], exchanged[one]
    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in (content, exchanged)]
    assert (checksum(tensors[0]) == checksum(tensors[1])) == (bytes(exchanged) == content)


def test_checksum_is_of_values_and_not_of_their_place_in_memory() -> None:
    whole = torch.randn(3 * 2**18 + 5, 2)
    column = whole[:, 1]
    assert checksum(column) == checksum(column.contiguous()) == checksum(column.clone().view(-1, 1))
    data = torch.arange(100, dtype=torch.uint8)
    assert len({checksum(data[start : start + 40].clone()) for start in range(9)}) == 9
    for start in range(9):
        assert checksum(data[start : start + 40]) == checksum(data[start : start + 40].clone())
    assert checksum(torch.empty(0)) == checksum(torch.empty(5, device="meta")) == 0


def test_frozen_is_what_no_adapter_holds() -> None:
    module = Toy()
    module.body.append(module.body[0])  # a second name
    module.register_buffer("cache", torch.ones(3), persistent=False)
    inject(module, DoRA(r=2, target_modules=["0", "4"]), modules_to_save=["head", "body.1"])
    inject(module, LoRA(r=2, target_modules=["0"]), adapter_name="other")
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    names += ["4.weight", "4.bias"]
    assert set(frozen_tensors(module)) == {*(f"body.{name}" for name in names), "head.weight", "head.bias", "cache"}
    assert set(frozen_buffers(module)) == {*(f"body.{name}" for name in names[4:7]), "cache"}
    by_name = dict([*module.named_parameters(), *module.named_buffers()])
    assert all(by_name[name] is tensor for name, tensor in frozen_tensors(module).items())


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "int8"])
def test_frozen_has_the_scales_of_packed_weights(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    from lightning_peft.quantization import quantize

    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    sums = []
    for factor in (1, 2):
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
        model[0].weight.data = weight * factor
        frozen = frozen_tensors(quantize(model, kind))
        sums.append({name: checksum(tensor) for name, tensor in frozen.items()})
    assert sums[0].keys() == sums[1].keys()
    differ = [name for name in sums[0] if sums[0][name] != sums[1][name]]
    # the codes are the same
    assert differ
    assert "0.weight" not in differ
    assert {name.removeprefix("0.weight.") for name in differ} <= {
        "nf4": {"quant_state.absmax"},
        "nf4-dq": {"quant_state.absmax", "quant_state.offset", "quant_state.state2.absmax"},
        "int8": {"SCB"},
    }[kind]


def test_values_are_told_by_the_ranks_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def facts(r: int) -> tuple[str, dict[str, str]]:
        return "configuration", {
            "method.name": "'LoRA'",
            "method.fields.r": str(r),
            "trainer.max_epochs": "3",
            "trained a": "(1,) torch.float32",
        }

    as_ranks(monkeypatch, facts(8), facts(4), *([facts(8)] * 8))
    spec = {"method": {"name": "LoRA", "fields": {"r": 4}}, "base": {"values": "not compared"}}
    with pytest.raises(PEFTError) as caught:
        agreement.agree_on_configuration(spec, {"a": torch.ones(1)}, {"max_epochs": 3})
    assert str(caught.value) == (
        "the ranks differ: method.fields.r is 4 on ranks 0, 2 and 8 on ranks 1, 3, 4, 5, 6, 7, 8, 9 and 1 more; start "
        "every process with the same configuration and code"
    )


def test_options_of_optimizers_are_compared_by_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def everyones(value: Any) -> list[Any]:
        asked.append(value)
        return [value, b""] if isinstance(value, bytes) else [value, value]

    monkeypatch.setattr(agreement, "everyones", everyones)
    one, two = (nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [one], "lr": torch.tensor(0.5)}, {"params": [two], "own": print, "weight_decay": 0.25}]
    agreement.agree_on_optimizers([torch.optim.AdamW(groups, lr=0.125), torch.optim.SGD([one], lr=0.25)])
    _, (kind, facts) = asked
    assert kind == "configuration"
    told = ("class", "groups.0.lr", "groups.0.betas", "groups.1.lr", "groups.1.own", "groups.1.weight_decay")
    assert [facts[f"optimizers.0.{name}"] for name in told] == [
        "AdamW",
        "0.5",
        "(0.9, 0.999)",
        "0.125",
        "'builtin_function_or_method'",
        "0.25",
    ]
    assert (facts["optimizers.1.class"], facts["optimizers.1.groups.0.lr"]) == ("SGD", "0.25")
    assert not [name for name in facts if "params" in name]


def test_only_digests_travel_while_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def everyones(value: Any) -> list[Any]:
        asked.append(value)
        return [value] * 3

    monkeypatch.setattr(agreement, "everyones", everyones)
    agreement.agree_on_base(frozen_tensors(Toy()))
    agreement.agree_on_configuration({"method": {}}, {}, {})
    agreement.agree_on_optimizers([torch.optim.SGD(Toy().parameters())])
    assert [len(value) for value in asked] == [32, 32, 32]


def test_a_fault_of_another_rank_is_told_here(monkeypatch: pytest.MonkeyPatch) -> None:
    as_ranks(monkeypatch, ("fault", {"fault": "out of memory"}))
    with pytest.raises(PEFTError, match=r"^rank 1: out of memory$"):
        agreement.agree_on_configuration({}, {}, {})
    with pytest.raises(ZeroDivisionError), agreement.faults_told():
        raise ZeroDivisionError


def test_a_buffer_that_moves_is_found_and_then_sent_before_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_peft.strategies import buffers

    sent: list[Tensor] = []
    asked: list[Any] = []

    def everyones(value: Any) -> list[Any]:
        asked.append(value)
        return [value, []]  # it moves on this rank alone

    monkeypatch.setattr(buffers, "broadcast", sent.append)
    monkeypatch.setattr(buffers, "everyones", everyones)
    module = nn.BatchNorm1d(2)
    moving = MovingBuffers(module)
    for batch in range(10):
        if batch == 3:
            module.running_mean.add_(1)
        moving.before_batch()
        assert len(sent) == max(0, batch - 3)
    assert asked == [[], [], ["running_mean"], ["running_mean"]]  # before the batches 1, 2, 4 and 8
    assert all(tensor is module.running_mean for tensor in sent)
    asked.clear()
    empty = MovingBuffers(nn.Linear(2, 2))
    for _ in range(5):
        empty.before_batch()
    assert not asked


def test_names_are_there_once_the_callback_is_imported(tmp_path: Path) -> None:
    lazy = """
import sys, lightning_peft
assert not {"torch", "lightning"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", lazy], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = """
from lightning_peft import PEFT, LoRA
import lightning as L
trainer = L.Trainer(accelerator="cpu", devices=2, strategy="peft_ddp", callbacks=[PEFT(LoRA(r=4))], logger=False)
print(type(trainer.strategy).__name__)
"""
    assert run_ranks(tmp_path, ["-c", code], count=1).endswith("PEFTDDPStrategy\n")


def test_registered_names_give_the_strategy_with_its_arguments() -> None:
    plain, finding = (StrategyRegistry.get(f"peft_ddp{end}") for end in ("", "_find_unused_parameters_true"))
    assert type(plain) is type(finding) is PEFTDDPStrategy is lightning_peft.PEFTDDPStrategy
    assert (plain._ddp_kwargs, finding._ddp_kwargs) == ({}, {"find_unused_parameters": True})
    assert not plain.sync_base
    assert StrategyRegistry["peft_ddp"]["description"]


@pytest.mark.parametrize("name", ["PEFTDDPStrategy", "lightning_peft.PEFTDDPStrategy"])
def test_class_form_in_a_configuration(name: str, command: Command) -> None:  # noqa: F811
    strategy = f"{{class_path: {name}, init_args: {{sync_base: true, static_graph: true}}}}"
    Path("two.yaml").write_text(Path("lora.yaml").read_text().replace("trainer:", f"trainer:\n  strategy: {strategy}"))
    code, out, err = command("inspect", "--config", "two.yaml", "--trainer.devices=2")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "trainable params: 82 || all params: 244 || trainable%: 33.61"
    code, _, err = command("inspect", "--config", "lora.yaml", "--trainer.devices=2", "--trainer.strategy=peft_ddp")
    assert (code, err) == (0, "")


def told(strategy: Any, **options: Any) -> list[str]:
    peft = PEFT(LoRA(r=2), **options)
    trainer = SimpleNamespace(callbacks=[peft], strategy=strategy, precision="32-true", precision_plugin=None)
    try:
        check_trainer(trainer, peft)  # type: ignore[arg-type]
    except PEFTError as error:
        return list(error.faults)
    return []


def test_stock_strategies_that_can_not_work_name_one_that_does() -> None:
    assert told(FSDPStrategy()) == [
        "FSDPStrategy (FSDP1) flattens frozen and trained parameters into one, and gathers the base for a checkpoint; "
        "use strategy='peft_fsdp'"
    ]
    # its package is not needed to be told so
    assert told(DeepSpeedStrategy.__new__(DeepSpeedStrategy)) == [
        "DeepSpeed writes its own checkpoints, with the frozen base in them, and loads weights before they can be "
        "checked; use strategy='peft_fsdp', or 'peft_ddp'"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Connection closed by peer [127.0.0.1]:1",
        "Timed out waiting 5000ms for recv",
        "NCCL error: remote process exited",
    ],
)
def test_a_lost_rank_is_explained(text: str) -> None:
    error: RuntimeError = RuntimeError(text)
    PEFTDDPStrategy().on_exception(error)
    assert str(error).startswith(f"{text}\nA process of another rank has ended or hangs: ")
    other = RuntimeError("a bug of the module")
    PEFTDDPStrategy().on_exception(other)
    assert str(other) == "a bug of the module"


def test_a_trainer_of_one_process_compares_with_nobody(tmp_path: Path) -> None:
    called: Callable[..., Any] = agreement.everyones
    assert called({"a": 1}) == [{"a": 1}]
    assert L.Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path).world_size == 1
