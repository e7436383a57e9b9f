"""Running a module in the midst of its training without a trace."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_peft.methods._host import FrozenStatistics
from lightning_peft.state import rng_state, set_rng_state


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Put random numbers, train and eval modes, and metrics of torchmetrics back to what they were, whatever happens.

    Inside of the `with`, copies stand in for the metrics. Parameters, gradients and buffers are not looked after: run
    the module in eval mode and without gradients.
    """
    random_numbers = rng_state()
    modes = {part: part.training for part in module.modules()}
    asked = {part: part.asked_to_train for part in modes if isinstance(part, FrozenStatistics)}
    metrics = _metrics(module)
    try:
        for parent, name, metric in metrics:
            parent._modules[name] = copy.deepcopy(metric)
        yield
    finally:
        for parent, name, metric in metrics:
            parent._modules[name] = metric
        for part, mode in modes.items():
            part.training = mode
        for part, mode in asked.items():
            vars(part)["asked_to_train"] = mode
        set_rng_state(random_numbers)


def _metrics(module: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """The outermost metrics, with the module that each is in and its name there."""
    found: list[tuple[nn.Module, str, nn.Module]] = []
    for name, child in module.named_children():
        if isinstance(child, (Metric, MetricCollection)):
            found.append((module, name, child))
        else:
            found += _metrics(child)
    return found
