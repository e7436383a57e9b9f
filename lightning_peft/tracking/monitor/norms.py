"""How large adapters are, how large their gradients, and how far a step moves them, module by module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_peft.injection import adapters
from lightning_peft.methods._host import Host
from lightning_peft.methods._sharded import gathered, is_sharded
from lightning_peft.methods._targets import base_modules

K = TypeVar("K")
CHUNK = 2**18
"""Values that are brought to float64 at once: 2 MB."""


@dataclass
class Norms:
    """L2 norms by group, the path of a module: what adapters on it train, or its own trained parameters."""

    gradient: dict[str, float] = field(default_factory=dict)
    """Before clipping, without the scale of 16 bits; groups without a gradient are left out."""
    weight: dict[str, float] = field(default_factory=dict)
    """Before the step."""
    update: dict[str, float] = field(default_factory=dict)
    """Of the step's change."""

    def update_ratio(self) -> dict[str, float]:
        """The change's norm over the weights' by group; one whose weights are all zero is left out."""
        return {group: norm / self.weight[group] for group, norm in self.update.items() if self.weight[group]}

    def totals(self) -> dict[str, float]:
        """`grad_norm`, `weight_norm` and `update_ratio` of all groups together, those alone that are known."""
        gradient, weight, update = (total(norms.values()) for norms in (self.gradient, self.weight, self.update))
        known = {"grad_norm": gradient} if self.gradient else {}
        known |= {"weight_norm": weight} if self.weight else {}
        return known | ({"update_ratio": update / weight} if weight else {})


def adapter_norms(module: nn.Module, adapter_name: str = "default") -> dict[str, float]:
    """The L2 norm of all of an adapter's parameters, by the path of the module that it stands on.

    It is accumulated in float64, and the host waits for the device once. A parameter that several modules share counts
    where it comes first. Copies of `modules_to_save` are among them; a module without parameters of its own is not.

    Args:
        module: any module; without adapters of that name, the result is empty.
        adapter_name: the adapters' name.
    """
    seen = set[int]()
    own = {
        path: [tensor.detach() for tensor in adapter.parameters() if _is_new(tensor, seen)]
        for path, adapter in adapters(module, adapter_name).items()
    }
    return norms({path: tensors for path, tensors in own.items() if tensors})


def trained_groups(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters that require a gradient, by the path of the module that they are on or that their adapter stands
    on; a shared one comes once. The root's path is `(root)`."""
    seen = set[int]()
    groups: dict[str, list[nn.Parameter]] = {}
    for path, own in base_modules(module):
        parameters = [*own.parameters(recurse=False), *(own.adapters.parameters() if isinstance(own, Host) else [])]
        trained = [parameter for parameter in parameters if parameter.requires_grad and _is_new(parameter, seen)]
        if trained:
            groups[path or "(root)"] = trained
    return groups


def norms(groups: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """The L2 norm of each group of tensors together.

    Args:
        groups: dense or sparse tensors of any floating-point dtype and shape, on any devices. Where one is sharded,
            every process has to call this.
    """
    parts = {group: [part for tensor in tensors for part in _parts(tensor)] for group, tensors in groups.items()}
    return _read(parts)


class StepNorms:
    """The norms of one optimizer step, of one or several optimizers.

    `before` is called when gradients are ready and `after` when all has stepped; in between, a copy of the trained
    tensors is kept on their device: as much memory as the trained weights take, in the steps that are measured alone.

    Args:
        groups: the parameters by group, as `trained_groups` gives them.
    """

    def __init__(self, groups: Mapping[str, Sequence[nn.Parameter]]) -> None:
        self._groups = groups
        self._gradients: dict[int, list[Tensor]] = {}
        self._values: dict[int, Tensor] = {}

    @torch.no_grad()
    def before(self, parameters: Iterable[Tensor], scale: float = 1.0) -> None:
        """Take an optimizer's gradients and values; of one that steps several times, the last gradients and the first
        values.

        Args:
            parameters: the optimizer's.
            scale: by which their gradients are multiplied.
        """
        for parameter in parameters:
            if parameter.grad is not None:
                self._gradients[id(parameter)] = [part / scale for part in _parts(parameter.grad)]
            if id(parameter) not in self._values:
                self._values[id(parameter)] = parameter.detach().clone()

    @torch.no_grad()
    def after(self) -> Norms:
        """What came of it; of parameters that no optimizer has, nothing. The host waits for the device once."""
        parts: dict[tuple[str, str], list[Tensor]] = {}
        for group, parameters in self._groups.items():
            for parameter in parameters:
                value = self._values.get(id(parameter))
                if value is None:
                    continue
                parts.setdefault(("weight", group), []).extend(_parts(value))
                parts.setdefault(("update", group), []).extend(_parts(parameter.detach(), value))
                if (gradient := self._gradients.get(id(parameter))) is not None:
                    parts.setdefault(("gradient", group), []).extend(gradient)
        self._gradients, self._values = {}, {}
        result = Norms()
        for (kind, group), norm in _read(parts).items():
            getattr(result, kind)[group] = norm
        return result


def total(norms: Iterable[float]) -> float:
    """The norm of all groups together."""
    return math.sqrt(sum(norm * norm for norm in norms))


def _parts(tensor: Tensor, minus: Tensor | None = None) -> list[Tensor]:
    """Norms, scalars on the tensor's device, whose own norm is the tensor's, or that of its difference to `minus`."""
    if is_sharded(tensor):
        wide = tensor.double() if minus is None else tensor.double() - minus.double()
        return [gathered(torch.linalg.vector_norm(wide))]
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    # Apple's devices have no float64
    dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
    chunks = torch.split(tensor.reshape(-1), CHUNK)
    if minus is None:
        return [torch.linalg.vector_norm(chunk.to(dtype)) for chunk in chunks]
    others = torch.split(minus.reshape(-1), CHUNK)
    pairs = zip(chunks, others, strict=True)
    return [torch.linalg.vector_norm(chunk.to(dtype) - other.to(dtype)) for chunk, other in pairs]


def _read(parts: Mapping[K, Sequence[Tensor]]) -> dict[K, float]:
    """The norm of each list of norms, all read from the device at once."""
    scalars = [part for own in parts.values() for part in own]
    if not scalars:
        return {}
    values = iter(torch.stack([part.to(scalars[0].device) for part in scalars]).tolist())
    return {key: total([next(values) for _ in own]) for key, own in parts.items()}


def _is_new(tensor: Tensor, seen: set[int]) -> bool:
    is_new = id(tensor) not in seen
    seen.add(id(tensor))
    return is_new
