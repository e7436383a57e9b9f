"""What the bottleneck adapters share: their fields, the places where they stand, and their arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.methods._blocks import CONVS, Block, find_blocks
from lightning_peft.methods._host import Adapter, Base, adapter_dtype
from lightning_peft.methods._low_rank import as_written
from lightning_peft.methods._split import on_whole
from lightning_peft.methods._targets import ALL_LINEAR, base_modules, expression_faults, find, inside, is_conv1d
from lightning_peft.methods.base import Attachment, Method
from lightning_peft.methods.errors import PEFTError, some, suggestion

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class Features(NamedTuple):
    """The features of a tensor that a module reads or gives: how many, and in which dimension."""

    width: int
    spatial: int | None = 0
    """How many dimensions come after theirs; None for all but the first two."""

    def dim_in(self, x: Tensor) -> int:
        """Their dimension in x.

        Raises:
            PEFTError: x has another number of features there.
        """
        dim = 1 if self.spatial is None else x.dim() - 1 - self.spatial
        if not 0 <= dim < x.dim() or x.shape[dim] != self.width:
            raise PEFTError(
                f"a bottleneck adapter for {self.width} features met a tensor of {tuple(x.shape)}; name another module "
                "in target_modules, one whose last layer says how many features it gives"
            )
        return dim


class Place(NamedTuple):
    """Where one adapter stands."""

    path: str
    """Of the module whose output is changed."""
    given: Features
    """Of that output."""
    reader: str = ""
    """Path of the module whose input is read, by an adapter that reads one."""
    read: Features | None = None
    """Of that input."""


class Projection(nn.Module):
    """A trained affine map: weight (out, in), Kaiming-uniform or zero, and bias (out,), zero."""

    def __init__(self, features_in: int, features_out: int, like: Tensor, *, zero: bool) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": adapter_dtype(like), "device": like.device}
        self.bias = nn.Parameter(torch.zeros(features_out, **options))
        self.reset(features_in, features_out, zero, options)

    def reset(self, features_in: int, features_out: int, zero: bool, options: dict[str, Any]) -> None:
        """Make what `matrix` is made of."""
        self.weight = nn.Parameter(torch.zeros(features_out, features_in, **options))
        if not zero:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def matrix(self) -> Tensor:
        """The weight (out, in), in the adapter's dtype."""
        return self.weight

    def forward(self, x: Tensor, dim: int) -> Tensor:
        """The map of dimension `dim` of x, in x's dtype."""
        with as_written(x.device.type):
            weight, bias = self.matrix().to(x.dtype), self.bias.to(x.dtype)
            if dim == x.dim() - 1:
                return F.linear(x, weight, bias)
            return F.linear(x.movedim(dim, -1), weight, bias).movedim(-1, dim)


class Bottleneck(Adapter):
    """h + U f(D h + b) + b', with h the output of the module that it stands on, or the first of its outputs."""

    on_split = around_split = True

    def __init__(self, down: Projection, up: Projection, activation: str, place: Place) -> None:
        super().__init__()
        self.down, self.up, self.activation, self.place = down, up, activation, place

    def forward(self, base: Base, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return change_first(base(*args, **kwargs), module, lambda h: h + self.delta(h, self.place.given.dim_in(h)))

    def delta(self, x: Tensor, dim: int) -> Tensor:
        """U f(D x + b) + b' for the features in dimension `dim`."""
        change: Tensor = self.up(ACTIVATIONS[self.activation](self.down(x, dim)), dim)
        return change

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        raise refused_merge()


def change_first(output: Any, module: nn.Module, change: Callable[[Tensor], Tensor]) -> Any:
    """The output of `module` with its tensor changed, or the first tensor of a tuple."""
    if isinstance(output, Tensor):
        return on_whole(output, change)
    if type(output) is tuple and output and isinstance(output[0], Tensor):
        return (change(output[0]), *output[1:])
    raise PEFTError(
        f"a bottleneck adapter can't change the output of {type(module).__name__}, a {type(output).__name__}; name a "
        "module in target_modules that returns a tensor"
    )


def refused_merge() -> PEFTError:
    """Why the adapter is in no weight of the base."""
    return PEFTError(
        "merge: a bottleneck adapter is not linear, so that no weight of the base computes the same; keep it attached"
    )


@dataclass(kw_only=True)
class BottleneckMethod(Method):
    """Fields and targets of the bottleneck adapters; D (r, width) maps down, U (width, r) up again."""

    r: int | None = None
    """Width of the bottleneck; None: what `reduction` makes of each place's width."""
    reduction: int = 16
    """Width of a place over the width of its bottleneck; it must divide every place's width. Unused where `r` is
    given."""
    activation: str = "relu"
    """What is between D and U: "relu", "gelu", "silu" or "tanh"."""
    target_modules: str | list[str] | None = None
    """Modules whose output to adapt: names or path endings in a list, or a regular expression for the whole path. None
    finds the sublayers of the model's transformer blocks."""
    exclude_modules: str | list[str] = field(default_factory=list)
    """Modules to leave out, written as `target_modules` are; of blocks, the modules whose output is adapted."""

    training_only: ClassVar[frozenset[str]] = frozenset({"target_modules", "exclude_modules"})

    def faults(self) -> list[str]:
        """What is wrong with the fields."""
        rules = {
            f"r: {self.r} is no width; it must be 1 or more, or None": self.r is not None and not is_count(self.r),
            f"reduction: {self.reduction} is no divisor; it must be 1 or more": not is_count(self.reduction),
            f"activation: {self.activation!r} is none of {', '.join(ACTIVATIONS)}"
            f"{suggestion(self.activation, ACTIVATIONS)}": self.activation not in ACTIVATIONS,
            "target_modules: is empty; name a module, or leave it None to find the blocks": (
                self.target_modules is not None and not self.target_modules
            ),
            f"target_modules: {ALL_LINEAR!r} is no place for a bottleneck adapter; leave it None to find the "
            "blocks, or name modules": self.target_modules == ALL_LINEAR,
        }
        expressions = {"target_modules": self.target_modules, "exclude_modules": self.exclude_modules}
        broken = expression_faults(expressions)
        return [fault for fault, is_broken in rules.items() if is_broken] + broken

    def attachments(self, model: nn.Module, skip: Container[str]) -> Sequence[Attachment]:
        """The adapters for each place that is named or found."""
        modules = dict(base_modules(model))
        places, faults = self._named(modules, skip) if self.target_modules else self._found(model, modules, skip)
        by_fault: dict[str, list[str]] = {}
        for place in places:
            for fault in self.place_faults(place, modules):
                by_fault.setdefault(fault, []).append(place.path)
        for fault, paths in by_fault.items():
            faults.append(f"{fault} ({some(paths, 1)})")
        if faults:
            raise PEFTError([f"{type(self).__name__}.{fault}" for fault in faults])
        # a module that two names share is adapted once
        once = {id(modules[place.path]): place for place in reversed(places)}
        return self.stand(list(once.values())[::-1], modules)

    def block_places(self, block: Block) -> Iterable[Place]:
        """Where adapters stand in one block."""
        raise NotImplementedError

    def place_faults(self, place: Place, modules: Mapping[str, nn.Module]) -> list[str]:
        """Why no adapter with these fields can stand at `place`."""
        width = place.given.width
        if self.r is not None or width % self.reduction == 0:
            return []
        divisors = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0)
        return [f"reduction: {self.reduction} does not divide {width} features; {divisors} do, or give r"]

    def bottleneck(self, width: int) -> int:
        """Width of the bottleneck at a place of this width."""
        return self.r if self.r is not None else width // self.reduction

    def stand(self, places: Sequence[Place], modules: Mapping[str, nn.Module]) -> list[Attachment]:
        """One adapter for each place."""
        made = []
        for place in places:
            module, width = modules[place.path], place.given.width
            like, r = next(module.parameters()), self.bottleneck(width)
            down, up = Projection(width, r, like, zero=False), Projection(r, width, like, zero=True)
            made.append(Attachment(place.path, module, Bottleneck(down, up, self.activation, place)))
        return made

    def _named(self, modules: Mapping[str, nn.Module], skip: Container[str]) -> tuple[list[Place], list[str]]:
        uncalled = {id(module.out_proj) for module in modules.values() if isinstance(module, nn.MultiheadAttention)}

        def describe(module: nn.Module) -> str:
            inner = " of an nn.MultiheadAttention, which never calls it" if id(module) in uncalled else ""
            instead = " (name its last layer instead)" if isinstance(module, nn.Sequential) else ""
            return f"a {type(module).__name__}{inner}{instead}"

        found, faults = find(
            "target_modules",
            self.target_modules or [],
            modules,
            lambda module: id(module) not in uncalled and features_given(module) is not None,
            self.exclude_modules,
            skip,
            describe,
        )
        given = {path: features_given(module) for path, module in found.items()}
        return [
            Place(path, features, path, features_read(found[path]))
            for path, features in given.items()
            if features is not None
        ], faults

    def _found(
        self, model: nn.Module, modules: Mapping[str, nn.Module], skip: Container[str]
    ) -> tuple[list[Place], list[str]]:
        every = [place for block in find_blocks(model) for place in self.block_places(block)]
        places = {place.path: place for place in every if not inside(place.reader, skip)}
        if not places:
            name = type(model).__name__
            return [], [
                f"target_modules: no transformer block with such a sublayer is found in {name}; name the modules whose "
                "output to adapt"
            ]
        found, faults = find("target_modules", r".*", places, lambda _: True, self.exclude_modules, skip, str)
        return list(found.values()), faults


def features_given(module: nn.Module) -> Features | None:
    """The features of a module's output, by its kind or by that of the last layer in it; None where none tells, or no
    adapter can stand there."""
    # a list is never called, and a Sequential would run the adapter as one of its layers
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) or next(module.parameters(), None) is None:
        return None
    layers = [each for _, each in base_modules(module)]
    return next((found for layer in reversed(layers) if (found := _features_of(layer, 1)) is not None), None)


def features_read(module: nn.Module) -> Features | None:
    """The features of a module's input, by its kind or by that of the first layer in it; None where none tells."""
    for _, layer in base_modules(module):
        if isinstance(layer, nn.Embedding):
            return None
        if (found := _features_of(layer, 0)) is not None:
            return found
    return None


def _features_of(layer: nn.Module, end: int) -> Features | None:
    """What a layer reads (end 0) or gives (end 1)."""
    if isinstance(layer, nn.Linear):
        return Features((layer.in_features, layer.out_features)[end])
    if is_conv1d(layer):
        return Features(next(layer.parameters()).shape[end])
    if isinstance(layer, CONVS):
        return Features((layer.in_channels, layer.out_channels)[end], len(layer.kernel_size))
    if isinstance(layer, nn.MultiheadAttention):
        return Features(layer.embed_dim)
    if isinstance(layer, nn.Embedding):
        return Features(layer.embedding_dim)
    if isinstance(layer, BATCH_NORMS):
        return Features(layer.num_features, None)
    if isinstance(layer, nn.GroupNorm):
        return Features(layer.num_channels, None)
    weight = layer._parameters.get("weight")
    # many models have a norm of their own; what else has a vector for a weight tells nothing
    is_norm = "Norm" in type(layer).__name__ and weight is not None and weight.dim() == 1
    return Features(len(weight)) if is_norm and weight is not None else None


def is_count(value: object) -> bool:
    """Whether it is a whole number of 1 or more."""
    return isinstance(value, int) and value >= 1
