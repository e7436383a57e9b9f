"""Layers that some library has quantized already: whose they are, told by where their class or weight is defined."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from lightning_peft.methods._host import own_tensors

LIBRARIES = {
    "aqlm": "AQLM",
    "auto_gptq": "GPTQ",
    "auto_round": "AutoRound",
    "awq": "AWQ",
    "compressed_tensors": "compressed-tensors",
    "eetq": "EETQ",
    "fp_quant": "FP-Quant",
    "gptqmodel": "GPTQ or AWQ",
    "hqq": "HQQ",
    "optimum.quanto": "quanto",
    "quark": "Quark",
    "sinq": "SINQ",
    "spqr_quant": "SpQR",
    "torch.ao.nn.intrinsic.quantized": "torch.ao",
    "torch.ao.nn.quantized": "torch.ao",
    "torchao": "torchao",
    "transformers.integrations.bitnet": "BitNet",
    "transformers.integrations.eetq": "EETQ",
    "transformers.integrations.fbgemm_fp8": "FBGEMM FP8",
    "transformers.integrations.finegrained_fp8": "FP8",
    "transformers.integrations.higgs": "HIGGS",
    "transformers.integrations.metal_quantization": "Metal",
    "transformers.integrations.mxfp4": "MXFP4",
    "transformers.integrations.nvfp4": "NVFP4",
    "vptq": "VPTQ",
}
"""What quantizes otherwise than bitsandbytes, by the package that its layers or tensors come from."""


def other_quantizer(module: nn.Module) -> str | None:
    """The name of the quantization that `module` or a tensor of its own has, where it is not bitsandbytes'."""
    own = [type(module), *(type(tensor) for tensor in own_tensors(module).values())]
    for cls in (base for kind in own for base in kind.__mro__):
        for package, name in LIBRARIES.items():
            if cls.__module__ == package or cls.__module__.startswith(f"{package}."):
                return name
    return None


def is_bitsandbytes(module: nn.Module) -> bool:
    """Whether it is a linear layer of bitsandbytes, ours included."""
    bitsandbytes: Any = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(module, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt))


def is_conv1d_class(cls: type) -> bool:
    """Whether it is transformers' Conv1D, a Linear whose weight is stored as (in, out), or a subclass."""
    return any((base.__module__, base.__name__) == ("transformers.pytorch_utils", "Conv1D") for base in cls.__mro__)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it is exactly a Linear or transformers' Conv1D: a subclass has a forward of its own."""
    own = type(module)
    return own in (nn.Linear, nn.LazyLinear) or (is_conv1d_class(own) and own.__qualname__ == "Conv1D")
