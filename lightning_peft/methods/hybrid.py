"""Hybrid: several methods on one model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from lightning_peft.methods._chain import Chain, chained, claims, reads_weights
from lightning_peft.methods._host import Adapter
from lightning_peft.methods.base import Attachment, Method, PeftRoot, PeftTensor
from lightning_peft.methods.errors import PEFTError

V = TypeVar("V")


@dataclass(kw_only=True)
class Hybrid(Method):
    r"""y = (a_k ∘ … ∘ a_1)(module)(x) with the adapters a_i that the methods stand on one module, in their order.

    All are trained together, each parameter once. Trained copies of the module's own tensors are read inside of all
    a_i. At the start the model's outputs are the frozen model's if they are so under each method alone.

    Raises:
        PEFTError: there is no method, or one of them is none.
    """

    methods: list[Method]
    """The methods, 1 or more. Where two of them stand on one module, the later one gets the earlier one's outputs."""

    learning_rate: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        # these are of a class elsewhere, and of the parts here
        only = self.methods[0] if len(self.methods) == 1 else Method
        vars(self).update(
            identity_at_start=all(part.identity_at_start for part in self.methods),
            prunes=any(part.prunes for part in self.methods),
            starts_from_error=any(part.starts_from_error for part in self.methods),
            peft_defaults=only.peft_defaults,
            peft_prefix=only.peft_prefix,
        )

    def faults(self) -> list[str]:
        """What is wrong with the fields."""
        if not isinstance(self.methods, list) or not self.methods:
            return [f"methods: {self.methods!r} is no list of methods; give one, such as [LoRA(r=8), BitFit()]"]
        if any(isinstance(part, Mapping) for part in self.methods):
            # the command line asks before it has made the parts
            raise TypeError("Hybrid.methods: a mapping is no method yet")
        return [
            f"methods: {part!r}, at place {place}, is no method; give an instance, such as LoRA(r=8)"
            for place, part in enumerate(self.methods)
            if not isinstance(part, Method)
        ]

    def attachments(self, model: nn.Module, skip: Container[str]) -> Sequence[Attachment]:
        """One chain for each module that any of the methods stands on."""
        faults: list[str] = []
        first: dict[int, tuple[str, nn.Module]] = {}
        parts: dict[int, dict[int, Adapter]] = {}
        for place, method in enumerate(self.methods):
            try:
                made = method.attachments(model, skip)
            except PEFTError as error:
                faults += [f"methods: {fault}" for fault in error.faults]
                continue
            for path, module, adapter in made:
                first.setdefault(id(module), (path, module))
                parts.setdefault(id(module), {})[place] = adapter
        for key, adapters in parts.items():
            faults += self._conflicts(first[key][0], adapters)
        if faults:
            raise PEFTError([f"Hybrid.{fault}" for fault in dict.fromkeys(faults)])
        return [Attachment(*first[key], chained(adapters)) for key, adapters in parts.items()]

    def error_ranks(self, model: nn.Module) -> dict[str, int]:
        """Those of all parts, no two of which update one weight."""
        return {path: rank for part in self.methods for path, rank in part.error_ranks(model).items()}

    def learning_rate_factors(self, attached: Mapping[str, Adapter]) -> dict[nn.Parameter, float]:
        """Those of all parts."""
        return {
            parameter: factor
            for part, own in self._parts(attached)
            for parameter, factor in part.learning_rate_factors(own).items()
        }

    def penalty(self, attached: Mapping[str, Adapter]) -> Tensor | None:
        """The sum of the parts' terms."""
        terms = [term for part, own in self._parts(attached) if (term := part.penalty(own)) is not None]
        if not terms:
            return None
        total = terms[0]
        for term in terms[1:]:
            total = total + term.to(total.device)
        return total

    def start(self, attached: Mapping[str, Adapter], total_steps: float) -> None:
        """Every part's.

        Raises:
            PEFTError: with the reasons of all parts that can't be trained for that long.
        """
        faults: list[str] = []
        for part, own in self._parts(attached):
            try:
                part.start(own, total_steps)
            except PEFTError as error:
                faults += error.faults
        if faults:
            raise PEFTError(faults)

    def after_step(self, attached: Mapping[str, Adapter], step: int, total_steps: float) -> None:
        """Every part's."""
        for part, own in self._parts(attached):
            part.after_step(own, step, total_steps)

    def report(self, attached: Mapping[str, Adapter]) -> dict[str, float]:
        """What the parts report; a name that several have gets the part's place behind it."""
        return _together([part.report(own) for part, own in self._parts(attached)])

    def report_layers(self, attached: Mapping[str, Adapter]) -> dict[str, dict[str, float]]:
        """The same of each layer."""
        return _together([part.report_layers(own) for part, own in self._parts(attached)])

    def fields(self) -> dict[str, Any]:
        """The parts as a checkpoint stores a method: `{"name": "LoRA", "fields": {"r": 8, …}}`."""
        return {"methods": [{"name": type(part).__name__, "fields": part.fields()} for part in self.methods]}

    def to_peft(self, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, Any]:
        """The only part's.

        Raises:
            PEFTError: there are several, and HF peft has one method in a directory.
        """
        if len(self.methods) > 1:
            names = ", ".join(type(part).__name__ for part in self.methods)
            raise PEFTError(
                f"Hybrid: HF peft has one method in a directory, and this adapter has {names}; merge(model) and save "
                "the whole model instead, where they can be merged"
            )
        [(part, own)] = self._parts(attached)
        return part.to_peft(root, own)

    def peft_tensors(self, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, PeftTensor]:
        """The only part's."""
        [(part, own)] = self._parts(attached)
        return part.peft_tensors(root, own)

    def _parts(self, attached: Mapping[str, Adapter]) -> Iterator[tuple[Method, dict[str, Adapter]]]:
        """Each part with its own adapters."""
        chains = {path: adapter for path, adapter in attached.items() if isinstance(adapter, Chain)}
        for place, part in enumerate(self.methods):
            yield part, {path: own for path, chain in chains.items() if (own := chain.part(place)) is not None}

    def _conflicts(self, path: str, adapters: Mapping[int, Adapter]) -> list[str]:
        owner: dict[str, int] = {}
        faults = []
        for place, adapter in adapters.items():
            owned = [claim for claim in sorted(claims(adapter)) if owner.setdefault(claim, place) != place]
            faults += [
                f"methods: {self._name(owner[claim])} and {self._name(place)} would both set the {claim} of {path}; "
                "give them different target_modules, or leave one of them out"
                for claim in owned
            ]
            first = next(iter(adapters))
            if place != first and not owned and reads_weights(adapter):
                faults.append(
                    f"methods: {self._name(place)} computes with {path}'s own weight, and can't come after "
                    f"{self._name(first)}; list it first"
                )
        return faults

    def _name(self, place: int) -> str:
        return f"{type(self.methods[place]).__name__} (place {place})"


def _together(reports: Sequence[Mapping[str, V]]) -> dict[str, V]:
    """What the parts report; a name that several have gets the part's place behind it."""
    counts = Counter(name for report in reports for name in report)
    return {
        name if counts[name] == 1 else f"{name}_{place}": value
        for place, report in enumerate(reports)
        for name, value in report.items()
    }
