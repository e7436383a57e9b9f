"""Tensors of which a process holds a part, and the others the rest."""

from __future__ import annotations

import sys
from typing import Any, cast

from torch import Tensor, nn

from lightning_peft.methods.errors import PEFTError

ON_ONE = "load the checkpoint in one process (load_from_checkpoint), and do it there"


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether it is distributed over processes."""
    # where one is, that has been imported
    distributed: Any = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """All of it, in a tensor of its own where it is sharded: every process has to call it."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """What of it this process holds; all, where it is not sharded."""
    return cast(Tensor, cast(Any, tensor).to_local()) if is_sharded(tensor) else tensor


def refuse_sharded(model: nn.Module, what: str, instead: str) -> None:
    """Raise where `model` has weights of which this process holds a part.

    Args:
        model: any module.
        what: is to be done with it, for the message.
        instead: what to do.

    Raises:
        PEFTError: it has.
    """
    name = next((name for name, parameter in model.named_parameters() if is_sharded(parameter)), None)
    if name is not None:
        raise PEFTError(f"{what}: {name} is sharded, of which this process holds a part; {instead}")
