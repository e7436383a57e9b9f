"""DoRA: LoRA for a weight's direction, and a trained magnitude."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_peft.methods import _lora_layers as layers
from lightning_peft.methods._quantized import PackedWeight, stored
from lightning_peft.methods._sharded import is_sharded, local_part
from lightning_peft.methods._split import SLICE, SUMMAND, Part
from lightning_peft.methods.lora import LoRA


class _Magnitude(layers.LowRank):
    """Mixed in front of a LoRA layer: W' = m ⊙ (W + s·BA) / ‖W + s·BA‖ for each row of the matrix (…, out, in)."""

    def reset(self, module: nn.Module, init: str) -> None:
        super().reset(module, init)
        # the same norm as forward takes, so that m / norm starts as 1 to the bit
        self.lora_magnitude_vector = nn.Parameter(self.row_norm(stored(module, self.weight_name)).clone())

    @torch.no_grad()
    def row_norm(self, weight: Tensor | PackedWeight) -> Tensor:
        """‖W + s·BA‖ (…, out) in the adapter's dtype, which section 4.3 of the paper keeps out of the gradient."""
        assert isinstance(weight, Tensor)  # only linear layers are packed
        norm: Tensor = torch.linalg.vector_norm(self.as_matrix(weight).to(self.lora_A.dtype) + self.delta(), dim=-1)
        return norm

    def ratio(self, weight: Tensor | PackedWeight) -> Tensor:
        """m / ‖W + s·BA‖ (…, out); a row of zeros has magnitude 0 and keeps it until it is trained."""
        norm = self.row_norm(weight)
        magnitude: Tensor = self.lora_magnitude_vector / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        return magnitude

    def adapted(self, module: nn.Module, weight: Tensor, delta: Tensor) -> Tensor:
        return self.ratio(weight)[..., None] * super().adapted(module, weight, delta)

    def rescaled(self, module: nn.Module, z: Tensor) -> Tensor:
        spatial = (1,) * len(getattr(module, "kernel_size", ()))
        # as the module sees it: another method may train it
        bias = getattr(module, "bias", None)
        change = (self.ratio(stored(module, self.weight_name)) - 1).to(z.dtype).view(-1, *spatial)
        return torch.addcmul(z, change, z if bias is None else z - bias.to(z.dtype).view(-1, *spatial))


class LinearDoRA(_Magnitude, layers.LinearLoRA):
    """Linear and Conv1D, with ‖W + s·BA‖² = ‖W‖² + 2s·Σ B∘(WAᵀ) + s²·Σ B∘(B(AAᵀ)), which forms no BA.

    A packed W is unpacked a part at a time, and nothing of it is kept. Of a split W, sums over inputs are added up.
    """

    @torch.no_grad()
    def row_norm(self, weight: Tensor | PackedWeight) -> Tensor:
        A, B = self.factors()
        if isinstance(weight, PackedWeight):
            return torch.cat([self._row_norm(W, A, B[rows]) for rows, W in weight.rows()])
        return self._row_norm(self.as_matrix(weight), A, B)

    def _row_norm(self, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        own = (B * (B @ (A @ A.T))).sum(-1)
        return (self._base_square(W, A, B) + self.scale**2 * own).clamp_min(0).sqrt()

    def _base_square(self, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """‖W‖² + 2s·Σ B∘(WAᵀ) of each row."""
        square: Tensor = torch.linalg.vector_norm(W, dim=-1, dtype=A.dtype).square()
        return square + 2 * self.scale * (B * (W @ A.to(W.dtype).T).to(B.dtype)).sum(-1)

    def rescaled(self, module: nn.Module, z: Tensor) -> Tensor:
        if not is_sharded(z):
            return super().rescaled(module, z)
        part, bias = Part(z), getattr(module, "bias", None)
        norm = self._norm_of_part(local_part(cast(Tensor, module.weight)), part)
        ratio = part.of(self.lora_magnitude_vector) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        local = turned = part.local()
        if bias is not None:
            # of a sum, each process takes off its share
            shift = Part(bias).local(summed=True) / part.count if part.kind == SUMMAND else Part(bias).local()
            turned = local - shift.to(local.dtype)
        return part.again(torch.addcmul(local, (ratio - 1).to(local.dtype), turned))

    @torch.no_grad()
    def _norm_of_part(self, W: Tensor, part: Part) -> Tensor:
        """‖W + s·BA‖ of the rows that `part` of the output is of; W is what is here of the weight."""
        A, B = self.factors()
        if part.kind == SLICE:
            return self._row_norm(W, A, part.slice(B, 0))
        square = self._base_square(W, part.slice(A), B)
        dist.all_reduce(square, group=part.group)
        return (square + self.scale**2 * (B * (B @ (A @ A.T))).sum(-1)).clamp_min(0).sqrt()


class ConvDoRA(_Magnitude, layers.ConvLoRA):
    """Conv1d, 2d and 3d: a row is all that makes one output channel."""


class EmbeddingDoRA(_Magnitude, layers.EmbeddingLoRA):
    """Embedding: a row of the matrix is one feature of all words, as in HF peft."""


class WeightDoRA(_Magnitude, layers.WeightLoRA):
    """Attention's projections and experts' weights: one magnitude for each output of each expert."""


@dataclass(kw_only=True)
class DoRA(LoRA):
    r"""W' = m ⊙ (W + s·BA) / ‖W + s·BA‖, with m (out,) starting as ‖W‖ and trained beside A and B.

    Fields are LoRA's. At the start the model's outputs are the frozen model's. Source: arXiv 2402.09353, eq. 5 and 11.
    """

    peft_defaults: ClassVar[Mapping[str, Any]] = {**LoRA.peft_defaults, "use_dora": True}
    linear: ClassVar[type[layers.LowRank]] = LinearDoRA
    conv: ClassVar[type[layers.LowRank]] = ConvDoRA
    embedding: ClassVar[type[layers.LowRank]] = EmbeddingDoRA
    weight: ClassVar[type[layers.WeightLoRA]] = WeightDoRA
