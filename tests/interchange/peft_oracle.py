"""The installed HF peft, asked what it would write for an adapter of ours, and what it computes from a directory."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft import DoRA, LoRA
from lightning_peft.injection import adapters
from tests.methods.models import MODELS

TOLERANCE = 1e-5


def base_of(name: str) -> nn.Module:
    """The same model each time, in eval mode."""
    torch.manual_seed(1)
    return MODELS[name]().eval()


def output_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output if isinstance(output, Tensor) else output.logits


def moved(model: nn.Module, deviation: float = 0.1, adapter_name: str = "default") -> nn.Module:
    """`model` with every trained tensor of ours away from its start, the output layer of an attention's excepted."""
    with torch.no_grad():
        for path, adapter in adapters(model, adapter_name).items():
            for parameter in adapter.parameters():
                if not path.endswith("attn.out_proj"):
                    parameter.add_(torch.randn_like(parameter) * deviation)
    return model


def moved_theirs(model: nn.Module, deviation: float = 0.1) -> nn.Module:
    """peft's model with every trained tensor away from its start, the output layer of an attention's excepted."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".out_proj." not in name:
                parameter.add_(torch.randn_like(parameter) * deviation)
    return model


def config_of(method: LoRA, **more: Any) -> peft.LoraConfig:
    """peft's words for our method, written by hand."""
    return peft.LoraConfig(
        r=method.r,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=method.target_modules,
        target_parameters=method.target_parameters or None,
        exclude_modules=method.exclude_modules or None,
        rank_pattern=dict(method.rank_pattern),
        alpha_pattern=dict(method.alpha_pattern),
        use_rslora=method.rslora,
        init_lora_weights={"default": True}.get(method.init, method.init),
        use_dora=isinstance(method, DoRA),
        **more,
    )


def peft_model(base: nn.Module, config: peft.LoraConfig) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        warnings.filterwarnings("ignore", message="The following .*_pattern keys")
        warnings.filterwarnings("ignore", message="LoRA adapter added to ConvNd layer with groups")
        model: nn.Module = peft.get_peft_model(base, config).eval()
    return model


def saved_by_peft(model: Any, folder: Path) -> Path:
    """The directory that peft writes, without the frozen embeddings that it may add."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not find a config file")
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def loaded_by_peft(base: nn.Module, folder: Path) -> nn.Module:
    """peft's model of the directory over `base`; any warning of missing keys is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        warnings.filterwarnings("ignore", message="LoRA adapter added to ConvNd layer with groups")
        model: nn.Module = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    return model


def keys_and_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in load_file(folder / "adapter_model.safetensors").items()}


def config_in(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


def edited(folder: Path, **fields: Any) -> Path:
    """The directory with other values of these fields."""
    (folder / "adapter_config.json").write_text(json.dumps(config_in(folder) | fields))
    return folder


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def written(model: nn.Module, folder: Path, deviation: float = 0.1) -> Path:
    """The directory that peft writes for `model` after it was trained a bit."""
    return saved_by_peft(moved_theirs(model, deviation), folder)


def plain(folder: Path) -> Path:
    """A directory of peft's for the linear stack."""
    return written(peft_model(base_of("linear"), config_of(LoRA(r=4, alpha=3, target_modules=["up", "gate"]))), folder)
