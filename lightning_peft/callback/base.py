"""What becomes of the base before adapters stand on it: loaded from shards, quantized, cast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_peft.callback.precision import effective_base_dtype
from lightning_peft.injection import saved_modules
from lightning_peft.methods.base import Method
from lightning_peft.methods.errors import PEFTError
from lightning_peft.quantization import Quantization, cast_base, quantize
from lightning_peft.quantization.casting import base_dtype_of
from lightning_peft.quantization.loading import LoadingPolicy
from lightning_peft.strategies.fsdp import PEFTFSDPStrategy


@dataclass(frozen=True)
class Base:
    """How the frozen base is to be stored, and where its weights come from; see `PEFT`."""

    quantization: Quantization | None = None
    dtype: str | None = None
    weights: str | None = None
    device: torch.device | None = None
    """Where layers are quantized and stay; None is where each of them is."""

    @classmethod
    def of(
        cls,
        quantization: str | Quantization | None,
        base_dtype: str | None = None,
        base_weights: str | PathLike[str] | None = None,
    ) -> Base:
        """What the callback's arguments of these names mean.

        Raises:
            PEFTError: with all that is wrong with them.
        """
        if faults := base_faults(quantization, base_dtype, base_weights):
            raise PEFTError(faults)
        made = None if quantization is None else Quantization.of(quantization)
        dtype = None if base_dtype is None else str(base_dtype_of(base_dtype)).removeprefix("torch.")
        return cls(made, dtype, None if base_weights is None else str(base_weights))

    def under(self, trainer: pl.Trainer) -> Base:
        """The same on `trainer`'s device of this rank, with the dtype that its precision means where none was named."""
        dtype = effective_base_dtype(str(trainer.precision), self.quantization, self.torch_dtype)
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        return replace(self, dtype=name, device=trainer.strategy.root_device)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """What `dtype` names."""
        return None if self.dtype is None else base_dtype_of(self.dtype)

    def policy(self, method: Method, skip: Sequence[str]) -> LoadingPolicy:
        """How who loads weights is to store them.

        Args:
            method: what will stand on them; one that starts from what quantization loses needs them dense first.
            skip: names or path endings of modules that are trained whole.
        """
        quantization = None if method.starts_from_error else self.quantization
        return LoadingPolicy(quantization, self.torch_dtype, self.device, tuple(skip))

    def prepare(self, module: pl.LightningModule, method: Method, skip: Sequence[str]) -> None:
        """Give the configured `module` its weights, quantize and cast them, all in place.

        A base that is quantized already, in the way that is asked for, keeps its codes.

        Args:
            module: without adapters.
            method: what will stand on it.
            skip: names or path endings of modules that are trained whole.

        Raises:
            PEFTError: the weights don't fit the module, it is quantized in another way, or `skip` names no module.
        """
        saved, faults = saved_modules(module, skip)
        if faults:
            raise PEFTError(faults)
        ranks = method.error_ranks(module) if self.quantization is not None else {}
        if self.weights is not None:
            from lightning_peft.quantization import load_base  # safetensors

            strategy = None if module._trainer is None else module._trainer.strategy
            pieces = strategy.pieces(module, saved) if isinstance(strategy, PEFTFSDPStrategy) else {}
            load_base(
                module,
                self.weights,
                quantization=self.quantization,
                dtype=self.torch_dtype,
                device="cpu" if self.device is None else self.device,
                skip=list(saved),
                error_ranks=ranks,
                pieces=pieces,
            )
        if self.quantization is not None:
            quantize(module, self.quantization, skip=list(saved), device=self.device, error_ranks=ranks)
        if self.torch_dtype is not None:
            cast_base(module, self.torch_dtype)

    def check_asked(self, other: Base) -> None:
        """Refuse to let `other` hold for a base for which this one holds already; what it leaves open may differ.

        Raises:
            PEFTError: `other` asks for another quantization or dtype.
        """
        pairs = {
            "quantization": (self.quantization, other.quantization),
            "base_dtype": (self.dtype, other.dtype),
        }
        faults = [
            f"{name}: the module's base was prepared with {_shown(ours)}, and not with {_shown(asked)}; make the "
            "module anew"
            for name, (ours, asked) in pairs.items()
            if asked is not None and asked != ours
        ]
        if faults:
            raise PEFTError(faults)


def base_faults(quantization: Any = None, base_dtype: Any = None, base_weights: Any = None) -> list[str]:
    """What is wrong with these arguments of the callback, of which a parser may yet have to make objects; empty where
    nothing is."""
    faults: list[str] = []
    if quantization is not None:
        try:
            if isinstance(quantization, Mapping):
                # a parser may leave a class with its path or take that away
                Quantization(**(quantization["init_args"] if "class_path" in quantization else quantization))
            else:
                Quantization.of(quantization)
        except PEFTError as error:
            faults += error.faults
    if base_dtype is not None:
        try:
            base_dtype_of(base_dtype)
        except PEFTError as error:
            faults += error.faults
    if base_weights is not None and not Path(base_weights).exists():
        faults.append(f"base_weights: there is no file or folder {str(base_weights)!r}")
    return faults


def _shown(value: str | Quantization | None) -> str:
    return repr(value.name if isinstance(value, Quantization) else value)
