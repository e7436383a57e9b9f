"""How weights that are being loaded shall be stored: said by who runs a model, and asked by who loads one.

So a task can load a base quantized, and on the right device, and need not know who wants it so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lightning_peft.quantization.config import Quantization


@dataclass(frozen=True)
class LoadingPolicy:
    """What is wanted of a base that is loaded while it holds."""

    quantization: Quantization | None = None
    """None loads the weights as they are stored."""
    base_dtype: torch.dtype | None = None
    """Of floating-point tensors that are not quantized; None is the stored one."""
    device: torch.device | None = None
    """Where quantized weights are to be; None is wherever the loader puts them."""
    skip: tuple[str, ...] = ()
    """Names or path endings of modules that are not to be quantized, since they are trained whole."""
    shapes_only: bool = False
    """No weight is read: models are on the meta device, and of what they hold shapes and dtypes alone count."""


_policy: ContextVar[LoadingPolicy | None] = ContextVar("lightning_peft.loading", default=None)


@contextmanager
def loading(policy: LoadingPolicy) -> Iterator[None]:
    """Let `policy` hold for what is loaded inside of the `with`, in this thread."""
    token = _policy.set(policy)
    try:
        yield
    finally:
        _policy.reset(token)


def loading_policy() -> LoadingPolicy | None:
    """The policy that holds; None where nobody said how to load."""
    return _policy.get()
