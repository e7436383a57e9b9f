"""BitFit's adapters: trained copies of a module's biases, or a bias for a layer that has none; and what a bias is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.methods._host import Adapter, Base, adapter_dtype, own_tensors
from lightning_peft.methods._quantized import features
from lightning_peft.methods._sharded import gathered, is_sharded
from lightning_peft.methods._split import Part
from lightning_peft.methods._target_modules import CONVS, weight_of
from lightning_peft.methods._targets import is_conv1d
from lightning_peft.methods.errors import PEFTError

NO_BIASES = frozenset({"position_bias", "relative_attention_bias", "e_score_correction_bias", "expert_bias"})
"""Parameters of transformers 5.23 that are tables of positions, or that choose experts and get no gradient."""


def bias_names(module: nn.Module) -> list[str]:
    """Names of the module's own parameters that are biases."""
    recurrent = isinstance(module, (nn.RNNBase, nn.RNNCellBase))
    return [
        name
        for name, parameter in module._parameters.items()
        if parameter is not None
        and name not in NO_BIASES
        and (name == "bias" or name.endswith("_bias") or (recurrent and name.startswith("bias_")))
    ]


def lacks_bias(module: nn.Module) -> bool:
    """Whether it is a layer that could have a bias and has none."""
    return (isinstance(module, (nn.Linear, *CONVS)) or is_conv1d(module)) and getattr(module, "bias", None) is None


class Biases(Adapter):
    """Trained copies of a module's biases, under their names, which the module reads instead of its own.

    They are kept in fp32 over a base of lower precision, and read in the base's dtype.

    Args:
        module: whose biases they are.
        names: of the biases.
        shared: copies already made, by the id of the original, so that tied biases stay tied.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], shared: dict[int, nn.Parameter]) -> None:
        super().__init__()
        self.overrides, self.on_split = tuple(names), True
        for name in names:
            bias = weight_of(module, name)
            if id(bias) not in shared:
                shared[id(bias)] = nn.Parameter(gathered(bias.detach()).clone().to(adapter_dtype(bias)))
            self.register_parameter(name, shared[id(bias)])

    def effective(self, module: nn.Module, name: str, frozen: Tensor) -> Tensor:
        bias = own_tensors(self)[name].to(frozen.dtype)
        if not is_sharded(frozen):
            return bias
        part = Part(frozen)
        return part.again(part.of(bias))

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        return own_tensors(self)


class AddedBias(Adapter):
    """A bias (out,) for a Linear, Conv1D, Conv1d, 2d or 3d without one; it starts at 0."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        weight = weight_of(module)
        out = module.out_channels if isinstance(module, CONVS) else features(module)[1]
        self.bias = nn.Parameter(torch.zeros(out, dtype=adapter_dtype(weight), device=weight.device))

    def forward(self, base: Base, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        y = cast(Tensor, base(*args, **kwargs))
        return y + self.bias.to(y.dtype).view(-1, *(1,) * len(getattr(module, "kernel_size", ())))

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        raise PEFTError(
            f"BitFit gave a {type(module).__name__} a bias, which the base has no place for; keep the adapter, or "
            "train without add_missing"
        )
