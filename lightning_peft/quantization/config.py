"""How a base is quantized: `Quantization`, and the short names for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning_peft.methods.errors import PEFTError, suggestion

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

TYPES = ("nf4", "fp4", "int8")
NAMES: dict[str, dict[str, Any]] = {
    "nf4": {"type": "nf4"},
    "nf4-dq": {"type": "nf4", "double_quantization": True},
    "fp4": {"type": "fp4"},
    "fp4-dq": {"type": "fp4", "double_quantization": True},
    "int8": {"type": "int8"},
}
"""The fields that each short name stands for."""
COMPUTE_DTYPES = ("bfloat16", "float16", "float32")
STORAGE_DTYPES = ("uint8", "bfloat16", "float16")
PACKING = 'needs bitsandbytes; pip install "lightning-peft[quantization]"'


def can_pack() -> bool:
    """Whether bitsandbytes is installed, without importing it."""
    return find_spec("bitsandbytes") is not None


@dataclass(frozen=True)
class Quantization:
    """How the frozen linear layers are stored.

    4-bit weights are coded in blocks of 64 with one fp32 scale each (QLoRA, arXiv 2305.14314), int8 weights by row with
    one fp32 scale each (LLM.int8(), arXiv 2208.07339; the activations stay in their dtype).

    Raises:
        PEFTError: with every field that breaks its rule, or because bitsandbytes is not installed.
    """

    type: str = "nf4"
    """"nf4" (4 bits, quantiles of a normal distribution), "fp4" (4-bit floats) or "int8"."""
    double_quantization: bool = False
    """Store the scales of 4-bit blocks in 8 bits, themselves in blocks of 256: 4.13 instead of 4.5 bits a weight."""
    compute_dtype: str | None = None
    """What 4-bit layers multiply in: "bfloat16", "float16" or "float32"; by default the dtype of their input, or that
    of autocast where it is on."""
    storage_dtype: str = "uint8"
    """The dtype that packed 4-bit weights claim to have: "uint8", or for FSDP's flat shards that of the mixed
    precision's parameters, "bfloat16" or "float16"."""
    skip_modules: Sequence[str] = ()
    """Names or path endings of modules to leave as they are."""

    def __post_init__(self) -> None:
        skip = self.skip_modules
        if isinstance(skip, (list, tuple)):
            object.__setattr__(self, "skip_modules", tuple(skip))
        if faults := self.faults():
            raise PEFTError([f"Quantization.{fault}" for fault in faults])
        if not can_pack():
            raise PEFTError(f"quantization: {self.name} {PACKING}")

    def faults(self) -> list[str]:
        """What is wrong with the fields."""
        found = []
        if self.type not in TYPES:
            hint = (
                "; it is 'nf4' or 'fp4' with double_quantization: true"
                if self.type in ("nf4-dq", "fp4-dq")
                else suggestion(str(self.type), TYPES)
            )
            found.append(f"type: {self.type!r} is none of {', '.join(TYPES)}{hint}")
        double: object = self.double_quantization  # of any type, from a file
        if not isinstance(double, bool):
            found.append(f"double_quantization: {self.double_quantization!r} is neither true nor false")
        if self.compute_dtype is not None and self.compute_dtype not in COMPUTE_DTYPES:
            found.append(
                f"compute_dtype: {self.compute_dtype!r} is none of {', '.join(COMPUTE_DTYPES)}"
                f"{suggestion(str(self.compute_dtype), COMPUTE_DTYPES)}"
            )
        if self.storage_dtype not in STORAGE_DTYPES:
            why = (
                "; FSDP would cast it to its mixed precision's dtype, which destroys packed bits"
                if self.storage_dtype in ("float32", "float64")
                else suggestion(str(self.storage_dtype), STORAGE_DTYPES)
            )
            found.append(f"storage_dtype: {self.storage_dtype!r} is none of {', '.join(STORAGE_DTYPES)}{why}")
        if not isinstance(self.skip_modules, tuple) or not all(
            isinstance(name, str) and name for name in self.skip_modules
        ):
            found.append(f"skip_modules: {self.skip_modules!r} is no list of names")
        if self.type == "int8":
            if self.double_quantization is True:
                found.append("double_quantization: int8 has one scale a row, too few to be quantized; leave it out")
            if self.compute_dtype is not None:
                found.append(
                    f"compute_dtype: int8 can't do {self.compute_dtype!r}, it multiplies in the dtype of its input; "
                    "leave it out, and set the Trainer's precision or base_dtype"
                )
            if self.storage_dtype in ("bfloat16", "float16"):
                found.append(
                    f"storage_dtype: int8 can't do {self.storage_dtype!r}, its weights are int8 tensors; leave it out"
                )
        return found

    @classmethod
    def of(cls, given: str | Quantization) -> Quantization:
        """The configuration that a short name stands for; one that is given comes back as it is.

        Raises:
            PEFTError: no such name, or what the class raises.
        """
        if isinstance(given, cls):
            return given
        if not isinstance(given, str) or given not in NAMES:
            hint = suggestion(given, NAMES) if isinstance(given, str) else "; or give a Quantization"
            raise PEFTError(f"quantization: {given!r} is none of {', '.join(NAMES)}{hint}")
        return cls(**NAMES[given])

    @property
    def name(self) -> str:
        """The short name: type, and whether the scales are quantized."""
        return f"{self.type}-dq" if self.double_quantization else self.type

    def fields(self) -> dict[str, Any]:
        """The fields in plain types, from which `Quantization(**fields)` makes an equal one."""
        return {**asdict(self), "skip_modules": list(self.skip_modules)}

    def bits_and_bytes_config(self, skip: Sequence[str] = ()) -> BitsAndBytesConfig:
        """The same for transformers' `from_pretrained(quantization_config=…)`.

        transformers leaves the output head dense by itself only while there is no name to skip: `skip` must hold it
        where there is one. Its layers multiply in float32 until `guard` has given them this configuration.

        Args:
            skip: names of modules to leave dense beside `skip_modules`.
        """
        import torch
        from transformers import BitsAndBytesConfig

        names = [*self.skip_modules, *skip] or None
        if self.type == "int8":
            return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
                load_in_8bit=True, llm_int8_skip_modules=names, llm_int8_threshold=0.0
            )
        return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type=self.type,
            bnb_4bit_use_double_quant=self.double_quantization,
            bnb_4bit_compute_dtype=getattr(torch, self.compute_dtype or "float32"),
            bnb_4bit_quant_storage=getattr(torch, self.storage_dtype),
            llm_int8_skip_modules=names,
        )
