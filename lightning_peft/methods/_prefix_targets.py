"""Which modules of a model a prefix is for: its attention, and what gives tokens their positions."""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.methods._host import Adapter, Base, own_class
from lightning_peft.methods._prefix import implementation_fault, is_attention, key_shape
from lightning_peft.methods._targets import base_modules, find
from lightning_peft.methods.base import Attachment
from lightning_peft.methods.errors import PEFTError

POSITION_EMBEDDINGS = ("wpe", "position_embeddings", "position_embedding", "embed_positions")


class PositionShift(Adapter):
    """Counts positions from n, as after n real tokens: what HF peft and the papers' code come to, whose cache holds the
    prefix. Stands on rotary embeddings, and on learned ones.

    Args:
        module: what is called with position ids.
        n: the number of virtual tokens.
        argument: the name and place of the position ids among the arguments of its forward.

    Raises:
        PEFTError: the module has no more than n positions.
    """

    def __init__(self, module: nn.Module, n: int, argument: tuple[str, int]) -> None:
        super().__init__()
        self.n, self.argument = n, argument
        limit = _position_count(module)
        if limit is not None and n >= limit:
            raise PEFTError(f"num_virtual_tokens: {n} leaves no position for a token; the model has {limit}")

    def forward(self, base: Base, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._shifted(self.n, base, module, args, kwargs)

    def forward_rows(
        self, rows: Sequence[Adapter | None], base: Base, module: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        """Each row by its own n, so that one row of positions for all becomes one for each."""
        shifts = [row.n if isinstance(row, PositionShift) else 0 for row in rows]
        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return self._shifted(torch.tensor(shifts, device=device)[:, None], base, module, args, kwargs)

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        raise PEFTError("merge: the positions that a prefix takes up can't be folded into a weight")

    def _shifted(
        self, by: int | Tensor, base: Base, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name, place = self.argument
        position_ids = kwargs[name] if name in kwargs else args[place]
        limit = _position_count(module)
        if limit is not None and position_ids.shape[-1] + self.n > limit:
            raise PEFTError(
                f"{position_ids.shape[-1]} tokens and {self.n} virtual ones are more than the model's {limit} "
                f"positions; cut sequences to {limit - self.n} tokens"
            )
        if name in kwargs:
            return base(*args, **{**kwargs, name: position_ids + by})
        return base(*args[:place], position_ids + by, *args[place + 1 :], **kwargs)


def _position_count(module: nn.Module) -> int | None:
    """How many positions there are; None where there is no end to them."""
    if not isinstance(module, nn.Embedding):
        return None
    # RoBERTa counts from behind its padding index, OPT from an offset
    first = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
    return module.num_embeddings - int(first)


def attention_modules(
    model: nn.Module,
    target_modules: str | Sequence[str] | None,
    exclude_modules: str | Sequence[str],
    skip: Container[str],
) -> tuple[dict[str, nn.Module], list[str]]:
    """The attention that a prefix is to stand in front of, by path, and what is wrong with it; None means all of it."""
    modules = dict(base_modules(model))
    if target_modules is None:
        modules = {path: module for path, module in modules.items() if is_attention(module)}
        if not modules:
            return {}, [
                f"target_modules: {type(model).__name__} has no attention that can take a prefix{_other(model)}"
            ]
        target_modules = r".*"
    found, faults = find("target_modules", target_modules, modules, is_attention, exclude_modules, skip, _describe)
    reasons = {reason: path for path, module in reversed(found.items()) if (reason := _reason(module))}
    return found, faults + [f"target_modules: {path}: {reason}" for reason, path in reasons.items()]


def position_shifts(model: nn.Module, attention: Mapping[str, nn.Module], n: int) -> list[Attachment]:
    """What shifts positions by n in every text model, decoder or encoder, that has some of `attention`.

    An encoder-decoder, and a model of images or sounds, is left as it is: HF peft has nothing there to be like, and
    positions may be used up.

    Raises:
        PEFTError: no position is left for a token.
    """
    modules = dict(base_modules(model))
    bodies = {_body(path, modules) for path in attention} - {None}
    made: list[Attachment] = []
    for path, module in modules.items():
        argument = _position_argument(path, module)
        if argument is not None and _body(path, modules) in bodies:
            made.append(Attachment(path, module, PositionShift(module, n, argument)))
    return made


def _body(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The path of the text model, that is no half of an encoder-decoder, which `path` is a part of."""
    models = [outer for outer in _outer(path) if hasattr(type(modules[outer]), "main_input_name")]
    halves = any(getattr(getattr(modules[outer], "config", None), "is_encoder_decoder", False) for outer in models)
    is_text = models and getattr(modules[models[0]], "main_input_name", None) == "input_ids"
    return models[0] if is_text and not halves else None


def _outer(path: str) -> Iterator[str]:
    """Paths of the modules around `path`, from the inside out, the root's last."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _position_argument(path: str, module: nn.Module) -> tuple[str, int] | None:
    """The name and place of the position ids among what the module is called with; None for other modules."""
    forward = own_class(module).forward
    names = list(inspect.signature(forward).parameters)[1:]
    is_embedding = isinstance(module, nn.Embedding) and path.rpartition(".")[2] in POSITION_EMBEDDINGS
    if is_embedding and forward is nn.Embedding.forward:
        return names[0], 0
    if (is_embedding or own_class(module).__name__.endswith("RotaryEmbedding")) and "position_ids" in names:
        return "position_ids", names.index("position_ids")
    return None


def _reason(module: nn.Module) -> str | None:
    """Why this attention takes no prefix."""
    config: Any = module.config
    if fault := implementation_fault(config._attn_implementation):
        return fault
    try:
        key_shape(module)
    except PEFTError as error:
        return error.faults[0]
    return None


def _other(model: nn.Module) -> str:
    """Names attention that there is but that can't take a prefix."""
    names = {
        own_class(module).__name__
        for path, module in base_modules(model)
        if path and "attention" in own_class(module).__name__.lower() and any(True for _ in module.parameters())
    }
    if not names:
        return ""
    return f"; {' and '.join(sorted(names)[:3])} computes it without transformers' attention functions"


def _describe(module: nn.Module) -> str:
    return f"a {own_class(module).__name__} that calls no attention function of transformers"
