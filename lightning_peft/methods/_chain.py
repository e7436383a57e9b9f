"""Several methods' adapters on one module: what they compute together, and what two of them can't both have."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from lightning_peft.methods._host import Adapter, Base
from lightning_peft.methods._lora_layers import LowRank
from lightning_peft.methods._peft_bridge import PeftLayer
from lightning_peft.methods._prefix import PrefixAdapter
from lightning_peft.methods._prompts import PromptAdapter
from lightning_peft.methods.errors import PEFTError

KINDS: dict[str, type[Adapter]] = {"prefix": PrefixAdapter, "prompt": PromptAdapter}
"""Adapters of which a module can have one."""


class Chain(Adapter):
    """Adapters of one module, each of which takes what the ones before it make of the module for the module.

    Args:
        parts: the adapters by the place of their method; no two may claim the same, see `claims`.
    """

    def __init__(self, parts: Mapping[int, Adapter]) -> None:
        super().__init__()
        for place, adapter in parts.items():
            self.add_module(str(place), adapter)
        self.overrides = tuple(name for adapter in parts.values() for name in adapter.overrides)
        self.on_split = all(adapter.on_split for adapter in parts.values())
        self.around_split = all(adapter.around_split for adapter in parts.values())

    def part(self, place: int) -> Adapter | None:
        """The adapter of the method at that place, where it has one here."""
        return cast("Adapter | None", self._modules.get(str(place)))

    def adapters(self) -> Iterator[Adapter]:
        """All of them, in order."""
        return cast("Iterator[Adapter]", iter(self._modules.values()))

    def forward(self, base: Base, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for adapter in self.adapters():
            # what is passed on untouched keeps a layer's own forward, for which LoRA has a faster way
            if type(adapter).forward is not Adapter.forward:
                base = partial(adapter, base, module)
        return base(*args, **kwargs)

    def effective(self, module: nn.Module, name: str, frozen: Tensor) -> Tensor:
        owner = next(adapter for adapter in self.adapters() if name in adapter.overrides)
        return owner.effective(module, name, frozen)

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        # tensors that the module reads are inside of all that acts on its outputs
        for adapter in sorted(self.adapters(), key=lambda adapter: not adapter.overrides):
            found |= adapter.merged(_with(module, found) if found else module)
        return found

    def awaits(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for place, adapter in self._modules.items():
            prefix = f"{place}."
            own = {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}
            found |= {prefix + key: tensor for key, tensor in cast(Adapter, adapter).awaits(own).items()}
        return found

    def before_training(self) -> None:
        for adapter in self.adapters():
            adapter.before_training()


class RowsChain(Chain):
    """A chain with adapters that can't be run on some of the rows alone."""

    def forward_rows(
        self, rows: Sequence[Adapter | None], base: Base, module: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        chains = [row if isinstance(row, Chain) else None for row in rows]
        for place in sorted({int(name) for chain in chains if chain is not None for name in chain._modules}):
            own = [None if chain is None else chain.part(place) for chain in chains]
            first = next(adapter for adapter in own if adapter is not None)
            if type(first).forward_rows is Adapter.forward_rows:
                raise PEFTError(
                    f"adapter_per_row: a {type(first).__name__} and a prefix stand on one {type(module).__name__}, "
                    "which can't be run on some of the rows alone; leave one of them out"
                )
            base = partial(first.forward_rows, own, base, module)
        return base(*args, **kwargs)


def chained(parts: Mapping[int, Adapter]) -> Chain:
    """The chain of `parts`, by the place of their method; virtual tokens come last, as no other knows their ids."""
    parts = dict(sorted(parts.items(), key=lambda part: isinstance(part[1], PromptAdapter)))
    by_rows = any(type(adapter).forward_rows is not Adapter.forward_rows for adapter in parts.values())
    return RowsChain(parts) if by_rows else Chain(parts)


def claims(adapter: Adapter) -> set[str]:
    """What of its module an adapter must have for itself: tensors that it gives or updates, a prefix, a prompt."""
    found: set[str] = set()
    for part in adapter.modules():
        found |= set(part.overrides) if isinstance(part, Adapter) else set()
        found |= {part.weight_name} if isinstance(part, LowRank) else set()
        found |= {name for name, kind in KINDS.items() if isinstance(part, kind)}
        if isinstance(part, PeftLayer):
            # it may stand for the module's tensors or update the weight, and does not say which
            found |= {"weight", *(name.rpartition(".")[2] for name, _ in part.named_parameters())}
    return found


def reads_weights(adapter: Adapter) -> bool:
    """Whether it computes with its module's own weight, so that no other may act on the module before it."""
    return any(isinstance(part, PeftLayer) or hasattr(part, "lora_magnitude_vector") for part in adapter.modules())


def _with(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The module with other tensors of its own; the rest is shared."""
    changed = copy.copy(module)
    for kind in ("_parameters", "_buffers"):
        own = vars(module)[kind]
        vars(changed)[kind] = {name: tensors.get(name, tensor) for name, tensor in own.items()}
    return changed
