"""Quantize the linear layers of a model in place, one at a time, and the inverse."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_peft.methods._host import Host, Swapped
from lightning_peft.methods._quantized import packed
from lightning_peft.methods._targets import base_modules, find, inside, matches, output_heads
from lightning_peft.methods.errors import PEFTError
from lightning_peft.quantization.config import Quantization
from lightning_peft.quantization.loading import loading_policy
from lightning_peft.quantization.others import is_bitsandbytes, is_plain_linear, other_quantizer

M = TypeVar("M", bound=nn.Module)
PACKABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FAST_PATH = "_peft_fast_path"
"""Under which a layer of torch keeps what `quantize` changed so that it calls its submodules."""


def quantize(
    model: M,
    config: str | Quantization,
    *,
    skip: Sequence[str] = (),
    device: torch.device | str | None = None,
    error_ranks: Mapping[str, int] = MappingProxyType({}),
) -> M:
    """Pack the weights of `model`'s Linear and transformers' Conv1D layers, in place and one at a time.

    Each layer stays the same object under the same name, with its bias and hooks; its class becomes one of
    `lightning_peft.quantization.layers`, and the dense weight is freed before the next is packed. Left as they are:
    output heads, embeddings, norms, what a transformers model keeps in fp32, weights that are used twice, empty ones,
    subclasses of Linear (their forward is their own), and all that is named in `skip` and `config.skip_modules`.

    Layers that bitsandbytes has packed keep their codes and are taken over, see `guard`; what transformers left dense
    in a model that it quantized stays dense.

    Args:
        model: without adapters, and not on the meta device, but where shapes alone count (`LoadingPolicy.shapes_only`):
            `load_base` fills and quantizes such a one.
        config: a short name ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8"), or all of it.
        skip: names or path endings of further modules to leave as they are, with all that is in them.
        device: where each layer is packed and stays, bias included; by default it stays where it is. The rest of the
            model is not moved.
        error_ranks: of a method that starts from what quantization loses, `method.error_ranks(model)`: as much of it is
            kept beside those layers until adapters are attached.

    Returns:
        The same object. Where more bytes of weights stay dense than are packed, and nobody asked for it, a warning
        tells which.

    Raises:
        PEFTError: with every fault of the arguments and the model, which is then as it was; or a weight is not finite,
            when those before it are packed.
    """
    config = Quantization.of(config)
    targets, faults = quantizable(model, config, skip)
    faults += _model_faults(model, config)
    policy = loading_policy()
    shapes_only = policy is not None and policy.shapes_only
    if not shapes_only and any(parameter.is_meta for module in targets.values() for parameter in module.parameters()):
        faults.append(
            "quantization: the model is on the meta device; load_base(model, path, quantization=...), or base_weights "
            "of the callback, fills it from safetensors and quantizes on the way"
        )
    if not faults and not targets and not any(is_bitsandbytes(module) for module in model.modules()):
        faults.append(f"quantization: {type(model).__name__} has no linear layer that can be quantized; leave it out")
    if faults:
        raise PEFTError(list(dict.fromkeys(faults)))
    from lightning_peft.quantization.layers import pack

    _take_over(model, config)
    ranks = {id(module): error_ranks[path] for path, module in targets.items() if path in error_ranks}
    for path, module in targets.items():
        if packed(module) is not None:
            continue  # under another name
        if device is not None:
            module.to(device)
        try:
            pack(module, config, error_rank=ranks.get(id(module), 0))
        except PEFTError as error:
            raise PEFTError([f"{path}: {fault}" for fault in error.faults]) from None
    call_submodules(model)
    _tell_dense(model, _left_out(model, config, skip)[0])
    return model


def guard(model: M) -> M:
    """Take over the layers that bitsandbytes, or transformers with it, has packed in `model`, in place.

    They become this package's, with the same codes: a forward without gradients on a CPU then no longer repacks them
    into a layout that has none, and their state dicts load. Nothing else changes; a model without such layers is left
    as it is, and nothing is imported.

    Returns:
        The same object.

    Raises:
        PEFTError: a layer keeps its weights in 16 bits and quantizes them at each use.
    """
    if faults := list(_mixed_faults(model)):
        raise PEFTError(faults)
    _take_over(model, None)
    call_submodules(model)
    return model


def dequantize(model: M, dtype: torch.dtype) -> M:
    """Give every packed layer of `model` the class that it had before, with a dense and frozen weight in `dtype`.

    Args:
        model: without adapters on packed layers.
        dtype: of the weights; biases and all else keep theirs.

    Returns:
        The same object.

    Raises:
        PEFTError: adapters stand on the layers.
    """
    layers = {path: module for path, module in base_modules(model) if is_bitsandbytes(module)}
    if any(isinstance(module, Swapped) for module in layers.values()):
        raise PEFTError("dequantize: adapters stand on the quantized layers; remove(model) first, or merge(model)")
    guard(model)
    if layers:
        from lightning_peft.quantization.layers import PackedLinear, unpack

        for module in dict.fromkeys(layers.values()):
            unpack(cast(PackedLinear, module), dtype)
    for module in model.modules():
        vars(module).update(vars(module).pop(FAST_PATH, {}))
    return model


def quantizable(
    model: nn.Module, config: Quantization, skip: Sequence[str] = ()
) -> tuple[dict[str, nn.Module], list[str]]:
    """The layers of `model` that `quantize` would pack, by path, and what is wrong with them or the names to skip.

    A layer that has several names comes under each. The model may be on the meta device.
    """
    left, faults = _left_out(model, config, skip)
    modules = dict(base_modules(model))
    users: dict[Any, set[int]] = defaultdict(set)
    for module in modules.values():
        for tensor in module._parameters.values():
            if tensor is not None:
                users[_place(tensor)].add(id(module))
    skipped = {id(module) for path, module in modules.items() if inside(path, left)}
    found = {}
    for path, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is None or not is_plain_linear(module):
            continue
        if id(module) in skipped or len(users[_place(weight)]) > 1:
            continue
        if fault := _layer_fault(module, weight, config):
            faults.append(f"{path}: {fault}")
        elif weight.numel():
            found[path] = module
    return found, faults


def call_submodules(model: nn.Module) -> None:
    """Make nn.TransformerEncoder and its layers call their packed submodules, in place.

    In inference both can take a fused path that reads `linear1.weight` and its like. The two attributes are what their
    forward looks at; checked on torch 2.11 and 2.13.
    """
    for module in model.modules():
        fused = {
            "activation_relu_or_gelu": isinstance(module, nn.TransformerEncoderLayer),
            "use_nested_tensor": isinstance(module, nn.TransformerEncoder),
        }
        found = {name: vars(module)[name] for name, is_so in fused.items() if is_so and name in vars(module)}
        if found and any(packed(part) for part in module.modules()):
            vars(module).setdefault(FAST_PATH, found)
            vars(module).update(dict.fromkeys(found, 0))


def _take_over(model: nn.Module, config: Quantization | None) -> None:
    # one that adapters stand on was taken over before they were attached
    theirs = [module for module in model.modules() if is_bitsandbytes(module) and not isinstance(module, Swapped)]
    if theirs:
        from lightning_peft.quantization.layers import adopt

        for module in theirs:
            adopt(module, config)


def _left_out(model: nn.Module, config: Quantization, skip: Sequence[str]) -> tuple[set[str], list[str]]:
    """Paths of what is left dense with all that is in it, and the names to skip that match nothing."""
    left, faults = set(output_heads(model)), []
    modules = dict(base_modules(model))
    for field, names in {"skip_modules": config.skip_modules, "skip": skip}.items():
        if isinstance(names, str):
            faults.append(f"{field}: {names!r} is a string; give a list, [{names!r}]")
            continue
        found, unknown = find(field, list(names), modules, lambda _: True, exclude=[], skip=(), describe=str)
        left |= set(found)
        faults += unknown
    for path, module in modules.items():
        # private to transformers; checked on 5.23
        kept = [*(getattr(module, "_keep_in_fp32_modules", None) or ())]
        kept += [*(getattr(module, "_keep_in_fp32_modules_strict", None) or ())]
        is_theirs = getattr(module, "hf_quantizer", None) is not None
        if kept or is_theirs:
            left |= {name for name, _ in base_modules(module, path) if is_theirs or matches(name, kept)}
    return left, faults


def _model_faults(model: nn.Module, config: Quantization) -> Iterator[str]:
    """What is wrong with the layers that are no plain Linear."""
    for path, module in base_modules(model):
        if isinstance(module, Host) or type(module).__module__.startswith("peft.tuners."):
            yield "quantization: adapters stand on the model; quantize it first, and attach them after"
        elif (other := other_quantizer(module)) is not None:
            yield (
                f"quantization: {path} is quantized by {other} ({type(module).__name__}), which can't be packed again; "
                "leave quantization out, or load the model as it was before"
            )
        elif (found := packed(module)) is not None and found.kind.removesuffix("-dq") != config.type:
            yield (
                f"quantization: {path} is {found.kind} already, which can't become {config.name}; leave quantization "
                "out to use it as it is, or load the model as it was before"
            )
    yield from _mixed_faults(model)


def _mixed_faults(model: nn.Module) -> Iterator[str]:
    for path, module in base_modules(model):
        if is_bitsandbytes(module) and getattr(getattr(module, "state", None), "has_fp16_weights", False):
            yield (
                f"quantization: {path} is a Linear8bitLt with has_fp16_weights=True, which keeps a dense weight beside "
                "the codes; load the model with it set to False (llm_int8_has_fp16_weight)"
            )


def _layer_fault(module: nn.Module, weight: nn.Parameter, config: Quantization) -> str | None:
    """Why a plain Linear or Conv1D can't be packed; None where it can."""
    if isinstance(weight, nn.UninitializedParameter):
        return f"{type(module).__name__} has no shape yet; run one batch through the model first"
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, which can't be packed; quantize before it is made one"
    if weight.dtype not in PACKABLE:
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"its weight is in {dtype}, which can't be packed; name it in skip_modules"
    if "forward" in vars(module):
        return (
            "has a forward of its own set on it, as accelerate's dispatch does; load the model without device_map, or "
            "with quantization_config"
        )
    unit = getattr(torch, config.storage_dtype).itemsize
    if config.type != "int8" and -(-weight.numel() // 2) % unit:
        return (
            f"its {weight.numel()} weights take {-(-weight.numel() // 2)} bytes, no whole number of "
            f"{config.storage_dtype}s; use storage_dtype 'uint8', or name it in skip_modules"
        )
    return None


def _place(tensor: Tensor) -> Any:
    """What two tensors that are one have in common."""
    if isinstance(tensor, nn.UninitializedParameter) or tensor.is_meta or type(tensor.data) is not Tensor:
        return id(tensor)
    return (tensor.device, tensor.data_ptr()) if tensor.numel() else id(tensor)


def _tell_dense(model: nn.Module, left: set[str]) -> None:
    """Warn where much stays dense that nobody asked for: experts, fused projections of attention, convolutions."""
    dense: Counter[str] = Counter()
    n_packed, counted = 0, set[int]()
    for path, module in base_modules(model):
        for name, tensor in module._parameters.items():
            if tensor is None or id(tensor) in counted:
                continue
            counted.add(id(tensor))
            n_bytes = tensor.numel() * tensor.element_size()
            if packed(module, name) is not None:
                n_packed += n_bytes
            elif tensor.dim() > 1 and not isinstance(module, nn.Embedding) and not inside(path, left):
                dense[f"{type(module).__name__}.{name}"] += n_bytes
    if dense.total() > n_packed:
        most = ", ".join(f"{name} {n_bytes / 1e6:.1f} MB" for name, n_bytes in dense.most_common(3))
        warnings.warn(
            f"quantization: {dense.total() / 1e6:.1f} MB of weights stay dense beside {n_packed / 1e6:.1f} MB packed: "
            f"{most}; only Linear and Conv1D layers can be packed",
            stacklevel=3,
        )
