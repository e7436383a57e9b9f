"""What a run says of the model that it trains, against counts by hand."""

from __future__ import annotations

import re

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_peft import LoRA, inject
from lightning_peft.tracking import count, module_table, print_summary, summary_line, summary_table


def model() -> nn.Module:
    layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}) for _ in range(3))
    body = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": layers}), "head": nn.Linear(8, 2)})
    body["encoder"].bfloat16()
    return inject(body, LoRA(r=2, target_modules=["q"]), modules_to_save=["head"])


def cells(table: Table) -> list[list[str]]:
    console = Console(width=160)
    with console.capture() as captured:
        console.print(table)
    lines = captured.get().splitlines()
    return [[cell.strip() for cell in line.strip("│┃").split("│")] for line in lines if line.startswith("│")]


def test_summary_line() -> None:
    # three layers of A (2, 8) and B (8, 2), a head of (2, 8) and 2; the base has 3·(72 + 16) and 18
    assert summary_line(model()) == "trainable params: 114 || all params: 396 || trainable%: 28.79"
    assert summary_line(nn.Identity()) == "trainable params: 0 || all params: 0 || trainable%: 0.00"


def test_every_module_has_a_row() -> None:
    rows = cells(module_table(model()))
    assert [row[0] for row in rows] == [
        *(f"encoder.layer.{index}.{name}" for index in range(3) for name in ("q", "norm")),
        "head",
    ]
    # 72 frozen values of 2 bytes, and 32 trained ones of 4
    assert rows[0][1:] == ["Linear", "LinearLoRA", "32", "72", "bfloat16, float32", "272 B"]
    assert rows[1][1:] == ["LayerNorm", "", "0", "16", "bfloat16", "32 B"]
    assert rows[-1][1:] == ["Linear", "SavedCopy", "18", "18", "float32", "144 B"]


def test_summary_puts_layers_of_a_kind_into_one_row() -> None:
    assert cells(summary_table(model())) == [
        ["…layer.*.q (3×)", "LinearLoRA", "96", "216"],
        ["head", "SavedCopy", "18", "18"],
    ]


def test_a_shared_parameter_counts_once() -> None:
    tied = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    tied["head"].weight = tied["embed"].weight
    total = count(tied)
    assert (total.trainable, total.frozen, total.bytes) == (28, 0, 112)
    assert [row[3] for row in cells(module_table(tied))] == ["28", "0"]


def test_it_fits_a_terminal_of_eighty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(model())
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines()) <= 80
    assert re.search(r"│ …layer\.\*\.q \(3×\) │ LinearLoRA │ +96 │ +216 │", printed)


def test_counting_builds_nothing() -> None:
    with torch.device("meta"):
        big = nn.Linear(100_000, 100_000)
    assert count(big).bytes == 4 * (100_000**2 + 100_000)
