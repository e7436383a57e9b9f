"""What adapters add to the time of an inference, merged and unmerged."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_peft.injection import disable_adapters
from lightning_peft.methods._host import hosts
from lightning_peft.methods._merging import merge, unmerge
from lightning_peft.methods._sharded import is_sharded
from lightning_peft.methods._targets import base_modules
from lightning_peft.methods.errors import PEFTError
from lightning_peft.tracking.cost.unchanged import unchanged

BLOCKS = 5
"""Turns of each kind of runs: the base's, adapted and merged ones."""
RUNS = (2, 30)
"""In a turn, at least and at most."""
SECONDS = 0.3
"""That a turn shall take."""


class Recording:
    """The calls of the modules that hold adapters, outermost ones alone, with their arguments, kept on the CPU."""

    def __init__(self) -> None:
        self.calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
        self._inside: nn.Module | None = None
        self._step: nn.Module | None = None
        self._handles: list[Any] = []

    def start(self, module: nn.Module, redirected: bool = False) -> None:
        """Keep the calls of `module`, or what is in it, from now on.

        Args:
            module: the module.
            redirected: the first call of `module` is none of its own: a wrapper such as DDP makes it for a whole step.
        """
        self.calls, self._step = [], module if redirected else None
        paths = [path for path, _ in hosts(module)]
        holding = {
            id(part): part
            for path, part in base_modules(module)
            if any(path in ("", host) or host.startswith(f"{path}.") for host in paths)
        }
        for part in holding.values():
            self._handles.append(part.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(part.register_forward_hook(self._leave, always_call=True))

    def stop(self) -> None:
        """Keep no more of them."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._inside = [], None

    def replay(self, device: torch.device) -> Callable[[], None]:
        """What makes the same calls again, with arguments on `device`."""
        calls = [(module, *_moved((args, kwargs), device)) for module, args, kwargs in self.calls]

        def run() -> None:
            for module, args, kwargs in calls:
                module(*args, **kwargs)

        return run

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is self._step:
            self._step = None
        elif self._inside is None:
            self._inside = module
            self.calls.append((module, *_moved((args, kwargs), torch.device("cpu"))))

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if self._inside is module:
            self._inside = None


def inference_overhead(
    module: nn.Module, recording: Recording, context: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> tuple[float | None, float | None]:
    """The time of the recorded calls with the adapters, and with them merged, over that with the adapters disabled.

    They run in eval mode, without gradients, in turns, for some seconds in all; each number is the ratio of medians.
    Where the module is sharded, every process has to call this, and each runs as often as the first one.
    The weights are what they were, to the bit, and so are random numbers, modes and gradients.

    Args:
        module: a module with adapters, not merged.
        recording: of calls of it.
        context: what to run them in, such as a precision's autocast.

    Returns:
        Unmerged and merged; both None where nothing was recorded, and the latter where the adapters can't be merged.
    """
    if not recording.calls:
        return None, None
    device = next(module.parameters()).device
    run = recording.replay(device)
    times: dict[str, list[float]] = {"base": [], "adapted": [], "merged": []}
    mergeable = True
    with unchanged(module), torch.no_grad(), context():
        module.eval()
        with disable_adapters(module):
            _timed(run, device)
        first = _timed(run, device)
        runs = int(min(max(SECONDS / max(first, 1e-9), RUNS[0]), RUNS[1]))
        if any(map(is_sharded, module.parameters())):
            runs = _of_first(runs, device)  # each run takes all processes
        for _ in range(BLOCKS):
            with disable_adapters(module):
                times["base"] += _turn(run, device, runs)
            times["adapted"] += _turn(run, device, runs)
            if mergeable and (mergeable := _merged(module)):
                try:
                    times["merged"] += _turn(run, device, runs)
                finally:
                    unmerge(module)
    base = statistics.median(times["base"])
    unmerged = statistics.median(times["adapted"]) / base
    return unmerged, statistics.median(times["merged"]) / base if times["merged"] else None


def _of_first(number: int, device: torch.device) -> int:
    """The first process's number."""
    told = torch.tensor(number, device=device)
    torch.distributed.broadcast(told, src=0)
    return int(told)


def _merged(module: nn.Module) -> bool:
    try:
        merge(module)
    except (PEFTError, NotImplementedError):
        return False
    return True


def _turn(run: Callable[[], None], device: torch.device, runs: int) -> list[float]:
    """The seconds of so many runs; one before them isn't counted, as the first after a change is slower."""
    return [_timed(run, device) for _ in range(1 + runs)][1:]


def _timed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds, until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _moved(value: Any, device: torch.device) -> Any:
    """`value` with copies of its tensors, without gradients."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, copy=True)

    return apply_to_collection(value, Tensor, copy)
