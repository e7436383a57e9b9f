"""Plans by a few of a model's equal blocks beside plans by all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import LoRA
from lightning_peft.planning import blocks, step
from lightning_peft.planning.blocks import Run, equal_runs
from lightning_peft.planning.building import Setting
from lightning_peft.planning.estimates import Estimate, Planner
from tests.planning.own import Block, Convolutions, Indexed, Own

Kept = list[list[int]]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    """How many blocks of each run were left in each step that was simulated."""
    counts: Kept = []
    cut = step.cut

    def noted(model: nn.Module, runs: Sequence[Run], kept: Sequence[int]) -> Any:
        counts.append([*kept])
        return cut(model, runs, kept)

    monkeypatch.setattr(step, "cut", noted)
    return counts


@pytest.fixture
def by_all(monkeypatch: pytest.MonkeyPatch) -> Callable[[Own, Setting], Estimate]:
    """The plan by all blocks."""

    def estimate(module: Own, setting: Setting) -> Estimate:
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "LEAST", 10**9)
            return Planner(module, on_gpu=False).estimate(setting)

    return estimate


LOWER, UPPER = r"blocks\.[0-7]\.(up|down)", r"blocks\.([89]|1[0-5])\.(up|down)"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", [LOWER, UPPER])
def test_adapters_on_half_of_the_blocks(targets: str, checkpointing: bool, kept: Kept, by_all: Any) -> None:
    setting = Setting(
        LoRA(r=4, target_modules=targets), modules_to_save=("head",), gradient_checkpointing=checkpointing
    )
    by_few = Planner(Own(16), on_gpu=False).estimate(setting)
    assert kept == [[2, 2], [3, 2], [2, 3]]
    assert by_few == by_all(Own(16), setting)
    # 16 blocks of two layers with biases, eight with adapters, and the head twice, of which one is trained
    block, adapter, head = 2 * 4 * 16 * 16 + 5 * 16, 2 * 4 * (16 + 64), 2 * 16 + 2
    assert by_few.weights == 4 * (16 * block + 8 * adapter + 2 * head)


def test_the_names_of_what_is_left() -> None:
    model = Own(12)
    for index in (5, 6, 7, 8, 9, 10, 11):
        model.blocks[index].requires_grad_(False)
    lower, upper = Run("blocks", tuple("01234")), Run("blocks", ("5", "6", "7", "8", "9", "10", "11"))
    before = [*model.blocks]
    with blocks.cut(model, [upper, lower], [3, 2]) as left:
        assert left == {"blocks.5": ["blocks.2", "blocks.3", "blocks.4"], "blocks.0": ["blocks.0", "blocks.1"]}
        assert [*model.blocks] == [before[index] for index in (0, 1, 5, 6, 7)]
    assert [*model.blocks] == before


def test_runs_are_cut_where_that_is_less_work() -> None:
    model = Own(18)
    for index in (5, 11, 17):
        model.blocks[index].requires_grad_(False)
    # four times 3 × 2 + 3 blocks, and three more, would be more than 18
    assert equal_runs(model) == []
    halves = Own(16)
    for block in halves.blocks[8:]:
        block.requires_grad_(False)
    # three times 2 × 2, and two more
    assert [run.label for run in equal_runs(halves)] == ["blocks.0", "blocks.8"]


def test_no_block_gets_the_place_of_one_of_another_kind() -> None:
    class Windowed(Block):
        def __init__(self, window: int) -> None:
            super().__init__()
            self.window = window

    def runs(windows: Sequence[int]) -> list[int]:
        model = Own(0)
        model.blocks = nn.ModuleList([Windowed(window) for window in windows])
        return [len(run.names) for run in equal_runs(model)]

    assert runs([1] * 12) == [12]
    assert runs([0] + [1] * 12) == [12]
    assert runs([1] * 12 + [0]) == []


def test_layers_of_two_kinds_in_turn_are_all_run() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.device("meta"):
        model = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=50, num_hidden_layers=18, head_dim=8, **sizes))
    assert equal_runs(model) == []


def test_blocks_that_change_the_shape(kept: Kept, by_all: Any) -> None:
    strides, setting = (1, 1, *(2,) * 12), Setting(LoRA(r=2, target_modules=["conv"]))
    assert [(run.label, len(run.names)) for run in equal_runs(Convolutions(strides))] == [("blocks.2", 12)]
    planned = Planner(Convolutions(strides), on_gpu=False).estimate(setting)
    assert kept == [[2], []]
    assert planned == by_all(Convolutions(strides), setting)


def test_blocks_that_are_asked_for_by_number(kept: Kept, by_all: Any) -> None:
    setting = Setting(LoRA(r=2, target_modules=["up"]))
    planned = Planner(Indexed(6), on_gpu=False).estimate(setting)
    assert kept == [[2], []]
    assert planned.peak > 0
    assert planned == by_all(Indexed(6), setting) == Planner(Own(6), on_gpu=False).estimate(setting)
