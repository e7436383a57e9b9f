"""What becomes of the optimizers that a user's `configure_optimizers` returns: only what trains is left in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_peft.methods.errors import PEFTError

PARALLEL = ("params", "param_names")
"""What a parameter group holds for each parameter."""
RATES = ("lr", "initial_lr", "max_lr", "min_lr")
"""What a parameter group holds of its learning rate; schedulers keep lists of the same, by group."""
RATE_LISTS = ("base_lrs", "_last_lr", "min_lrs", "max_lrs")
OTHER_LISTS = ("lr_lambdas", "base_momentums", "max_momentums")


def keep_trainable(
    configured: Any, trainable: Mapping[str, nn.Parameter], factors: Mapping[nn.Parameter, float]
) -> None:
    """Take frozen parameters out of the optimizers, and give parameters with a factor groups of their own; in place.

    Args:
        configured: what `configure_optimizers` returned: any nesting of optimizers and schedulers.
        trainable: all that has to be trained, by name.
        factors: multiples of the learning rate, by parameter.

    Raises:
        PEFTError: a trainable parameter is in no optimizer, or an optimizer that takes one group alone was to have two.
    """
    optimizers = optimizers_in(configured)
    if not optimizers:
        return  # a module may optimize by hand, without any of torch's optimizers
    schedulers = list(dict.fromkeys(_of_type(configured, (LRScheduler, ReduceLROnPlateau))))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    optimizer.state.pop(parameter, None)
            _keep(group, [parameter for parameter in group["params"] if parameter.requires_grad])
    held = {
        id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    }
    absent = [name for name, parameter in trainable.items() if id(parameter) not in held]
    if absent:
        raise PEFTError(
            f"configure_optimizers: {len(absent)} of {len(trainable)} trainable parameters are in no optimizer "
            f"({absent[0]}{', …' if len(absent) > 1 else ''}). It seems to have been built before the adapters were "
            "attached, or over a part of the model: build it in configure_optimizers, over self.parameters()"
        )
    for optimizer in optimizers:
        own = [scheduler for top in schedulers for scheduler in _flat(top) if scheduler.optimizer is optimizer]
        _split_groups(optimizer, own, factors)


def optimizers_in(configured: Any) -> list[Optimizer]:
    """The optimizers in what `configure_optimizers` returned, each once."""
    return list(dict.fromkeys(_of_type(configured, Optimizer)))


def _split_groups(optimizer: Optimizer, schedulers: list[Any], factors: Mapping[nn.Parameter, float]) -> None:
    for index, group in enumerate(list(optimizer.param_groups)):
        for factor in dict.fromkeys(factors[parameter] for parameter in group["params"] if parameter in factors):
            if isinstance(optimizer, LBFGS):
                raise PEFTError(
                    "LBFGS takes one learning rate for all, and the method asks for two (lora_plus, say); use AdamW"
                )
            moved = {name: list(group[name]) if name in PARALLEL else value for name, value in group.items()}
            _keep(moved, [parameter for parameter in group["params"] if factors.get(parameter) == factor])
            _keep(group, [parameter for parameter in group["params"] if factors.get(parameter) != factor])
            if names := moved.get("param_names"):
                moved["params"] = list(zip(names, moved["params"], strict=True))
            moved |= {name: group[name] * factor for name in RATES if name in group}
            optimizer.add_param_group(moved)
            for scheduler in schedulers:
                _add_group(scheduler, index, factor, len(optimizer.param_groups) - 1)


def _keep(group: dict[str, Any], wanted: list[nn.Parameter]) -> None:
    """Leave only `wanted` parameters in a group; in place, since some optimizers (LBFGS) keep the list itself."""
    ids = {id(parameter) for parameter in wanted}
    places = [place for place, parameter in enumerate(group["params"]) if id(parameter) in ids]
    for name in PARALLEL:
        if name in group:
            group[name][:] = [group[name][place] for place in places]


def _add_group(scheduler: Any, index: int, factor: float, groups_before: int) -> None:
    """Let a scheduler that was made for `groups_before` groups treat a new one as it treats group `index`."""
    for name, value in vars(scheduler).items():
        if name in (*RATE_LISTS, *OTHER_LISTS) and isinstance(value, list) and len(value) == groups_before:
            value.append(value[index] * factor if name in RATE_LISTS else value[index])


def _flat(scheduler: Any) -> Iterator[Any]:
    """A scheduler, and those that it is made of (SequentialLR, ChainedScheduler)."""
    yield scheduler
    for part in getattr(scheduler, "_schedulers", []):
        yield from _flat(part)


def _of_type(value: Any, kind: Any) -> Iterator[Any]:
    if isinstance(value, kind):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _of_type(item, kind)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _of_type(item, kind)
    elif kind is not Optimizer and hasattr(value, "scheduler"):
        yield from _of_type(value.scheduler, kind)
