"""LoRA's layers: for each kind of module, the shapes of A and B, the update of its output, and the update of its
weight.

Every layer sees its weight as a matrix W (out, in), or as a stack of them (experts, out, in), whatever its shape is
stored as; the starts (`_lora_init`), DoRA's norm and merging are written for that matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.methods._host import Adapter, Base, adapter_dtype, own_tensors
from lightning_peft.methods._lora_init import FROM_ERROR, from_error, from_weight, from_weight_name
from lightning_peft.methods._low_rank import (
    adapted_linear,
    as_written,
    dropout_seed,
    dropped,
    linear_update,
    recomputed_update,
)
from lightning_peft.methods._quantized import dense_weight, features, is_quantized
from lightning_peft.methods._sharded import is_sharded
from lightning_peft.methods._split import update_of_part
from lightning_peft.methods._target_modules import CONVS, weight_of
from lightning_peft.methods._targets import is_conv1d
from lightning_peft.methods.errors import PEFTError


def is_adaptable(module: nn.Module) -> bool:
    """Whether LoRA has a layer for this kind of module."""
    return isinstance(module, (nn.Linear, nn.Embedding, nn.MultiheadAttention, *CONVS)) or is_conv1d(module)


class LowRank(Adapter):
    """A and B beside one weight, and their scale s.

    With an init that starts from W itself, the starting A₀ and B₀ are kept and subtracted (y = Wx + s·BAx − s·B₀A₀x):
    the papers subtract them from W, but then the base and the adapter's file could not restore the model.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    rank_dims: ClassVar[tuple[int, int]] = (0, 1)
    """Which dimension of A, and of B, is the rank."""

    def __init__(
        self, module: nn.Module, r: int, scale: float, dropout: float, init: str, weight_name: str = "weight"
    ) -> None:
        super().__init__()
        self.r, self.scale, self.dropout, self.weight_name = r, scale, dropout, weight_name
        weight = weight_of(module, weight_name)
        self.note(module)
        shape_A, shape_B = self.shapes(module)
        make = partial(torch.zeros, dtype=adapter_dtype(weight), device=weight.device)
        self.lora_A, self.lora_B = nn.Parameter(make(shape_A)), nn.Parameter(make(shape_B))
        self.reset(module, init)

    def note(self, module: nn.Module) -> None:
        """Keep what the other methods need to know of the module's layout."""

    def shapes(self, module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B."""
        raise NotImplementedError

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The module's weight as (…, out, in)."""
        return weight

    def as_weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The inverse of `as_matrix`."""
        return matrix

    @torch.no_grad()
    def reset(self, module: nn.Module, init: str) -> None:
        """Set A and B to their start."""
        if own_tensors(module)[self.weight_name].is_meta:
            return
        if init == FROM_ERROR and is_quantized(module):
            A, B = from_error(module, self.r, self.scale)
        elif from_weight_name(init):
            weight = dense_weight(module, self.weight_name, self.lora_A.dtype)
            A, B = from_weight(init, self.as_matrix(weight), self.r, self.scale)
        else:
            self.reset_randomly(init)
            return
        self.lora_A.copy_(A.reshape(self.lora_A.shape))
        self.lora_B.copy_(B.reshape(self.lora_B.shape))
        if init == FROM_ERROR:
            return
        self.register_buffer("lora_A0", self.lora_A.detach().clone())
        self.register_buffer("lora_B0", self.lora_B.detach().clone())

    def reset_randomly(self, init: str) -> None:
        """A random, "gaussian" or Kaiming-uniform, and B zero."""
        nn.init.zeros_(self.lora_B)
        for A in self.stack_of_A():
            if init == "gaussian":
                nn.init.normal_(A, std=1 / self.r)
            else:
                nn.init.kaiming_uniform_(A, a=math.sqrt(5))

    def stack_of_A(self) -> Iterable[Tensor]:
        """A, or the A of each expert."""
        return [self.lora_A]

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B such that the update is s·BA: the trained ones, with the starting ones beside them to be
        subtracted."""
        if "lora_A0" not in self._buffers:
            return self.lora_A, self.lora_B
        A = torch.cat([self.lora_A, cast(Tensor, self.lora_A0)], self.rank_dims[0])
        return A, torch.cat([self.lora_B, -cast(Tensor, self.lora_B0)], self.rank_dims[1])

    def delta(self) -> Tensor:
        """s·BA as a matrix (…, out, in), in the adapter's dtype."""
        A, B = self.factors()
        return self.scale * (B.flatten(1) @ A.flatten(1))

    def adapted(self, module: nn.Module, weight: Tensor, delta: Tensor) -> Tensor:
        """The adapted matrix (…, out, in) of the frozen `weight` (as stored) and `delta`."""
        return self.as_matrix(weight).to(delta.dtype) + delta

    def forward(self, base: Base, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        x, *_ = (*args, *kwargs.values())
        return self.rescaled(module, self.update(module, base(*args, **kwargs), x))

    def rescaled(self, module: nn.Module, z: Tensor) -> Tensor:
        """What the method makes of the updated output z; LoRA leaves it."""
        return z

    def update(self, module: nn.Module, y: Tensor, x: Tensor) -> Tensor:
        """The updated output, from the frozen module's output y and its input x."""
        raise NotImplementedError

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        weight = dense_weight(module, self.weight_name)
        return {self.weight_name: self.as_weight(self.adapted(module, weight, self.delta()), weight)}

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}" + (f", dropout={self.dropout:g}" if self.dropout else "")


class LinearLoRA(LowRank):
    """Linear, and transformers' Conv1D, which stores W transposed: A (r, in), B (out, r)."""

    on_split = True

    def note(self, module: nn.Module) -> None:
        self.transposed = is_conv1d(module)

    def shapes(self, module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        features_in, features_out = features(module)
        return (self.r, features_in), (features_out, self.r)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed else weight

    def as_weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.T.contiguous() if self.transposed else matrix

    def forward(self, base: Base, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        x, *_ = (*args, *kwargs.values())
        # in this order: torch.compile can't follow the second question
        if torch.compiler.is_compiling() or getattr(base, "__func__", None) is not nn.Linear.forward or is_sharded(x):
            return super().forward(base, module, *args, **kwargs)
        W, b = cast(Tensor, module.weight), cast("Tensor | None", module.bias)
        A, B = self.factors()
        z = adapted_linear(x, W, b, A, B, scale=self.scale, p=self.dropout, training=self.training)
        return self.rescaled(module, z)

    def update(self, module: nn.Module, y: Tensor, x: Tensor) -> Tensor:
        change = update_of_part if is_sharded(y) else linear_update
        return change(y, x, *self.factors(), scale=self.scale, p=self.dropout, training=self.training)


class ConvLoRA(LowRank):
    """Conv1d, 2d and 3d: A (r, in/groups, *kernel) convolves as the layer does, B (out, r/groups, 1, …) mixes channels.

    A has the layer's groups, so that each group of outputs keeps reading its own inputs and the update can be merged.
    """

    def note(self, module: nn.Module) -> None:
        self.groups = cast(nn.Conv2d, module).groups

    def shapes(self, module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        conv = cast(nn.Conv2d, module)
        if self.r % conv.groups:
            raise PEFTError(f"r: {self.r} is no multiple of the layer's {conv.groups} groups; it must be")
        ones = (1,) * len(conv.kernel_size)
        return (self.r, *conv.weight.shape[1:]), (conv.out_channels, self.r // conv.groups, *ones)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def as_weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.reshape(like.shape)

    def reset(self, module: nn.Module, init: str) -> None:
        if self.groups > 1 and from_weight_name(init):
            raise PEFTError(f"init: {init!r} has no meaning for a layer with groups; exclude it or choose 'default'")
        super().reset(module, init)

    def delta(self) -> Tensor:
        A, B = self.factors()
        by_group = B.reshape(self.groups, B.shape[0] // self.groups, -1) @ A.reshape(
            self.groups, A.shape[0] // self.groups, -1
        )
        return self.scale * by_group.flatten(0, 1)

    def update(self, module: nn.Module, y: Tensor, x: Tensor) -> Tensor:
        seed = None if torch.compiler.is_compiling() else dropout_seed(self.dropout, self.training)
        return recomputed_update(y, x, *self.factors(), partial(self._delta_output, cast(nn.Conv2d, module), seed))

    def _delta_output(self, conv: nn.Conv2d, seed: int | None, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        mix = (F.conv1d, F.conv2d, F.conv3d)[len(conv.kernel_size) - 1]
        # _conv_forward applies stride, padding, padding_mode, dilation and groups; checked on torch 2.11 and 2.13
        x = F.dropout(x, self.dropout) if _drops_traced(self) else dropped(x, self.dropout, seed)
        return self.scale * mix(conv._conv_forward(x, A, None), B, groups=self.groups)


class EmbeddingLoRA(LowRank):
    """Embedding: A (r, vocabulary) starts at zero and is looked up, B (dim, r) starts normal and maps rows to outputs.

    An `embed_scale`, by which some transformers embeddings multiply their rows, multiplies the update too; with
    `max_norm` the adapted rows are the ones whose norm is bounded, and the frozen ones are left as they are (without
    the adapter, torch scales them in place, as it does in any embedding with `max_norm`).
    """

    def reset_randomly(self, init: str) -> None:
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def shapes(self, module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        embedding = cast(nn.Embedding, module)
        return (self.r, embedding.num_embeddings), (embedding.embedding_dim, self.r)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def as_weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.T.contiguous()

    def forward(self, base: Base, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        embedding = cast(nn.Embedding, module)
        ids, *_ = (*args, *kwargs.values())
        if embedding.max_norm is None:
            return super().forward(base, module, *args, **kwargs)
        rows = self.rescaled(module, self.update(module, F.embedding(ids, embedding.weight), ids))
        norm = torch.linalg.vector_norm(rows, embedding.norm_type, dim=-1, keepdim=True)
        return torch.where(norm > embedding.max_norm, rows * (embedding.max_norm / (norm + 1e-7)), rows)

    def update(self, module: nn.Module, y: Tensor, x: Tensor) -> Tensor:
        return recomputed_update(y, x, *self.factors(), partial(self._delta_output, cast(nn.Embedding, module)))

    def _delta_output(self, embedding: nn.Embedding, ids: Tensor, A: Tensor, B: Tensor) -> Tensor:
        rows = F.embedding(ids, A.T, embedding.padding_idx, scale_grad_by_freq=embedding.scale_grad_by_freq)
        return rows @ B.T * (self.scale * getattr(embedding, "embed_scale", 1.0))


class WeightLoRA(LowRank):
    """A weight that no layer of its own multiplies with: attention's projections (out, in), experts' (experts, out,
    in).

    The module reads W + s·BA instead of W; A (…, r, in), B (…, out, r).
    """

    rank_dims = (-2, -1)

    def note(self, module: nn.Module) -> None:
        if is_quantized(module):
            raise PEFTError(
                f"the {self.weight_name} of this {type(module).__name__} is quantized, and would be read as its codes; "
                "adapt the layer itself (target_modules), or leave it out of quantization (skip_modules)"
            )
        # transformers marks experts that are stored as (experts, in, out)
        is_stack = own_tensors(module)[self.weight_name].dim() == 3
        self.stored_transposed = is_stack and bool(getattr(module, "is_transposed", False))

    def stack_of_A(self) -> Iterable[Tensor]:
        return self.lora_A if self.lora_A.dim() == 3 else [self.lora_A]

    def shapes(self, module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        weight = own_tensors(module)[self.weight_name]
        *experts, features_out, features_in = self.as_matrix(weight).shape
        return (*experts, self.r, features_in), (*experts, features_out, self.r)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.mT if self.stored_transposed else weight

    def as_weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.mT.contiguous() if self.stored_transposed else matrix

    def delta(self) -> Tensor:
        A, B = self.factors()
        return self.scale * (B @ A)

    def effective_weight(self, module: nn.Module, frozen: Tensor) -> Tensor:
        """The adapted weight, as stored, in the frozen one's dtype."""
        with as_written(frozen.device.type):
            return self.as_weight(self.adapted(module, frozen, self.delta()), frozen).to(frozen.dtype)


class WeightsLoRA(Adapter):
    """The `WeightLoRA`s of one module, each under its weight's name."""

    def __init__(self, module: nn.Module, options: Mapping[str, Mapping[str, Any]], kind: type[WeightLoRA]) -> None:
        super().__init__()
        if any(option["dropout"] for option in options.values()):
            raise PEFTError(
                f"dropout: a {type(module).__name__} multiplies its input with the weights itself, where dropout can't "
                "reach; set it to 0 or exclude the module"
            )
        self.overrides = tuple(options)
        for name, option in options.items():
            self.add_module(name, kind(module, **option, weight_name=name))

    def effective(self, module: nn.Module, name: str, frozen: Tensor) -> Tensor:
        return cast(WeightLoRA, self.get_submodule(name)).effective_weight(module, frozen)

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        parts = [cast(WeightLoRA, self.get_submodule(name)) for name in self.overrides]
        return {name: tensor for part in parts for name, tensor in part.merged(module).items()}


def _drops_traced(adapter: LowRank) -> bool:
    return adapter.training and adapter.dropout > 0 and torch.compiler.is_compiling()
