"""What a run costs: parameters, FLOPs, time, memory, bytes of a checkpoint, and what adapters add to inference."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_peft.injection import adapter_names
from lightning_peft.state import adapter_tensors
from lightning_peft.tracking.cost.memory import peak_memory
from lightning_peft.tracking.cost.overhead import Recording, inference_overhead
from lightning_peft.tracking.tables import count

FIRST_STEPS = 3
"""Steps that are not timed: kernels are chosen and memory is reserved in them, and FLOPs counted."""
LAST_STEPS = 1000
"""Steps whose times are kept."""


@dataclass
class Cost:
    """What a run cost, or costs from now on; None where it wasn't measured or doesn't exist."""

    trainable: int
    total: int
    """All parameters, adapters included; a packed weight counts as the values that it stands for, a sharded one
    whole."""
    step_flops: float | None = None
    """Of one batch: forward, backward, and what is computed again in it, on one device. Matrix products, convolutions
    and attention are counted, as torch's counter does, a multiplication and an addition as two."""
    step_seconds: float | None = None
    """Median over batches, from the batch on the device to the optimizer's step; loading is not in it."""
    peak_memory: int | None = None
    """Bytes; see `peak_memory`."""
    checkpoint_bytes: int | None = None
    """Of the last checkpoint that was written, with the optimizer's state if that is in it; where none was written, of
    the tensors that one would hold without it."""
    overhead_unmerged: float | None = None
    """An inference's time over the bare base's on the same input: 1.1 is ten percent more. None without adapters."""
    overhead_merged: float | None = None
    """The same with the adapters merged into the weights. None where the method or the strategy can't merge."""

    @property
    def trainable_share(self) -> float:
        """Trained parameters over all."""
        return self.trainable / self.total if self.total else 0.0


class CostMeter(pl.Callback):
    """Measures what a run costs while it trains, and logs it as `cost/…` when it ends.

    In the first batch it counts FLOPs and keeps what the adapted modules were called with, on the CPU. Batches after
    the third are timed, on a GPU by events, so that the host never waits. When training ends, inference is timed on
    what was kept, for some seconds at most. Weights, random numbers, modes and gradients stay what they are without it.

    Args:
        flops: count FLOPs; a module that torch.compile has compiled would run otherwise while they are counted, and is
            left out.
        overhead: time inference.
    """

    def __init__(self, flops: bool = True, overhead: bool = True) -> None:
        self.flops, self.overhead = flops, overhead
        self._run = _Run(StepClock(torch.device("cpu")))

    def cost(self, trainer: pl.Trainer, module: pl.LightningModule) -> Cost:
        """What was measured.

        Args:
            trainer: that has trained, or is about to end to.
            module: the trained module.
        """
        run = self._run
        if run.cost is None:
            parameters = count(module)
            run.cost = Cost(
                parameters.trainable,
                parameters.trainable + parameters.frozen,
                run.step_flops,
                run.clock.median(),
                run.peak,
                checkpoint_bytes(trainer, module),
                *run.overhead,
            )
        return run.cost

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew; on a GPU, the peak too."""
        self._run = _Run(StepClock(pl_module.device))
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to measure a batch."""
        run = self._run
        if run.batches >= FIRST_STEPS:
            run.clock.start()
        elif run.batches == 0:
            if self.overhead:
                run.recording.start(pl_module, redirected=trainer.strategy.model is not pl_module)
            if self.flops and not _is_compiled(pl_module):
                run.counter = FlopCounterMode(display=False)
                run.counter.__enter__()  # type: ignore[no-untyped-call]

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Keep no calls that activation checkpointing makes."""
        self._run.recording.stop()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End to measure it."""
        self._run.clock.stop()
        self._run.end_first()
        self._run.batches += 1

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the peak, and time inference, before Lightning takes the module from its device."""
        self._run.peak = peak_memory(pl_module.device)
        self._run.overhead = self._time_inference(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the cost."""
        cost = self.cost(trainer, pl_module)
        measured = {**asdict(cost), "trainable_share": cost.trainable_share}
        values = {f"cost/{name}": float(value) for name, value in measured.items() if value is not None}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self._run.end_first()

    def _time_inference(self, trainer: pl.Trainer, module: pl.LightningModule) -> tuple[float | None, float | None]:
        try:
            return inference_overhead(module, self._run.recording, trainer.precision_plugin.forward_context)
        except Exception as error:  # of the module's, in eval mode; a run that has ended well shall not be lost for it
            rank_zero_warn(f"CostMeter: inference was not timed ({type(error).__name__}: {error})")
            return None, None


@dataclass
class _Run:
    """What is known of one run so far."""

    clock: StepClock
    recording: Recording = field(default_factory=Recording)
    counter: FlopCounterMode | None = None
    batches: int = 0
    step_flops: float | None = None
    peak: int | None = None
    overhead: tuple[float | None, float | None] = (None, None)
    cost: Cost | None = None

    def end_first(self) -> None:
        """Take off what the first batch was measured with."""
        self.recording.stop()
        if self.counter is not None:
            self.counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self.step_flops, self.counter = float(self.counter.get_total_flops()), None


class StepClock:
    """Times steps: on a GPU by events in its stream, elsewhere by the host's clock.

    Args:
        device: that the steps run on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: deque[float] = deque(maxlen=LAST_STEPS)
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._started: Any = None

    def start(self) -> None:
        """A step begins."""
        self._started = self._now()

    def stop(self) -> None:
        """It ends; one that did not begin doesn't count."""
        if self._started is None:
            return
        stopped = self._now()
        if self._device.type == "cuda":
            self._events.append((self._started, stopped))
            self._read()
        else:
            self._seconds.append(stopped - self._started)
        self._started = None

    def median(self) -> float | None:
        """Seconds; None where no step was timed."""
        if self._events:
            self._events[-1][1].synchronize()
            self._read()
        return statistics.median(self._seconds) if self._seconds else None

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _read(self) -> None:
        # in order, without waiting for those that the device hasn't come to
        while self._events and self._events[0][1].query():  # type: ignore[no-untyped-call]
            start, stop = self._events.popleft()
            self._seconds.append(start.elapsed_time(stop) / 1000)


def checkpoint_bytes(trainer: pl.Trainer, module: pl.LightningModule) -> int:
    """The size of the file, or folder of shards, that a ModelCheckpoint of `trainer` wrote last; where there is none,
    of the tensors that one would hold without the optimizer's."""
    paths = [
        Path(path)
        for saver in trainer.checkpoint_callbacks
        for name in ("last_model_path", "best_model_path")
        if (path := getattr(saver, name, ""))
    ]
    written = [path for path in paths if path.exists()]
    if written:
        newest = max(written, key=lambda path: path.stat().st_mtime_ns)
        files = [newest] if newest.is_file() else [path for path in newest.rglob("*") if path.is_file()]
        return sum(path.stat().st_size for path in files)
    names = adapter_names(module)
    state: Mapping[str, Any] = adapter_tensors(module, names[-1]) if names else module.state_dict()
    return sum({id(tensor): tensor.nbytes for tensor in state.values() if isinstance(tensor, torch.Tensor)}.values())


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile stands on it or in it, in either of its forms: neither is public; checked on torch 2.11 and
    2.13."""
    return any(
        type(part).__name__ == "OptimizedModule" or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )
