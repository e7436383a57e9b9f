"""Layers of HF peft, each on a frozen module of ours: how they are made, and how they run without holding it.

peft puts its layer in the module's place and the module inside of it. Here peft does so in a twin of the model, a tree
of other modules on the same memory; of each layer that it made there, what it trains is kept beside the real module.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.methods._host import Adapter, Base, Host, adapter_dtype, own_class, own_tensors
from lightning_peft.methods._peft_config import WHAT_PEFT_RAISES
from lightning_peft.methods._quantized import dense_weight, is_quantized, packed
from lightning_peft.methods._target_modules import in_attention
from lightning_peft.methods._targets import base_modules, inside
from lightning_peft.methods.errors import PEFTError

ADAPTER = "default"
"""The name that peft's layers know their adapter by, whatever name it has here."""


class _Frozen:
    """What a peft layer gets for its `base_layer` while it runs: the frozen module, called by its own forward."""

    def __init__(self, base: Base, module: nn.Module) -> None:
        self.base, self.module = base, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class PeftLayer(Adapter):
    """A layer of peft, which holds what it trains and not the module that it was made for.

    Over a base of lower precision what it trains is kept in fp32; peft's layers cast what they compute with it to the
    dtype that they were given. Those of `low` are read in the base's dtype.

    Args:
        layer: of peft, on a module of the twin.
        shared: names in its state of tensors that are one for all layers.
    """

    def __init__(self, layer: nn.Module, shared: frozenset[str]) -> None:
        super().__init__()
        like = next((tensor for tensor in _base_of(layer).parameters() if tensor.is_floating_point()), None)
        dtype = torch.float32 if is_quantized(_base_of(layer)) else None if like is None else adapter_dtype(like)
        del layer._modules["base_layer"]
        _set_base(layer, None)
        halves = (torch.bfloat16, torch.float16)
        self.low = {name: p.dtype for name, p in layer.named_parameters() if p.dtype in halves}
        self.layer = layer if dtype is None else layer.to(dtype)
        self.shared = shared

    def forward(self, base: Base, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self.layer
        _set_base(layer, _Frozen(base, module))
        try:
            if not self.low:
                return layer(*args, **kwargs)
            read = {name: layer.get_parameter(name).to(dtype) for name, dtype in self.low.items()}
            return torch.func.functional_call(layer, read, args, kwargs)
        finally:
            _set_base(layer, None)

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        layer: Any = self.layer
        # so peft says that the update is one to be added to the weight; the signature of some has more
        if layer.supports_lora_conversion() and len(inspect.signature(layer.get_delta_weight).parameters) == 1:
            _set_base(layer, _Frozen(own_class(module).forward, module))
            try:
                delta = layer.get_delta_weight(ADAPTER)
            finally:
                _set_base(layer, None)
            return {"weight": dense_weight(module, dtype=delta.dtype) + delta}
        if isinstance(module, nn.Conv2d) and layer.__class__.__module__ == "peft.tuners.oft.layer":
            # found on peft 0.21.2
            raise PEFTError(
                "merge: peft's OFT sums overlapping patches of a convolution, which no weight computes; keep it "
                "attached"
            )
        if _is_for_packed(layer):
            raise PEFTError(
                f"merge: peft's {type(layer).__name__} packs what it merges into 4 or 8 bits again; keep it attached"
            )
        layer = copy.deepcopy(layer)
        del vars(layer)["base_layer"]
        dtype = next(self.parameters()).dtype
        layer.base_layer = _twin(module, frozenset(), lambda tensor: tensor.detach().to(dtype, copy=True))
        if is_quantized(module):
            layer.base_layer._parameters["weight"] = nn.Parameter(dense_weight(module, dtype=dtype), False)
            layer.quantization_backend = None
        try:
            layer.merge(safe_merge=True)
        except WHAT_PEFT_RAISES as error:
            raise PEFTError(f"merge: peft's {type(layer).__name__} can't be merged: {error}") from error
        after = own_tensors(_base_of(layer))
        before = {name: dense_weight(module, name, dtype) for name in own_tensors(module)}
        return {name: after[name].detach() for name in before if not torch.equal(after[name], before[name])}


def peft_layers(config: Any, model: nn.Module, skip: Container[str]) -> dict[str, PeftLayer]:
    """The layers that peft makes for `model`, by the path of the module that each is for; the model is not changed.

    Args:
        config: a peft configuration, which peft completes.
        model: any module, on any device, meta included; adapters on it are passed over.
        skip: paths of modules that peft shall not see.

    Raises:
        PEFTError: peft refuses the model, or does to it what can't be done beside a frozen base.
    """
    tuner = wrapped(config, model, skip).base_model
    twin: nn.Module = tuner.model
    shared = frozenset(name for name in tuner.state_dict() if not name.startswith("model."))
    found = dict(_outermost(twin))
    if faults := _faults(twin, found, model):
        raise PEFTError(faults)
    trained = {id(p): name for name, p in twin.named_parameters() if p.requires_grad}
    made = {path: PeftLayer(layer, shared) for path, layer in found.items()}
    for layer in made.values():
        for name, parameter in layer.layer.named_parameters():
            if not parameter.requires_grad:
                raise PEFTError(f"it keeps {name} in its layers without training it, which has no place here")
            trained.pop(id(parameter), None)
    if trained:
        raise PEFTError(f"it trains {next(iter(trained.values()))}, which is outside of its layers")
    return made


def wrapped(config: Any, model: nn.Module, skip: Container[str]) -> Any:
    """peft's model around a twin of `model`.

    Raises:
        PEFTError: peft refuses the model.
    """
    from peft import get_peft_model

    twin = _twin(model, skip, lambda tensor: tensor.detach())
    # by what these say peft takes its layers for packed weights
    kinds = {found.kind == "int8" for _, module in base_modules(model) if (found := packed(module)) is not None}
    vars(twin).update(is_loaded_in_8bit=True in kinds, is_loaded_in_4bit=False in kinds)
    if not hasattr(twin, "config"):
        # peft looks up by the model's kind which modules to adapt
        inner = (getattr(module, "config", None) for _, module in base_modules(model))
        found = next((config for config in inner if hasattr(config, "model_type")), None)
        vars(twin).update({} if found is None else {"config": found})
    try:
        return get_peft_model(cast(Any, twin), config, adapter_name=ADAPTER)
    except WHAT_PEFT_RAISES as error:
        raise PEFTError(f"peft refuses {own_class(model).__name__}: {' '.join(str(error).split())}") from error


def _twin(model: nn.Module, skip: Container[str], tensor_of: Callable[[Tensor], Tensor]) -> nn.Module:
    """A tree of modules like `model`'s, adapters and the modules `skip` left out, with its tensors as `tensor_of` gives
    them; parameters are new objects, so that what is done to them is not done to the model's."""
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, Tensor] = {}

    def same(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or isinstance(tensor, nn.UninitializedParameter):
            return tensor
        if id(tensor) not in tensors:
            new = tensor_of(tensor)
            tensors[id(tensor)] = nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new
        return tensors[id(tensor)]

    def like(module: nn.Module, path: str) -> nn.Module:
        if id(module) in modules:
            return modules[id(module)]
        cls = own_class(module)
        new = modules[id(module)] = cls.__new__(cls)
        # dicts are copied, so that no hook or buffer that peft adds is added to the model
        vars(new).update({name: copy.copy(v) if isinstance(v, dict) else v for name, v in vars(module).items()})
        for kind in ("_parameters", "_buffers"):
            vars(new)[kind] = {
                # a packed weight is what it is by its class, and nothing is done to it
                name: tensor if packed(module, name) else same(tensor)
                for name, tensor in vars(module)[kind].items()
            }
        vars(new)["_modules"] = {
            name: None if child is None else like(child, inner)
            for name, child in module._modules.items()
            if not inside(inner := f"{path}.{name}" if path else name, skip)
            and not (name == "adapters" and isinstance(module, Host))
        }
        return new

    return like(model, "")


def _is_for_packed(layer: nn.Module) -> bool:
    """Whether it is of a class that peft has for packed weights alone."""
    return type(layer).__module__.endswith(".bnb")


def _unpacks(layer: nn.Module) -> bool:
    """Whether it unpacks a packed weight before it reads it; checked on peft 0.21.2."""
    return _is_for_packed(layer) or getattr(layer, "quantization_backend", None) is not None


def _set_base(layer: nn.Module, base: _Frozen | None) -> None:
    cast(Any, layer).base_layer = base


def _base_of(layer: nn.Module) -> nn.Module:
    return cast(nn.Module, cast(Any, layer).get_base_layer())


def _outermost(twin: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """peft's layers in the twin, by path."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: set[str] = set()
    for path, module in list(twin.named_modules()):
        if not isinstance(module, BaseTunerLayer):
            continue
        if inside(path, found):
            raise PEFTError(f"config: it targets {path.replace('.base_layer', '')}, which is inside of another target")
        found.add(path)
        yield path, cast(nn.Module, module)


def _faults(twin: nn.Module, found: Mapping[str, nn.Module], model: nn.Module) -> list[str]:
    """What of peft's layers can't stand beside a frozen base."""
    modules = dict(base_modules(model))
    faults = []
    for path, layer in found.items():
        if path not in modules:
            faults.append(f"it adds a module {path} to the model")
        elif isinstance(modules[path], nn.MultiheadAttention) or in_attention(path, modules):
            faults.append(
                f"{path}: nn.MultiheadAttention reads its weights, where peft's layers can't reach; exclude it"
            )
        elif is_quantized(modules[path]) and not _unpacks(layer):
            faults.append(
                f"{path}: it is quantized, and peft's {type(layer).__name__} takes its codes for weights; leave it out "
                "of quantization (skip_modules), or choose a type that peft has for quantized layers (VERA, OFT, …)"
            )
        elif any(
            _moved(tensor, own_tensors(modules[path])[name]) for name, tensor in own_tensors(_base_of(layer)).items()
        ):
            faults.append(f"{path}: it changes the base's weights at its start; choose another initialization")
    return faults


def _moved(tensor: Tensor, original: Tensor) -> bool:
    return tensor.shape != original.shape or (not tensor.is_meta and tensor.data_ptr() != original.data_ptr())
