"""AdaLoRA's layers: s·B Λ A beside a weight, how much each singular value in Λ matters to the loss, and which ones
stay."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.methods import _lora_layers as layers
from lightning_peft.methods._host import Adapter
from lightning_peft.methods._low_rank import as_written

TRAINED = ("lora_A", "lora_E", "lora_B")
DEVIATION = 0.02
"""Of A and B at the start, as in HF peft; Λ is zero."""


class SVD(layers.LowRank):
    """Mixed in front of a LoRA layer: A (r, in), the diagonal E (r, 1) of Λ, and B (out, r), in HF peft's names.

    Beside them stand `mask` (r,), which singular values the last allocation kept, and running averages of the
    importance of every element; as buffers, so that a checkpoint holds them.
    """

    lora_E: nn.Parameter
    mask: Tensor

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module, init="default", **options)
        self.lora_E = nn.Parameter(self.lora_A.new_zeros(self.r, 1))
        self.register_buffer("mask", torch.ones(self.r, dtype=torch.bool, device=self.lora_A.device))
        for name in TRAINED:
            for average in ("exp_avg_ipt", "exp_avg_unc"):
                self.register_buffer(f"{average}_{name}", torch.zeros_like(self.get_parameter(name)))

    def reset_randomly(self, init: str) -> None:
        nn.init.normal_(self.lora_A, std=DEVIATION)
        nn.init.normal_(self.lora_B, std=DEVIATION)

    def factors(self) -> tuple[Tensor, Tensor]:
        """ΛA and B: the update is s·B(ΛA), for which LoRA's layers keep nothing but x and these."""
        return self.lora_A * self.lora_E, self.lora_B

    def orthogonality(self) -> Tensor:
        """‖AAᵀ − I‖²_F + ‖BᵀB − I‖²_F, a scalar in the adapter's dtype, under autocast too."""
        with as_written(self.lora_A.device.type):
            identity = torch.eye(self.r, dtype=self.lora_A.dtype, device=self.lora_A.device)
            A, B = self.lora_A, self.lora_B
            return (A @ A.T - identity).square().sum() + (B.T @ B - identity).square().sum()

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """Take the sensitivity |w·∂L/∂w| of every element into the averages; without a gradient it is 0."""
        for parameter, mean, deviation in self._averages():
            grad = parameter.grad
            sensitivity = torch.zeros_like(parameter) if grad is None else (parameter * grad).abs_()
            mean.lerp_(sensitivity, 1 - beta1)
            deviation.lerp_(sensitivity.sub_(mean).abs_(), 1 - beta2)

    def importance(self) -> Tensor:
        """Of each singular value (r,): its own score, and the means of those of its row of A and its column of B."""
        A, E, B = (mean * deviation for _, mean, deviation in self._averages())
        return E.squeeze(1) + A.mean(1) + B.mean(0)

    @torch.no_grad()
    def keep(self, mask: Tensor) -> None:
        """Set the singular values that are not in `mask` (r,) to zero."""
        self.mask.copy_(mask)
        self.lora_E.masked_fill_(~self.mask.unsqueeze(1), 0.0)

    def kept(self) -> Tensor:
        """Which ranks (r,) have to be stored; one that was pruned can have grown anew since the last allocation."""
        return self.mask | (self.lora_E.detach().squeeze(1) != 0)

    def _averages(self) -> Iterator[tuple[nn.Parameter, Tensor, Tensor]]:
        for name in TRAINED:
            yield (
                self.get_parameter(name),
                self.get_buffer(f"exp_avg_ipt_{name}"),
                self.get_buffer(f"exp_avg_unc_{name}"),
            )


class LinearSVD(SVD, layers.LinearLoRA):
    """Linear, and transformers' Conv1D."""


class WeightSVD(SVD, layers.WeightLoRA):
    """The projections (out, in) of nn.MultiheadAttention."""


class Schedule(NamedTuple):
    """When the budget falls, in optimizer steps, the first of which is 1."""

    tinit: int
    """The last step of the whole budget."""
    last: int
    """The step from which on the ranks are final."""

    def budget(self, step: int, start: int, target: int) -> int:
        """How many singular values stay after `step`: `start` until tinit, then a cubic fall to `target`."""
        part_left = 1 - (min(step, self.last) - self.tinit) / (self.last - self.tinit)
        return int((start - target) * min(part_left, 1.0) ** 3 + target)


def schedule(tinit: int | None, tfinal: int | None, total: float) -> Schedule:
    """The schedule over `total` steps: by default a tenth of them before it and three tenths after it.

    The averages have to settle before they are asked, and what stays has to make up for what was taken; the paper's own
    runs take about a tenth for the one, and a third to a half for the other.
    """
    before = math.floor(total / 10) if tinit is None else tinit
    after = math.floor(total * 3 / 10) if tfinal is None else tfinal
    return Schedule(before, math.floor(total) - after)


@torch.no_grad()
def allocate(parts: Sequence[SVD], budget: int) -> None:
    """Keep the `budget` most important singular values of all `parts`, which have one rank, and set the rest to zero.

    Of equally important ones the earlier ranks stay, so that never more or fewer are kept.
    """
    device = parts[0].mask.device
    scores = torch.stack([part.importance().to(device) for part in parts], dim=1)
    order = scores.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool)
    mask[order[:budget]] = True
    for part, own in zip(parts, mask.view_as(scores).unbind(1), strict=True):
        part.keep(own)


def parts_of(attached: Mapping[str, Adapter]) -> dict[str, SVD]:
    """Every matrix's layer, by the path of its module, or of the weight in an attention."""
    return {
        ".".join(filter(None, (path, name))): part
        for path, adapter in attached.items()
        for name, part in adapter.named_modules()
        if isinstance(part, SVD)
    }
