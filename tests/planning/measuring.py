"""Peaks of real runs, by the allocator's own record: an oracle that knows nothing of the plan."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.profiler import ProfilerActivity, profile

from lightning_peft.planning.batches import with_tensors


def cpu_peak(run: Callable[[], Any]) -> int:
    """The most bytes that torch's CPU allocator had given out at once while `run` ran, of those that it gave out in it.

    From the trace that the profiler exports, in which each allocation has the total after it.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    memory = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    totals = [event["args"]["Total Allocated"] for event in memory]
    # the total goes on from one profiler to the next
    return max(totals) - (totals[0] - memory[0]["args"]["Bytes"])


class Batches(torch.utils.data.Dataset[Any]):
    """A planned batch again and again, made when it is asked for."""

    def __init__(self, batch: Any, count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return with_tensors(self.batch, lambda each: torch.zeros(each.shape) if each.is_meta else each.clone())


def fit(module: L.LightningModule, batch: Any, steps: int, **options: Any) -> None:
    """Train `module` for some batches on the CPU, with nothing beside it."""
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, torch.utils.data.DataLoader(Batches(batch, steps), batch_size=None))
