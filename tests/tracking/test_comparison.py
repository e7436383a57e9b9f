"""What is computed and written of a comparison, against numbers made by hand and by brute force."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lightning_peft.tracking.comparison import Run, guessed_mode, summary_of, terminal_table, verdict_lines
from lightning_peft.tracking.comparison.labels import label_box, overlap, place_labels
from lightning_peft.tracking.comparison.plots import layer_grid, styles
from lightning_peft.tracking.comparison.report import write_json
from lightning_peft.tracking.comparison.statistics import Score, band, pareto, rows, verdict
from lightning_peft.tracking.comparison.tables import (
    content,
    csv_text,
    format_rate,
    format_seconds,
    markdown,
    run_records,
)

from .made_up import comparison, layer_norms, report

POINTS = st.dictionaries(
    st.sampled_from("abcdefghijkl"), st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12
)


def test_rows_have_means_and_ranges_over_the_seeds_that_ended_well() -> None:
    found = rows(comparison())
    assert [row.label for row in found] == ["full", "LoRA", "IA3", "Houlsby", "BitFit", "probe"]
    by_label = {row.label: row for row in found}
    quality = by_label["LoRA"].quality
    assert quality is not None
    assert (quality.mean, quality.low, quality.high, quality.count) == pytest.approx((0.7, 0.688, 0.712, 3))
    assert quality.spread == pytest.approx(0.024)
    bitfit = by_label["BitFit"]
    assert bitfit.quality is not None
    assert (bitfit.asked, bitfit.quality.count, bitfit.quality.mean) == (3, 2, pytest.approx(0.634))
    steps = by_label["LoRA"].step_seconds
    assert steps is not None
    assert (steps.low, steps.high) == pytest.approx((0.18, 0.188))
    assert by_label["LoRA"].layers == pytest.approx(layer_norms())
    assert (by_label["LoRA"].layers_are, by_label["IA3"].layers_are) == ("norm", "rank")


def test_the_best_of_a_run_is_by_the_metrics_direction_and_not_its_last_value() -> None:
    made = report(0.7)
    made["validation"][2]["metrics"].update(val_accuracy=0.9, val_loss=0.25)
    made["validation"][3]["metrics"].update(val_accuracy=None, val_loss=9.0)
    runs = [Run("LoRA", 0, made)]
    for metric, mode, best in (("val_accuracy", "max", 0.9), ("val_loss", "min", 0.25), ("val_loss", "max", 9.0)):
        [row] = rows(comparison(runs=runs, labels=["LoRA"], metric=metric, mode=mode))
        assert row.quality is not None
        assert row.quality.mean == best
        assert row.last is not None
        assert row.last.mean == pytest.approx(0.7 if metric == "val_accuracy" else 1.3)


def test_the_verdict_names_the_best_the_smallest_near_it_and_the_fastest() -> None:
    picked = verdict(rows(comparison()), "max")
    # within 0.024 of full fine-tuning are LoRA and IA3, of which IA3 has fewer parameters
    assert [row and row.label for row in (picked.best, picked.smallest, picked.fastest)] == ["full", "IA3", "IA3"]
    assert verdict_lines(comparison()) == [
        "Best val_accuracy: full fine-tuning with 0.710 (mean of 3 seeds, spread 0.024).",
        "Smallest as good: IA3 with 16,904 parameters (within the spread of the best).",
        "Fastest: IA3 with 164 ms for a step (val_accuracy 0.690).",
    ]
    alone = comparison((1,))
    assert verdict_lines(alone)[1] == (
        "Smallest as good: full fine-tuning with 22,713,224 parameters (one seed gives no spread to compare within)."
    )
    nothing = comparison(runs=[Run("LoRA", 0, None)], labels=["LoRA"])
    assert verdict_lines(nothing) == ["No run has ended well yet."]


@given(POINTS, st.sampled_from(["max", "min"]))
def test_the_front_is_what_no_other_point_beats(points: dict[str, tuple[float, float]], mode: str) -> None:
    front = pareto(points, mode)
    assert front
    for label, (cost, quality) in points.items():
        beaten = any(
            (other_cost <= cost and (other >= quality if mode == "max" else other <= quality))
            and (other_cost, other) != (cost, quality)
            for other_cost, other in points.values()
        )
        assert (label in front) is not beaten
    costs = [points[label][0] for label in front]
    assert costs == sorted(costs)


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.text("abcdefgh", min_size=2, max_size=14), st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=17
    ),
    st.floats(1, 3),
)
def test_no_label_lies_on_another_one_at_any_width(points: dict[str, tuple[float, float]], scale: float) -> None:
    placed = place_labels(points, list(points), 210, 276)
    assert set(placed) <= set(points)
    for width in (210.0, 630.0):
        boxes = [label_box(label, anchor, points[label], width, 276) for label, anchor in placed.items()]
        assert not any(overlap(one, other) for index, one in enumerate(boxes) for other in boxes[:index])
    if len(points) == 1 and 0.2 < next(iter(points.values()))[0] < 0.8:
        assert placed


def test_a_band_has_the_range_at_each_step() -> None:
    assert band([[(10, 1.0), (20, 2.0)], [(10, 3.0)], []]) == [
        (10, Score(2.0, 1.0, 3.0, 2)),
        (20, Score(2.0, 2.0, 2.0, 1)),
    ]


def test_layers_and_kinds_are_taken_from_paths() -> None:
    down, across, values = layer_grid(
        {
            "model.encoder.layer.0.attention.output.dense": 1.0,
            "model.encoder.layer.0.output.dense": 2.0,
            "model.encoder.layer.10.output.dense": 3.0,
            "model.pooler": 4.0,
        }
    )
    assert down == ["0", "10", "–"]
    assert across == ["attention.output.dense", "output.dense", "pooler"]
    assert values == [[1.0, 2.0, None], [None, 3.0, None], [None, None, 4.0]]
    down, across, values = layer_grid({"encoder.layers.0.fc": 1.0, "decoder.layers.0.fc": 2.0, "decoder.layers.1": 3.0})
    assert (down, across) == (["encoder.layers 0", "decoder.layers 0", "decoder.layers 1"], ["fc", "layer"])
    assert layer_grid({"h.10.q": 1.0, "wte": 2.0, "h.2.k": 3.0})[:2] == (["2", "10", "–"], ["q", "wte", "k"])


def test_every_run_is_a_line_of_the_csv_and_the_json_has_the_same(tmp_path: Path) -> None:
    made = comparison()
    lines = list(csv.DictReader(io.StringIO(csv_text(made))))
    assert len(lines) == 18
    last = next(line for line in lines if (line["method"], line["seed"]) == ("BitFit", "2"))
    assert (last["state"], last["best"], last["trainable"]) == ("failed", "", "")
    first = lines[0]
    assert (first["method"], first["state"], first["trainable"]) == ("LoRA", "finished", "341000")
    assert float(first["best"]) == pytest.approx(0.688)
    write_json(tmp_path / "results.json", content(made))
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["picks"] == {"best": "full", "smallest": "IA3", "fastest": "IA3"}
    assert kept["failures"] == [{"method": "BitFit", "seed": 2, "why": "RuntimeError: a bug"}]
    assert kept["methods"][1]["quality"]["mean"] == pytest.approx(0.7)
    assert len(kept["runs"]) == 18


def test_the_tables_of_terminal_and_markdown_show_what_is_known() -> None:
    made = comparison()

    def cells(width: int) -> list[str]:
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(terminal_table(made, width))
        printed = console.export_text()
        assert "val_accuracy: higher is better" in printed
        assert "…" not in printed
        assert max(map(len, printed.splitlines())) <= width
        [line] = [line for line in printed.splitlines() if "IA3" in line]
        return [cell.strip() for cell in line.strip("│\n").split("│")]

    every = ["IA3", "0.690", "0.024", "0.690", "16,904", "0.0744 %", "1e-3", "164 ms", "15 s", "600.7 MB", "202.8 kB"]
    assert cells(200) == [*every, "× 1.08", "× 1.00", "3/3"]
    assert cells(100) == ["IA3", "0.690", "0.024", "16,904", "164 ms", "600.7 MB", "3/3"]
    assert cells(80) == ["IA3", "0.690", "0.024", "16,904", "164 ms", "3/3"]
    text = markdown(made)
    numbers = "0.700 | 0.024 | 0.700 | 341,000 | 1.48 % | 1e-3 | 184 ms | 15 s | 613.6 MB | 4.1 MB | × 1.08 | × 1.00"
    assert f"| LoRA | {numbers} | 3/3 |\n" in text
    assert "BitFit, seed 2, failed: RuntimeError: a bug" in text
    # what no run has is no column
    assert "peak memory" not in markdown(
        dataclasses.replace(made, runs=[Run("LoRA", 0, report(peak_memory=None))], labels=["LoRA"])
    )


def test_a_run_without_the_metric_has_failed_and_says_what_there_is() -> None:
    made = comparison(runs=[Run("LoRA", 0, report())], labels=["LoRA"], metric="val_f1")
    assert [made.fault(run) for run in made.failed()] == ["val_f1 was not logged; there are val_accuracy, val_loss"]


def test_a_run_that_became_nan_is_told_by_what_it_has() -> None:
    dead, well = report(0.7, norms={"a.0": 1.0, "a.1": 2.0}), report(0.7, norms={"a.0": 3.0, "a.1": 4.0})
    dead["validation"][-1]["metrics"]["val_accuracy"] = None
    dead["norms"] = {"a.0": None, "a.1": 2.0}
    both = comparison(runs=[Run("LoRA", 0, dead), Run("LoRA", 1, well)], labels=["LoRA"])
    [row] = rows(both)
    assert row.last == Score(0.7, 0.7, 0.7, 1)
    assert [record["last"] for record in run_records(both)] == [None, 0.7]
    assert row.layers == {"a.0": 3.0, "a.1": 3.0}
    [alone] = rows(comparison(runs=[Run("LoRA", 0, dead)], labels=["LoRA"]))
    assert (alone.last, alone.layers) == (None, {"a.1": 2.0})
    assert "| LoRA | 0." in markdown(both)


def test_small_things() -> None:
    lower = ("val_loss", "val/loss", "val_loss/dataloader_idx_0", "val_logloss", "val_wer", "valid-rmse", "Perplexity")
    assert {guessed_mode(name) for name in lower} == {"min"}
    assert {guessed_mode(name) for name in ("val_accuracy", "val/f1", "lossless", "answer")} == {"max"}
    traceback = "Traceback (most recent call last):\n  File x\ntorch.cuda.OutOfMemoryError: no room\n(exit code 1; log)"
    assert summary_of(traceback) == "torch.cuda.OutOfMemoryError: no room"
    assert summary_of("killed\n(was ended by SIGKILL; log)") == "(was ended by SIGKILL; log)"
    assert [format_rate(rate) for rate in (1e-3, 2.5e-4, 0.3, None)] == ["1e-3", "2.5e-4", "3e-1", ""]
    times = [format_seconds(Score(value, value, value, 1)) for value in (0.0852, 12.34, 250.0, 7500.0)]
    assert times == ["85.2 ms", "12.3 s", "4 min 10 s", "2 h 5 min"]
    assert len({tuple(style.items()) for style in styles([f"m{index}" for index in range(20)]).values()}) == 22
