"""The metrics that a task is asked for, by name or as objects of torchmetrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torchmetrics import Metric

from lightning_peft.methods.errors import PEFTError, suggestion

MetricFactory = Callable[[Any], Metric]
"""Makes a metric for a task, whose model and data are known by then."""


def metric_faults(
    given: Sequence[str | Metric] | None, known: Mapping[str, MetricFactory], takes_others: bool
) -> list[str]:
    """What is wrong with the metrics that a task is asked for; empty where nothing is.

    Args:
        given: what was asked for; None is the task's own choice.
        known: the names that the task knows.
        takes_others: whether it can enter a batch into a metric that it doesn't know.
    """
    if isinstance(given, str):
        return [f"metrics: {given!r} is no list; write [{given}]"]
    faults = []
    for metric in given or ():
        if isinstance(metric, Metric):
            if not takes_others:
                kind = type(metric).__name__
                faults.append(f"metrics: {kind} can't be used here; the metrics are {', '.join(known)}")
        elif metric not in known and "." in metric and takes_others:
            faults.append(f"metrics: there is no {metric!r}; a class is given as {{class_path: {metric}}}")
        elif metric not in known:
            hint = suggestion(metric, known) or f"; the metrics are {', '.join(known)}"
            faults.append(f"metrics: there is no {metric!r}{hint}")
    names = [metric_name(metric) for metric in given or ()]
    twice = sorted({name for name in names if names.count(name) > 1})
    return faults + [f"metrics: {name!r} is there more than once" for name in twice]


def metric_name(metric: str | Metric) -> str:
    """The name under which a metric is logged: its own, or `cohen_kappa` for an object of the class `CohenKappa`."""
    if isinstance(metric, str):
        return metric
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(metric).__name__).lower()


def split_values(
    values: Mapping[str, torch.Tensor], labels: Sequence[str] | None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Numbers, by name, and matrices, by name; each number of a vector is called by its label or its place.

    Args:
        values: what metrics have computed: scalars, vectors and square matrices.
        labels: the classes' names, for vectors that are as long.

    Raises:
        PEFTError: one is none of these, such as a curve.
    """
    numbers, matrices = {}, {}
    for name, value in values.items():
        shape = tuple(getattr(value, "shape", (0, 0, 0)))
        if len(shape) > 2 or (len(shape) == 2 and shape[0] != shape[1]):
            kind = f"a tensor of shape {shape}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise PEFTError(f"metrics: {name!r} computes {kind}; a number, or one for each class, can be logged")
        if len(shape) == 2:
            matrices[name] = value
        elif value.numel() == 1:
            numbers[name] = value.reshape(())
        else:
            named = labels if labels is not None and len(labels) == len(value) else range(len(value))
            numbers |= {f"{name}_{label}": number for label, number in zip(named, value, strict=True)}
    return numbers, matrices
