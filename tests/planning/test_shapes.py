"""Plans of large models: by a few of their blocks, on several devices, and what is cheapest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_peft import LoRA
from lightning_peft.callback.base import Base
from lightning_peft.methods import METHODS
from lightning_peft.methods.errors import PEFTError
from lightning_peft.planning import blocks
from lightning_peft.planning.building import Setting
from lightning_peft.planning.choosing import base_of, bytes_of, candidates, cheapest, room, storage_name
from lightning_peft.planning.estimates import Estimate, Planner
from lightning_peft.planning.sharing import Layout, layouts
from lightning_peft.tasks import CausalLM

GB = 1e9


def llama(layers: int, hidden: int, inner: int, heads: int, keys: int, vocabulary: int) -> CausalLM:
    """A decoder on the meta device, in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
    )
    with torch.device("meta"):
        return CausalLM(LlamaForCausalLM(config).to(torch.bfloat16))


def small() -> Planner:
    return Planner(llama(6, 32, 48, 4, 2, 100), rows=2, length=16)


@pytest.fixture(scope="module")
def of_few() -> Planner:
    return small()


@pytest.mark.parametrize(("method", "checkpointing"), [("LoRA", True), ("PrefixTuning", False), ("full", False)])
def test_two_and_three_blocks_tell_of_all(
    method: str, checkpointing: bool, of_few: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(METHODS[method]() if method != "full" else None, gradient_checkpointing=checkpointing)
    by_few = of_few.estimate(setting)
    monkeypatch.setattr(blocks, "LEAST", 100)
    assert by_few == small().estimate(setting)
    assert by_few.peak > 0


def test_unlike_blocks_are_all_run() -> None:
    model = llama(6, 32, 48, 4, 2, 100)
    assert [len(run.names) for run in blocks.equal_runs(model)] == [6]
    model.model.model.layers[2].mlp.gate_proj.weight.requires_grad_(False)
    assert blocks.equal_runs(model) == []


def test_what_cannot_be_is_told_and_not_fatal(of_few: Planner) -> None:
    method = METHODS["DiffPruning"](target_modules=["q_proj"])
    packed = of_few.estimate(Setting(method, base_of("nf4-dq", Base())))
    assert packed.fault.startswith("DiffPruning.target_modules: model.model.layers.0.self_attn.q_proj and 5 more are")
    assert packed.peak == 0
    assert of_few.estimate(Setting(None, base_of("nf4-dq", Base()))).fault == (
        "full fine-tuning changes the weights, which packed ones can't be"
    )


def test_one_device_of_eight_billion_and_several_of_seventy() -> None:
    """Beside the table "Which strategy" of the README, whose numbers come from a sum of a few products."""
    lora = LoRA(r=16, target_modules="all-linear")
    eight = Planner(llama(32, 4096, 14336, 32, 8, 128256), precision="bf16-mixed", rows=1, length=2048)
    bf16 = eight.estimate(Setting(lora, base_of("bf16", Base()), gradient_checkpointing=True))
    assert bf16.trainable == 41_943_040
    assert bf16.total == 8_030_261_248 + 41_943_040
    # with the frequencies of rotary embeddings, which no bytes are worth to tell of
    assert bf16.weights == pytest.approx(2 * 8_030_261_248 + 4 * 41_943_040, abs=10_000)
    assert bf16.peak / GB == pytest.approx(18, rel=0.03)

    seventy = Planner(llama(80, 8192, 28672, 64, 8, 128256), precision="bf16-mixed", rows=1, length=2048)
    setting = Setting(lora, base_of("nf4-dq", Base()), gradient_checkpointing=True)
    found = {layout: seventy.estimate(setting, layout).peak / GB for layout in (Layout(), Layout("peft_ddp", 8))}
    found |= {layout: seventy.estimate(setting, layout).peak / GB for layout in layouts(4)}
    assert found[Layout()] == pytest.approx(47, rel=0.1)
    assert found[Layout("peft_ddp", 8)] == pytest.approx(48, rel=0.1)
    assert found[Layout("peft_fsdp", 4)] == pytest.approx(20, rel=0.1)
    assert found[Layout("peft_fsdp", 4, cpu_offload=True)] == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize(
    ("size", "found"),
    [("24GB", 24 * 10**9), ("22.5 GiB", int(22.5 * 2**30)), ("80", 80 * 10**9), ("3000mb", 3 * 10**9)],
)
def test_sizes(size: str, found: int) -> None:
    assert bytes_of(size) == found


@pytest.mark.parametrize("size", ["", "24 bananas", "0GB", "-3GB"])
def test_no_sizes(size: str) -> None:
    with pytest.raises(PEFTError, match="is no size; give the GPU's memory, such as 24GB or 80GB"):
        bytes_of(size)


def test_a_card_is_full_before_its_end() -> None:
    assert room(24 * 10**9) == int(0.95 * 22.5e9)
    assert room(10**9) == 0


def test_what_costs_less_is_tried_first() -> None:
    own = Setting(LoRA())
    tried = [
        (setting.base.quantization is not None, setting.base.dtype, setting.gradient_checkpointing, layout.name)
        for setting, layout in candidates(own, layouts(2))
        if not setting.offload_activations
    ]
    one = [
        *[(False, None, False), (False, "bfloat16", False), (False, None, True), (False, "bfloat16", True)],
        *[(True, "bfloat16", False), (True, "bfloat16", True)],
    ]
    assert tried == [(*each, name) for name in ("peft_ddp", "peft_fsdp", "peft_fsdp with cpu_offload") for each in one]
    moved = [setting.offload_activations for setting, _ in candidates(own, layouts(1))]
    assert moved == [False] * 6 + [True] * 6


def test_the_cheapest_says_what_it_changes() -> None:
    class Known:
        """In place of a planner: a peak for each setting."""

        def estimate(self, setting: Setting, layout: Layout) -> Any:
            gigabytes = 30 if setting.base.quantization is None else 16
            gigabytes -= 10 if setting.gradient_checkpointing else 0
            return Estimate(setting, layout, weights=gigabytes * 10**9 // layout.devices)

    own = Setting(LoRA(), replace(Base(), dtype="bfloat16"))
    known: Any = Known()
    of_24 = cheapest(known, own, 1, 24 * 10**9)
    assert of_24 is not None
    assert of_24.changes == {"peft.gradient_checkpointing": True}
    of_16 = cheapest(known, own, 1, 12 * 10**9)
    assert of_16 is not None
    assert of_16.changes == {"peft.quantization": "nf4-dq", "peft.gradient_checkpointing": True}
    assert cheapest(known, own, 1, 6 * 10**9) is None
    of_two = cheapest(known, own, 2, 24 * 10**9)
    assert of_two is not None
    assert of_two.changes == {"trainer.devices": 2, "trainer.strategy": "peft_ddp"}


@pytest.mark.parametrize(
    ("given", "devices", "layout", "changes"),
    [
        (Layout("peft_ddp", 2), 2, Layout("peft_ddp", 2), {}),
        (Layout("peft_fsdp", 2), 2, Layout("peft_fsdp", 2), {}),
        (Layout("peft_fsdp", 2, True), 2, Layout("peft_fsdp", 2, True), {}),
        (Layout(devices=2), 2, Layout("peft_ddp", 2), {"trainer.strategy": "peft_ddp"}),
        (Layout("peft_fsdp", 2), 4, Layout("peft_fsdp", 4), {"trainer.devices": 4}),
        (Layout("peft_fsdp", 2), 1, Layout(), {"trainer.devices": 1}),
        (Layout("peft_fsdp", 1), 1, Layout(), {}),
    ],
)
def test_the_configured_strategy_is_first(given: Layout, devices: int, layout: Layout, changes: dict[str, Any]) -> None:
    class Roomy:
        """In place of a planner: everything fits."""

        def estimate(self, setting: Setting, layout: Layout) -> Any:
            return Estimate(setting, layout, weights=1)

    roomy: Any = Roomy()
    choice = cheapest(roomy, Setting(LoRA()), devices, 24 * 10**9, given)
    assert choice is not None
    assert (choice.estimate.layout, choice.changes) == (layout, changes)


def test_names_of_bases() -> None:
    for name in ("none", "bf16", "fp32", "nf4", "nf4-dq", "int8"):
        assert storage_name(base_of(name, Base())) == name
    with pytest.raises(PEFTError, match=r"quantizations: 'nf5' is none of none, bf16, .*; did you mean"):
        base_of("nf5", Base())
