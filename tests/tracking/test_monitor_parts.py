"""What AdapterMonitor is made of: numbers of layers over time, rows and tokens, and what methods report."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_peft import AdaLoRA, DiffPruning, Hybrid, LoRA, Method, UniPELT, inject, trainable_parameters
from lightning_peft.injection import method_adapters
from lightning_peft.tracking.monitor.layers import COLUMNS, SHOWN, History, shown
from lightning_peft.tracking.monitor.throughput import Throughput, rows, tokens
from tests.callback.toys import Toy

TARGETS = ["body.0", "body.4"]


def test_many_layers_are_shown_as_few() -> None:
    small = {f"m.layers.{layer}.q": float(layer) for layer in range(SHOWN)}
    assert shown(small) == small
    large = {f"m.layers.{layer}.{name}": float(layer) for layer in range(12) for name in ("q", "k", "v")}
    assert shown(large) == {f"m.layers.{layer}": float(layer) for layer in range(12)}
    larger = {f"m.{part}.{layer}.q": 1.0 for part in ("a", "b") for layer in range(40)}
    assert shown(larger) == {"m.a": 1.0, "m.b": 1.0}
    assert shown({f"layer{number}": 1.0 for number in range(SHOWN + 1)}) == {}
    assert shown({}) == {}


def test_a_history_of_any_length_fits_a_heat_map() -> None:
    history = History()
    for step in range(10 * COLUMNS):
        history.add(step, {"norm": {"a": float(step), "b": 1.0} if step else {"a": 0.0}})
    drawn = history.heat_maps()["norm"]
    assert drawn.rows == ["a", "b"]
    assert COLUMNS / 2 <= len(drawn.columns) <= COLUMNS
    gaps = {after - before for before, after in zip(drawn.columns, drawn.columns[1:], strict=False)}
    assert gaps == {16}
    assert drawn.values[0] == [float(step) for step in drawn.columns]
    assert drawn.values[1][:2] == [None, 1.0]
    assert history.last == 10 * COLUMNS - 1


def test_rows_and_tokens_of_a_batch() -> None:
    ids, mask = torch.ones(3, 5, dtype=torch.long), torch.tensor([[1, 1, 0, 0, 0]] * 3)
    text = {"labels": torch.ones(2), "input_ids": ids, "attention_mask": mask}
    assert (rows(text), int(tokens(text))) == (3, 6)
    assert (rows({"input_ids": ids}), tokens({"input_ids": ids})) == (3, 15)
    assert (rows([text, torch.ones(3)]), int(tokens([text, torch.ones(3)]))) == (3, 6)
    # packed rows have no mask of two dimensions
    assert (
        tokens({"input_ids": ids, "attention_mask": None})
        == tokens({"input_ids": ids, "attention_mask": mask[0]})
        == 15
    )
    assert (rows((torch.ones(4, 2), torch.ones(4))), tokens((torch.ones(4, 2), torch.ones(4)))) == (4, 0)
    assert (rows({"id": 3, "x": [torch.tensor(1.0), torch.ones(6)]}), rows("text"), rows(torch.tensor(1.0))) == (
        6,
        None,
        None,
    )


def test_throughput_leaves_out_what_is_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    speed = Throughput()
    assert speed.read() == {}
    for seconds, paused in ((1.0, False), (5.0, True), (1.0, False)):
        speed.pause() if paused else speed.resume()
        now += seconds
        if not paused:
            speed.add({"input_ids": torch.ones(4, 10)})
    assert speed.read() == {"samples_per_second": 4.0, "tokens_per_second": 40.0}
    now += 2
    speed.add([torch.ones(6, 2)])
    assert speed.read() == {"samples_per_second": 3.0}


def test_what_methods_say_of_a_layer_agrees_with_what_they_say_of_all() -> None:
    def attached(method: Method) -> dict[str, Any]:
        torch.manual_seed(0)
        model = inject(Toy(), method)
        for parameter in trainable_parameters(model).values():
            parameter.data.uniform_(-1, 1)
        return method_adapters(model, "default")

    assert LoRA(r=2).report_layers(attached(LoRA(r=2, target_modules=TARGETS))) == {}
    pruning = DiffPruning()
    own = attached(pruning)
    shares = pruning.report_layers(own)["kept_share"]
    entries = {path: sum(p.numel() for p in part.parameters(recurse=False)) for path, part in Toy().named_modules()}
    sizes = {path: number for path, number in entries.items() if number}
    assert shares.keys() == sizes.keys()
    mean = sum(shares[path] * size for path, size in sizes.items()) / sum(sizes.values())
    assert pruning.report(own) == {"kept_share": pytest.approx(mean)}
    parts = [
        AdaLoRA(init_r=4, target_r=2, target_modules=["body.0"]),
        AdaLoRA(init_r=6, target_r=2, target_modules=["body.4"]),
    ]
    both = Hybrid(methods=[*parts, LoRA(target_modules=["head"])])
    assert both.report_layers(attached(both)) == {"rank_0": {"body.0": 4.0}, "rank_1": {"body.4": 6.0}}
    assert UniPELT().report_layers({}) == {}
