"""Loads a pretrained model for a task, and checks that data fits it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lightning_peft.interchange.locations import resolve
from lightning_peft.methods._targets import base_modules, is_conv1d, matches
from lightning_peft.methods.errors import PEFTError
from lightning_peft.quantization.config import NAMES, Quantization
from lightning_peft.quantization.convert import quantizable
from lightning_peft.quantization.loading import LoadingPolicy, loading_policy

NOT_OF_CONFIG = ("quantization_config", "dtype", "ignore_mismatched_sizes")
"""Options of `from_pretrained` that a configuration does not take."""


def load_pretrained(auto_class: str, name: str, **options: Any) -> torch.nn.Module:
    """The model called `name`, in training mode: `from_pretrained` leaves it in eval mode, which Lightning would keep.

    Where a `LoadingPolicy` holds, each weight is read, put on its device and quantized before the next one is; or none
    is read, where shapes alone count.

    Args:
        auto_class: the class of `transformers` to load it with, such as `AutoModelForSequenceClassification`.
        name: a hub id, a folder or `package:NAME/folder`.
        options: passed on to `from_pretrained`.

    Raises:
        PEFTError: nothing is there, it is no such model, or its weights are quantized in another way than the policy
            says, or in one that adapters can't stand on.
    """
    import transformers

    place = resolve(name, "model")
    auto = getattr(transformers, auto_class)
    try:
        policy = loading_policy()
        if policy is not None and policy.shapes_only:
            return _shapes(auto, place, options).train()
        if policy is not None:
            options = _stored_as(policy, auto, name, place, options)
        model: torch.nn.Module = auto.from_pretrained(place, **options)
    except PEFTError:
        raise
    except (OSError, ValueError, ImportError) as error:
        message = " ".join(str(error).split())
        raise PEFTError(f"model: {auto_class} can't load {name!r}: {message}") from error
    return model.train()


def _shapes(auto: Any, place: str, options: dict[str, Any]) -> torch.nn.Module:
    """The model on the meta device, in the dtype that its configuration names; nothing else of it is read."""
    given = {key: options[key] for key in ("attn_implementation",) if key in options}
    dtype = options.get("dtype")
    if isinstance(dtype, (str, torch.dtype)) and dtype != "auto":
        given["dtype"] = dtype
    return _without_memory(auto, _config(place, options), options, **given)


def _config(place: str, options: dict[str, Any]) -> Any:
    """The model's configuration, with what of `options` is one of its fields."""
    from transformers import AutoConfig

    known = {key: value for key, value in options.items() if key not in NOT_OF_CONFIG}
    return AutoConfig.from_pretrained(place, return_unused_kwargs=True, **known)[0]


def _without_memory(auto: Any, config: Any, options: dict[str, Any], **given: Any) -> torch.nn.Module:
    """The model of a configuration on the meta device; no random numbers are used up."""
    trusted = bool(options.get("trust_remote_code"))
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model: torch.nn.Module = auto.from_config(config, trust_remote_code=trusted, **given)
    return model


def _stored_as(policy: LoadingPolicy, auto: Any, name: str, place: str, options: dict[str, Any]) -> dict[str, Any]:
    """`options` with what the policy asks of `from_pretrained`; only the model's configuration is read."""
    wanted, given = policy.quantization, options.get("quantization_config")
    config = _config(place, options)
    own = getattr(config, "quantization_config", None) if given is None else given
    if policy.base_dtype is not None:
        options = {"dtype": policy.base_dtype, **options}
    if own is None and wanted is None:
        return options
    options = {"device_map": {"": "cpu" if policy.device is None else policy.device}, **options}
    if own is None:
        assert wanted is not None
        dense = _left_dense(wanted, policy.skip, _without_memory(auto, config, options))
        return {**options, "quantization_config": replace(wanted, skip_modules=()).bits_and_bytes_config(dense)}
    how = _name(own if isinstance(own, Mapping) else own.to_dict())
    source = f"{name!r} is stored as {how}" if given is None else f"model_options.quantization_config is {how}"
    if how not in NAMES:
        raise PEFTError(
            f"model: {source}, on which adapters can't stand (there are {', '.join(NAMES)}); name the model in full "
            "precision, and quantize it by quantization='nf4'"
        )
    if wanted is not None and wanted.name != how:
        raise PEFTError(
            f"quantization: {wanted.name!r} is asked for, but {source}; leave quantization out to use it as it is, "
            "or name the model in full precision"
        )
    return options


def _left_dense(wanted: Quantization, skip: Sequence[str], model: torch.nn.Module) -> list[str]:
    """The linear layers that `quantize` would leave as they are, as regular expressions of their whole paths.

    Args:
        wanted: what to quantize to.
        skip: names or path endings of modules to leave, in the model or in a module that holds it.
        model: on the meta device.

    Raises:
        PEFTError: a layer can't be quantized so.
    """
    names = (*skip, *wanted.skip_modules)
    modules = {path: module for path, module in base_modules(model) if path}
    left = [path for path in modules if matches(path, names) or any(name.endswith(f".{path}") for name in names)]
    converted, faults = quantizable(model, replace(wanted, skip_modules=()), left)
    if faults:
        raise PEFTError(faults)
    linear = [path for path, module in modules.items() if isinstance(module, torch.nn.Linear) or is_conv1d(module)]
    # without any, transformers would choose by its own rule
    return [f"^{re.escape(path)}$" for path in linear if path not in converted] or ["^$"]


def _name(config: Mapping[str, Any]) -> str:
    """The name of the quantization that a transformers configuration describes."""
    if config.get("load_in_8bit"):
        return "int8"
    if config.get("load_in_4bit"):
        scales = "-dq" if config.get("bnb_4bit_use_double_quant") else ""
        return f"{config.get('bnb_4bit_quant_type', 'fp4')}{scales}"
    method = config.get("quant_method", "an unknown method")
    return str(getattr(method, "value", method))


def check_length(model: torch.nn.Module, data: object) -> None:
    """Refuse rows that may be longer than the model has positions for.

    Raises:
        PEFTError: the datamodule's `max_length` is more than the model's configuration says.
    """
    config = getattr(model, "config", None)
    most, asked = getattr(config, "max_position_embeddings", None), getattr(data, "max_length", None)
    if isinstance(most, int) and isinstance(asked, int) and 0 < most < asked:
        raise PEFTError(f"max_length: {asked} is more than the {most} tokens that the model reads")
