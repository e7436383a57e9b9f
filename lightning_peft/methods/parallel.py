"""Parallel adapters: a bottleneck beside the feed-forward of each block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_peft.methods import _bottleneck as shared
from lightning_peft.methods._blocks import Block
from lightning_peft.methods._host import Adapter, Base
from lightning_peft.methods._split import on_whole, whole
from lightning_peft.methods.base import Attachment
from lightning_peft.methods.errors import PEFTError


class _Passage:
    """Carries f(D x + b) from the first layer of a feed-forward to its last, within one forward."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None

    def __reduce__(self) -> tuple[type[_Passage], tuple[()]]:
        # a copy starts empty: a forward that broke off may have left a tensor, which has a graph and can't be copied
        return type(self), ()


class Down(Adapter):
    """f(D x + b) of the input x of the module that it stands on, for the `Up` that shares its passage."""

    on_split = True

    def __init__(self, down: shared.Projection, activation: str, read: shared.Features, passage: _Passage) -> None:
        super().__init__()
        self.down, self.activation, self.read, self.passage = down, activation, read, passage

    def forward(self, base: Base, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        z: Tensor = base(*args, **kwargs)
        x = whole(first(args, kwargs)).to(z.dtype)
        self.passage.hidden = shared.ACTIVATIONS[self.activation](self.down(x, self.read.dim_in(x)))
        return z

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        raise shared.refused_merge()


class Up(Adapter):
    """y + s·(U h + b') with y the output of the module that it stands on, and h what `Down` has made."""

    on_split = True

    def __init__(self, up: shared.Projection, scale: float, given: shared.Features, passage: _Passage) -> None:
        super().__init__()
        self.up, self.scale, self.given, self.passage = up, scale, given, passage

    def forward(self, base: Base, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = base(*args, **kwargs)
        hidden, self.passage.hidden = self.passage.hidden, None
        if hidden is None:
            raise PEFTError(
                f"ParallelAdapter: the feed-forward's last layer, a {type(module).__name__}, ran without its first; "
                "name the modules to adapt in target_modules"
            )
        made = hidden

        def changed(y: Tensor) -> Tensor:
            return torch.add(y, self.up(made.to(y.dtype), self.given.dim_in(y)), alpha=self.scale)

        return on_whole(output, changed)

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        raise shared.refused_merge()


class Beside(shared.Bottleneck):
    """F(x) + s·(U f(D x + b) + b') around one module F."""

    def __init__(
        self, down: shared.Projection, up: shared.Projection, activation: str, place: shared.Place, scale: float
    ) -> None:
        super().__init__(down, up, activation, place)
        self.scale = scale

    def forward(self, base: Base, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x, read = cast(Tensor, first(args, kwargs)), cast(shared.Features, self.place.read)

        def changed(y: Tensor) -> Tensor:
            self.place.given.dim_in(y)
            delta = self.delta(x.to(y.dtype), read.dim_in(x))
            if delta.shape != y.shape:
                raise PEFTError(
                    f"ParallelAdapter: {type(module).__name__} makes {tuple(y.shape)} of {tuple(x.shape)}; it must "
                    "keep all sizes but the features'"
                )
            return torch.add(y, delta, alpha=self.scale)

        return shared.change_first(base(*args, **kwargs), module, changed)


def first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a call, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


@dataclass(kw_only=True)
class ParallelAdapter(shared.BottleneckMethod):
    r"""F(x) + s·(U relu(D x + b) + b') with F the feed-forward block and x its input.

    In place of it, F can be any module that `target_modules` names, with its first argument for x.
    D (r, width) starts Kaiming-uniform and U (width, r) at zero, so that the model's outputs are the frozen model's.
    Source: arXiv 2110.04366.

    Raises:
        PEFTError: with every field that breaks its rule.
    """

    scale: float = 4.0
    """s, what the adapter's output is multiplied with."""

    learning_rate: ClassVar[float] = 1e-3

    def faults(self) -> list[str]:
        """What is wrong with the fields."""
        off = [f"scale: {self.scale} would switch the adapter off; it must not be 0"] if not self.scale else []
        return super().faults() + off

    def block_places(self, block: Block) -> Iterator[shared.Place]:
        """The feed-forward."""
        if block.feed_forward is not None:
            features = shared.Features(block.width)
            yield shared.Place(block.feed_forward.output, features, block.feed_forward.inputs[0], features)

    def place_faults(self, place: shared.Place, modules: Mapping[str, nn.Module]) -> list[str]:
        """Also, what reads no features or moves them."""
        faults = super().place_faults(place, modules)
        if place.read is None:
            faults.append("target_modules: reads no features that an adapter beside it could read")
        elif _moves(modules[place.path]):
            faults.append("target_modules: a convolution that changes the size can have no adapter beside it")
        return faults

    def stand(self, places: Sequence[shared.Place], modules: Mapping[str, nn.Module]) -> list[Attachment]:
        """One adapter around a module, or two that work together at a feed-forward's first and last layer."""
        made = []
        for place in places:
            reader, module, read = modules[place.reader], modules[place.path], cast(shared.Features, place.read)
            r = self.bottleneck(place.given.width)
            down = shared.Projection(read.width, r, next(reader.parameters()), zero=False)
            up = shared.Projection(r, place.given.width, next(module.parameters()), zero=True)
            if reader is module:
                beside = Beside(down, up, self.activation, place, self.scale)
                made.append(Attachment(place.path, module, beside))
                continue
            passage = _Passage()
            made.append(Attachment(place.reader, reader, Down(down, self.activation, read, passage)))
            made.append(Attachment(place.path, module, Up(up, self.scale, place.given, passage)))
        return made


def _moves(module: nn.Module) -> bool:
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return False
    if any(stride != 1 for stride in module.stride):
        return True
    if isinstance(module.padding, str):
        return module.padding != "same"
    reach = zip(module.kernel_size, module.dilation, module.padding, strict=True)
    return any(dilation * (kernel - 1) != 2 * padding for kernel, dilation, padding in reach)
