"""What the processes of a run have to agree on before they train: the configuration, and the frozen base.

Only digests travel while all is well. No rank waits for one that has found a fault: each takes part in every exchange,
and all of them raise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lightning_peft.methods._sharded import is_sharded, local_part
from lightning_peft.methods.errors import PEFTError, some
from lightning_peft.state import Spec, checksum

Facts = Mapping[str, str]
SHOWN = 3
"""Differences that a message tells."""
BASE, CONFIGURATION, FAULT = "base", "configuration", "fault"
ABSENT = "absent"
TRAINED = "trained "
OF_PARAMETERS = ("params", "param_names")
"""What a group of an optimizer holds beside its options."""


def everyones(value: Any, group: Any = None) -> list[Any]:
    """`value` of each rank, or of each in `group`, by rank: every one of them has to call it. Without a process group,
    that of this process alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def agree_on_configuration(spec: Spec, trained: Mapping[str, Tensor], settings: Mapping[str, object]) -> None:
    """Compare what is trained, and how, with the other ranks; every rank has to call it, or to fail in `faults_told`.

    Args:
        spec: the adapter's, of which all but the base is compared.
        trained: what trains, by name; names, shapes and dtypes are compared.
        settings: of the Trainer.

    Raises:
        PEFTError: on every rank, with what differs; or another rank has failed.
    """
    facts = dict(_flat({**{name: value for name, value in spec.items() if name != "base"}, "trainer": settings}))
    facts |= {f"{TRAINED}{name}": f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in trained.items()}
    _agree(facts)


def agree_on_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Compare the optimizers' classes and options with the other ranks'; every rank has to call it, or to fail in
    `faults_told`.

    The module's hyper-parameters are not compared, of which each rank may have its own, such as a seed or a folder of
    its disk; of those that would train one rank otherwise, most come to stand in an optimizer.

    Raises:
        PEFTError: on every rank, with what differs; or another rank has failed.
    """
    facts = {}
    for number, optimizer in enumerate(optimizers):
        facts[f"optimizers.{number}.class"] = type(optimizer).__name__
        for place, group in enumerate(optimizer.param_groups):
            options = {name: _shown(option) for name, option in group.items() if name not in OF_PARAMETERS}
            facts |= dict(_flat(options, f"optimizers.{number}.groups.{place}"))
    _agree(facts)


def _agree(facts: Facts) -> None:
    found = _differences(CONFIGURATION, facts)
    # what trains follows from the rest, and differs by itself where the modules do
    found = {label: values for label, values in found.items() if not label.startswith(TRAINED)} or found
    shown = [f"{label} is {_by_rank(values)}" for label, values in list(found.items())[:SHOWN]]
    if shown:
        rest = f" ({len(found) - SHOWN} more values differ)" if len(found) > SHOWN else ""
        raise PEFTError(
            [f"the ranks differ: {difference}" for difference in shown[:-1]]
            + [f"the ranks differ: {shown[-1]}{rest}; start every process with the same configuration and code"]
        )


@contextmanager
def faults_told() -> Iterator[None]:
    """Lets ranks that wait in an agreement know of what is raised inside of the `with`; they raise it as well."""
    try:
        yield
    except Exception as fault:
        # what others found, or that they have ended, is told by them
        with suppress(PEFTError, RuntimeError):
            _differences(FAULT, {FAULT: str(fault) or type(fault).__name__})
        raise


def agree_on_base(frozen: Mapping[str, Tensor], *, sync: bool = False, mesh: DeviceMesh | None = None) -> None:
    """Compare every byte of the frozen base with the other ranks'; every rank has to call it.

    Args:
        frozen: the tensors by name, on the devices that they are used on (their memory's speed is the check's); of what
            is on the meta device, shape and dtype are compared.
        sync: where values differ, take the first rank's, in place, in place of raising.
        mesh: of two dimensions, over the second of which some tensors are split; their parts are compared over the
            first.

    Raises:
        PEFTError: on every rank: values differ and are not to be synced, or names, shapes or dtypes do.
    """
    split = {name for name, tensor in frozen.items() if is_sharded(tensor)}
    sums = {name: f"{checksum(local_part(tensor)):016x}" for name, tensor in frozen.items()}
    if split and mesh is not None:
        parts = everyones({name: sums[name] for name in split}, mesh.get_group(1))
        sums |= {name: ",".join(part[name] for part in parts) for name in split}
    facts = {name: f"{tuple(t.shape)} {t.dtype} {sums[name]}" for name, t in frozen.items()}
    found = _differences(BASE, facts)
    if not found:
        return
    other_kind = {name: values for name, values in found.items() if len({_kind(value) for value in values}) > 1}
    if other_kind:
        name, values = next(iter(other_kind.items()))
        kinds = _by_rank([_kind(value) for value in values])
        raise PEFTError(
            f"the frozen base is another model on some ranks: {name} is {kinds}; build the same model on every rank"
        )
    if not sync:
        name, values = next(iter(found.items()))
        others = [rank for rank, value in enumerate(values) if value != values[0]]
        raise PEFTError(
            f"the frozen base differs between ranks, in {len(found)} of {len(facts)} tensors: on {_ranks(others)} "
            f"{name} is not as on rank 0. It is not broadcast, so every rank has to have the same: load one "
            "checkpoint, or call seed_everything before the model is built; or give the strategy sync_base=True, which "
            "broadcasts what differs from rank 0"
        )
    with torch.no_grad():
        for name in found:
            split_by = mesh.get_group(0) if mesh is not None and name in split else None
            broadcast(local_part(frozen[name]), split_by)


def broadcast(tensor: Tensor, group: Any = None) -> None:
    """Give `tensor` the values of the first rank, or of the first one in `group`, in place."""
    own = tensor.detach().as_subclass(Tensor)
    # a quantized weight's tables may be left on the CPU, from which NCCL can't send
    device = torch.cuda.current_device() if dist.get_backend() == "nccl" else own.device
    sent = own.to(device).contiguous()
    dist.broadcast(sent, group=group, group_src=0)
    if sent is not own:
        own.copy_(sent)


def _differences(what: str, facts: Facts) -> dict[str, list[str | None]]:
    """What the ranks don't agree on, each rank's fact by label; the same on all of them.

    Raises:
        PEFTError: a rank has failed, or is at another comparison.
    """
    digest = hashlib.sha256("\n".join([what, *(f"{label}\t{fact}" for label, fact in facts.items())]).encode()).digest()
    if len(set(everyones(digest))) == 1:
        return {}
    gathered: list[tuple[str, Facts]] = everyones((what, dict(facts)))
    if faults := [f"rank {rank}: {theirs[FAULT]}" for rank, (kind, theirs) in enumerate(gathered) if kind == FAULT]:
        raise PEFTError(faults)
    kinds = [kind for kind, _ in gathered]
    if len(set(kinds)) > 1:
        without = _ranks([rank for rank, kind in enumerate(kinds) if kind == BASE])
        raise PEFTError(f"on {without} the Trainer has no PEFT callback, on others it has; give every rank the same")
    labels = dict.fromkeys(label for _, theirs in gathered for label in theirs)
    values = {label: [theirs.get(label) for _, theirs in gathered] for label in labels}
    return {label: of_ranks for label, of_ranks in values.items() if len(set(of_ranks)) > 1}


def _kind(fact: str | None) -> str:
    """Shape and dtype of a tensor's fact."""
    return ABSENT if fact is None else fact.rpartition(" ")[0]


def _by_rank(values: list[str | None] | list[str]) -> str:
    by_value: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        by_value.setdefault(ABSENT if value is None else value, []).append(rank)
    return " and ".join(f"{value} on {_ranks(ranks)}" for value, ranks in by_value.items())


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {some([*map(str, ranks)], 8)}"


def _shown(option: Any) -> Any:
    """An optimizer's option, as it is shown alike by processes on other devices and with other addresses."""
    if isinstance(option, Tensor):
        return option.tolist()
    if isinstance(option, (list, tuple)):
        return tuple(_shown(item) for item in option)
    return option if option is None or isinstance(option, (bool, int, float, str)) else type(option).__name__


def _flat(value: Any, label: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested mappings, by their path."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flat(item, f"{label}.{name}" if label else str(name))
    else:
        yield label, repr(value)
