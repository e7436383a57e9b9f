"""(IA)³'s adapters: a vector l beside a layer's outputs or inputs, or beside attention's keys and values."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.methods._host import Adapter, Base, adapter_dtype, own_tensors
from lightning_peft.methods._quantized import dense_weight, features, is_quantized
from lightning_peft.methods._sharded import is_sharded
from lightning_peft.methods._split import Part
from lightning_peft.methods._target_modules import CONVS, weight_of
from lightning_peft.methods._targets import is_conv1d
from lightning_peft.methods.errors import PEFTError


def is_scalable(module: nn.Module) -> bool:
    """Whether (IA)³ has an adapter for this kind of module."""
    return isinstance(module, (nn.Linear, nn.MultiheadAttention, *CONVS)) or is_conv1d(module)


def scaled(x: Tensor, factors: Tensor) -> Tensor:
    """x ⊙ factors in x's dtype, as x + x ⊙ (factors - 1).

    That is x to the bit where they are 1, and bf16 keeps more digits of a small factors - 1 than of factors.
    """
    if is_sharded(x):
        part = Part(x)
        return part.again(scaled(part.local(), part.of(factors)))
    return torch.addcmul(x, x, (factors - 1).to(x.dtype))


class Scaling(Adapter):
    """What `LayerScaling` and `AttentionScaling` have in common: some of the module's tensors, times factors."""

    def factors(self, module: nn.Module) -> dict[str, Tensor]:
        """What each of the module's tensors is multiplied with when the adapter is folded in, by name."""
        raise NotImplementedError

    def effective(self, module: nn.Module, name: str, frozen: Tensor) -> Tensor:
        return scaled(frozen, self.factors(module)[name])

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        return {
            name: scaled(dense_weight(module, name, factors.dtype), factors)
            for name, factors in self.factors(module).items()
        }


class LayerScaling(Scaling):
    """Linear, transformers' Conv1D, Conv1d, 2d and 3d: l (out, 1) times the outputs, or l (1, in) times the inputs.

    Args:
        module: the layer.
        on_input: scale its inputs.
        is_read: another module reads its tensors and never calls it, so that they are what is scaled.
    """

    def __init__(self, module: nn.Module, *, on_input: bool, is_read: bool) -> None:
        super().__init__()
        weight = weight_of(module)
        if is_read and is_quantized(module):
            raise PEFTError(
                f"the weight of this {type(module).__name__} is quantized, and another module reads it and would read "
                "its codes; leave it out of quantization (skip_modules)"
            )
        features_in, features_out = _features(module)
        shape = (1, features_in) if on_input else (features_out, 1)
        self.on_input, self.on_split = on_input, not is_read
        self.ia3_l = nn.Parameter(torch.ones(shape, dtype=adapter_dtype(weight), device=weight.device))
        if is_read:
            self.overrides = tuple(self.factors(module))

    def forward(self, base: Base, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if self.overrides:
            return cast(Tensor, base(*args, **kwargs))
        factors = self.ia3_l.view(-1, *(1,) * len(getattr(module, "kernel_size", ())))
        if not self.on_input:
            return scaled(base(*args, **kwargs), factors)
        if args:
            return cast(Tensor, base(scaled(args[0], factors), *args[1:], **kwargs))
        (name, x), *rest = kwargs.items()
        return cast(Tensor, base(**{name: scaled(x, factors)}, **dict(rest)))

    def factors(self, module: nn.Module) -> dict[str, Tensor]:
        factors = {"weight": self._weight_factors(module)}
        if not self.on_input and "bias" in own_tensors(module):
            factors["bias"] = self.ia3_l.flatten()
        return factors

    def _weight_factors(self, module: nn.Module) -> Tensor:
        """l in a shape that multiplies the weight as it is stored."""
        if is_conv1d(module):
            return self.ia3_l.T
        if not isinstance(module, CONVS):
            return self.ia3_l
        spatial = (1,) * len(module.kernel_size)
        if not self.on_input:
            return self.ia3_l.view(-1, 1, *spatial)
        # each group of outputs has the inputs of its group alone
        by_group = self.ia3_l.view(module.groups, -1).repeat_interleave(module.out_channels // module.groups, dim=0)
        return by_group.view(*by_group.shape, *spatial)

    def extra_repr(self) -> str:
        return f"on {'inputs' if self.on_input else 'outputs'}"


class AttentionScaling(Scaling):
    """nn.MultiheadAttention: l_k (dim, 1) times the keys and l_v (dim, 1) times the values, by way of the rows of the
    projections that make them."""

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        weight = weight_of(module, "k_proj_weight" if module.in_proj_weight is None else "in_proj_weight")
        ones = torch.ones(module.embed_dim, 1, dtype=adapter_dtype(weight), device=weight.device)
        self.ia3_k, self.ia3_v = nn.Parameter(ones), nn.Parameter(ones.clone())
        self.overrides = tuple(self.factors(module))

    def factors(self, module: nn.Module) -> dict[str, Tensor]:
        k, v = self.ia3_k, self.ia3_v
        all_three = torch.cat([torch.ones_like(k), k, v])
        known = {
            "in_proj_weight": all_three,
            "in_proj_bias": all_three.flatten(),
            "k_proj_weight": k,
            "v_proj_weight": v,
            "bias_k": k.flatten(),
            "bias_v": v.flatten(),
        }
        return {name: factors for name, factors in known.items() if name in own_tensors(module)}


def _features(module: nn.Module) -> tuple[int, int]:
    """Numbers of inputs and of outputs."""
    return (module.in_channels, module.out_channels) if isinstance(module, CONVS) else features(module)
