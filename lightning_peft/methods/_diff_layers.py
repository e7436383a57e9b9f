"""Diff pruning's adapters: what is added to each parameter of a module, and which entries of it are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.methods._hard_concrete import Uniform, gates, open_probability, recomputed, seeded
from lightning_peft.methods._host import Adapter, adapter_dtype, own_tensors
from lightning_peft.methods._low_rank import dropout_seed
from lightning_peft.methods.errors import PEFTError

SPARSE = ("indices", "values")
"""What is stored of a module after pruning."""
GATED = ("w", "alpha", "group_alpha")
"""What is stored of each parameter before it."""


class Diff(nn.Module):
    """What is added to one frozen tensor, and to all that are tied to it.

    It has one of three forms: at first z ⊙ w with the gates z, of the tensor's shape; after pruning w where `mask` is
    true, still of the tensor's shape, since an optimizer holds it; loaded for use, the kept entries alone: their places
    `indices` (k,) in the flattened tensor, ascending, and their `values` (k,). The last two are stored by the adapter.

    Args:
        frozen: the tensor.
        alpha_init: α of every gate at the start.
        structured: gate the whole tensor as well.
    """

    w: nn.Parameter | None
    alpha: nn.Parameter | None
    group_alpha: nn.Parameter | None
    mask: Tensor | None
    values: nn.Parameter | None
    indices: Tensor | None

    def __init__(self, frozen: Tensor, alpha_init: float, structured: bool) -> None:
        super().__init__()
        self.shape, self.alpha_init, self.structured = frozen.shape, alpha_init, structured
        self.is_pruned = self.keeps_shapes = False
        self._make_dense(frozen.device, adapter_dtype(frozen), requires_grad=True)

    @property
    def trained(self) -> nn.Parameter:
        """w, or the kept entries of it."""
        trained = self.w if self.w is not None else self.values
        assert trained is not None
        return trained

    def effective(self, frozen: Tensor, training: bool) -> Tensor:
        """The sum of `frozen` and the diff, taken in the diff's dtype where that is higher, in `frozen`'s dtype."""
        if self.values is not None:
            return _add_at(frozen, cast(Tensor, self.indices), self.values)
        if self.is_pruned:
            return recomputed(_add_masked, frozen, self.mask, self.w, *self._alphas())  # type: ignore[arg-type]
        function = partial(_add_gated, seed=None, draw=None)
        if training and torch.compiler.is_compiling():
            # a generator with a seed of its own can't be traced; the compiler recomputes its own random numbers
            function = partial(_add_gated, seed=None, draw=torch.rand_like)
        elif training and not frozen.is_meta:
            function = partial(_add_gated, seed=dropout_seed(1.0, training), draw=None)
        return recomputed(function, frozen, self.w, *self._alphas())  # type: ignore[arg-type]

    def expected_kept(self) -> Tensor:
        """The expected number of entries that are not zero, a scalar; of a pruned tensor the number itself."""
        if not self.is_pruned:
            return recomputed(_expected_open, *self._alphas())
        return cast(Tensor, self.mask).sum() if self.values is None else torch.tensor(len(self.values))

    @torch.no_grad()
    def magnitude(self) -> Tensor:
        """|z ⊙ w| without noise, of the tensor's shape; −1 / |w| where the gate is shut, which comes last, in w's
        order."""
        size = cast(Tensor, self.w).abs()
        product = _product(self._alphas(), None) * size
        return torch.where(product > 0, product, -1 / size)

    @torch.no_grad()
    def prune(self, mask: Tensor) -> None:
        """Keep the entries in `mask`, of the tensor's shape, as they are in evaluation, and set the others to zero."""
        w, alphas = cast(Tensor, self.w), self._alphas()
        w.copy_((_product(alphas, None) * w).masked_fill_(~mask, 0))
        cast(Tensor, self.mask).copy_(mask)
        for alpha in alphas:
            alpha.grad = None  # it has no part in what is trained from here on
        self.is_pruned = True

    def kept(self) -> tuple[Tensor, Tensor]:
        """Of a pruned tensor the places (k,), int64, and the values (k,) of what is kept."""
        if self.values is not None:
            return cast(Tensor, self.indices).long(), self.values.detach()
        places = cast(Tensor, self.mask).flatten().nonzero().squeeze(1)
        return places, cast(Tensor, self.w).detach().flatten()[places]

    @torch.no_grad()
    def keep(self, places: Tensor, values: Tensor) -> None:
        """Take over what `kept` gives."""
        like = self.trained
        places, values = places.to(like.device), values.to(like)
        self.is_pruned = True
        if not self.keeps_shapes:
            self.w = self.alpha = self.group_alpha = self.mask = None
            self.values = nn.Parameter(values.clone(), like.requires_grad)
            self.indices = places.to(index_dtype(self.shape.numel()))
            return
        w, mask = cast(Tensor, self.w), cast(Tensor, self.mask)
        mask.copy_(torch.zeros_like(mask).flatten().index_fill_(0, places, True).view(self.shape))
        w.copy_(torch.zeros_like(w).flatten().index_copy_(0, places, values).view(self.shape))

    def keep_shapes(self) -> None:
        """Take the form that an optimizer can hold throughout training."""
        self.keeps_shapes = True
        if self.values is not None:
            kept = self.kept()
            self._make_dense(self.values.device, self.values.dtype, self.values.requires_grad)
            self.keep(*kept)

    def unprune(self) -> None:
        """Take the form with gates, to be loaded."""
        self.is_pruned = False
        if self.values is not None:
            self._make_dense(self.values.device, self.values.dtype, self.values.requires_grad)

    def _save_to_state_dict(self, *args: Any) -> None:
        if not self.is_pruned:
            super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        if not self.is_pruned:
            super()._load_from_state_dict(*args)

    def _alphas(self) -> list[Tensor]:
        return [alpha for alpha in (self.alpha, self.group_alpha) if alpha is not None]

    def _make_dense(self, device: torch.device, dtype: torch.dtype, requires_grad: bool) -> None:
        def parameter(shape: Sequence[int], value: float) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, value, dtype=dtype, device=device), requires_grad)

        self.w = parameter(self.shape, 0.0)
        self.alpha = parameter(self.shape, self.alpha_init)
        self.group_alpha = parameter((), self.alpha_init) if self.structured else None
        # there from the start, so that the list of buffers is the same before and after pruning
        self.register_buffer("mask", torch.ones(self.shape, dtype=torch.bool, device=device), persistent=False)
        self.values = None
        self.register_buffer("indices", None)


class Diffs(Adapter):
    """The diffs of a module's own parameters, each under its parameter's name.

    A state dict holds two tensors of all that were pruned: `indices` (k,), ascending, of the module's flattened
    parameters one after the other, int32 where that is enough, and `values` (k,).

    Args:
        diffs: by the parameter's name.
        owned: the names without those that are tied to a parameter of an earlier module, which stores their diff.
    """

    def __init__(self, diffs: Mapping[str, Diff], owned: Sequence[str]) -> None:
        super().__init__()
        self.overrides, self.owned = tuple(diffs), tuple(owned)
        for name, diff in diffs.items():
            self.add_module(name, diff)

    def diffs(self) -> dict[str, Diff]:
        return {name: cast(Diff, self._modules[name]) for name in self.overrides}

    def effective(self, module: nn.Module, name: str, frozen: Tensor) -> Tensor:
        return cast(Diff, self._modules[name]).effective(frozen, self.training)

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        tensors = own_tensors(module)
        return {
            name: diff.effective(tensors[name].to(diff.trained.dtype), training=False)
            for name, diff in self.diffs().items()
        }

    def awaits(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._has_gates(given) or not (any(name in given for name in SPARSE) or not self.owned):
            return self._with_gates()
        indices, values = map(given.get, SPARSE)
        if isinstance(indices, Tensor) and isinstance(values, Tensor) and (faults := self._faults(indices, values)):
            raise PEFTError(faults)
        count = indices.numel() if isinstance(indices, Tensor) else 0
        return {name: torch.empty(count, device="meta") for name in SPARSE if self.owned}

    def before_training(self) -> None:
        for diff in self.diffs().values():
            diff.keep_shapes()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        owned = self._owned()
        if not owned or not owned[0].is_pruned:
            return
        kept = [diff.kept() for diff in owned]
        device = kept[0][0].device
        places = [own.to(device) + start for (own, _), start in zip(kept, self._starts(), strict=False)]
        destination[f"{prefix}indices"] = torch.cat(places).to(index_dtype(self._starts()[-1]))
        destination[f"{prefix}values"] = torch.cat([values.to(device) for _, values in kept])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _, _, missing, _, messages = args
        given = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        indices, values = map(given.get, SPARSE)
        if self._has_gates(given):
            for diff in self.diffs().values():
                diff.unprune()
        elif indices is not None and values is not None:
            faults = self._faults(indices, values)
            messages += [f"{prefix}{fault}" for fault in faults]
            if not faults:
                self._keep(indices.long(), values)
            for name in SPARSE:
                del state_dict[f"{prefix}{name}"]
        elif self.owned and self._owned()[0].is_pruned:
            missing += [f"{prefix}{name}" for name in SPARSE if name not in given]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _keep(self, places: Tensor, values: Tensor) -> None:
        starts = torch.tensor(self._starts(), device=places.device)
        counts = torch.searchsorted(places, starts).diff().tolist()
        parts = zip(
            self._owned(),
            self._starts(),
            places.split_with_sizes(counts),
            values.split_with_sizes(counts),
            strict=False,
        )
        for diff, start, own, own_values in parts:
            diff.keep(own - start, own_values)

    def _owned(self) -> list[Diff]:
        return [cast(Diff, self._modules[name]) for name in self.owned]

    def _starts(self) -> list[int]:
        """Where each owned diff begins among the flattened parameters, and where the last one ends."""
        return [0, *accumulate(diff.shape.numel() for diff in self._owned())]

    def _has_gates(self, given: Mapping[str, object]) -> bool:
        return any(f"{name}.{of}" in given for name in self.overrides for of in GATED)

    def _with_gates(self) -> dict[str, Tensor]:
        return {
            f"{name}.{of}": torch.empty(() if of == "group_alpha" else diff.shape, device="meta")
            for name, diff in self.diffs().items()
            for of in GATED
            if of != "group_alpha" or diff.structured
        }

    def _faults(self, indices: Tensor, values: Tensor) -> list[str]:
        """Why they can't be what is kept of the owned diffs."""
        size = self._starts()[-1]
        if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
            return [f"indices is {indices.dtype} of shape {tuple(indices.shape)}; it must be a list of int32 or int64"]
        if values.shape != indices.shape:
            return [f"values is {tuple(values.shape)}; it must have a value for each of the {len(indices)} indices"]
        if len(indices) and not (indices[0] >= 0 and indices[-1] < size and (indices.diff() > 0).all()):
            return [f"indices is no ascending list of places among {size} entries"]
        return []


def index_dtype(size: int) -> torch.dtype:
    """What holds places in a tensor of `size` entries."""
    return torch.int32 if size <= torch.iinfo(torch.int32).max else torch.int64


def all_diffs(attached: Mapping[str, Adapter]) -> list[Diff]:
    """The diffs of the adapters; one that tied tensors share comes once."""
    found = (diff for adapter in attached.values() for diff in cast(Diffs, adapter).diffs().values())
    return list(dict.fromkeys(found))


@torch.no_grad()
def prune(diffs: Sequence[Diff], count: int) -> None:
    """Keep exactly the `count` largest entries of all `diffs`; of equally large ones the earlier."""
    sizes = [diff.shape.numel() for diff in diffs]
    device = diffs[0].trained.device
    magnitude = torch.cat([diff.magnitude().flatten().to(device) for diff in diffs])
    smallest = magnitude.topk(count, sorted=True).values[-1]
    mask = magnitude > smallest
    equal = (magnitude == smallest).nonzero().squeeze(1)
    mask[equal[: count - int(mask.sum())]] = True
    for diff, own in zip(diffs, mask.split_with_sizes(sizes), strict=True):
        diff.prune(own.view(diff.shape).to(diff.trained.device))


def _product(alphas: Iterable[Tensor], uniform: Uniform | None) -> Tensor:
    """The entries' gates, times the whole tensor's where it has one."""
    entries, *group = [gates(alpha, uniform) for alpha in alphas]
    return entries * group[0] if group else entries


def _add_gated(frozen: Tensor, w: Tensor, *alphas: Tensor, seed: int | None, draw: Uniform | None) -> Tensor:
    uniform = draw if seed is None else seeded(seed, w.device)
    return (frozen + _product(alphas, uniform) * w).to(frozen.dtype)


def _add_masked(frozen: Tensor, mask: Tensor, w: Tensor, *_: Tensor) -> Tensor:
    """What gates there were stays in the graph: data parallel training waits for every parameter."""
    return torch.where(mask, frozen + w, frozen).to(frozen.dtype)


def _add_at(frozen: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    flat, places = frozen.reshape(-1), indices.long()
    return flat.index_copy(0, places, (flat[places] + values).to(frozen.dtype)).view(frozen.shape)


def _expected_open(alpha: Tensor, *group: Tensor) -> Tensor:
    expected = open_probability(alpha).sum()
    return expected * open_probability(group[0]) if group else expected
