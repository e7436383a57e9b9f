"""LoRA's and DoRA's fields in HF peft's words, out and in. Checked on peft 0.21.2."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from lightning_peft.methods import _lora_layers as layers
from lightning_peft.methods._host import Adapter
from lightning_peft.methods._lora_init import from_weight_name
from lightning_peft.methods._lora_peft_tensors import attention_of, parts_of
from lightning_peft.methods._peft_names import patterns, target_modules
from lightning_peft.methods._targets import base_modules, is_conv1d, matches, pattern_faults, pattern_value
from lightning_peft.methods.base import PeftRoot
from lightning_peft.methods.errors import PEFTError, suggestion

if TYPE_CHECKING:
    from lightning_peft.methods.lora import LoRA

L = TypeVar("L", bound="LoRA")
DEFAULTS: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": None,
    "target_parameters": None,
    "exclude_modules": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "fan_in_fan_out": False,
    "layers_to_transform": None,
    "layers_pattern": None,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    # what these say of an init acts through init_lora_weights alone
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    # and these are what UNSUPPORTED tells the reason of
    "bias": "none",
    "lora_bias": False,
    "trainable_token_indices": None,
    "ensure_weight_tying": False,
    "layer_replication": None,
    "megatron_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "velora_config": None,
    "monteclora_config": None,
    "arrow_config": None,
    "kasa_config": None,
}
UNSUPPORTED = {
    "bias": "biases of the base were trained, and LoRA here trains none",
    "lora_bias": "B has a bias, and has none here",
    "trainable_token_indices": "single rows of an embedding were trained, and LoRA here trains none",
    "ensure_weight_tying": "tied layers share one adapter, and have one each here",
    "layer_replication": "layers of the base are repeated",
    "megatron_config": "Megatron's parallel layers are not known here",
    "alora_invocation_tokens": "the adapter acts from an invocation on, and always acts here",
    "use_qalora": "inputs are pooled",
    "use_bdlora": "A or B is block-diagonal",
    "velora_config": "its backward pass is another one",
    "monteclora_config": "weights are sampled",
    "arrow_config": "adapters are chosen token by token",
    "kasa_config": "the base's weights were changed, and the directory does not hold them",
}
UNCHANGED_BASE = ("true", "false", "eva", "orthogonal", "mica")
CHANGED_BASE = ("loftq", "corda", "lora_ga")
KEY = re.compile(r"(?P<path>.+?)(\.base_layer)*\.lora_((embedding_)?[AB](\.weight)?|magnitude_vector(\.weight)?)")


def to_peft(method: LoRA, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, Any]:
    """See `Method.to_peft`; a start that was taken from the weight is written as a LoRA of rank 2r over the original
    weight."""
    parts = [part for part in parts_of(root, attached) if not part.key.endswith(".base_layer.out_proj")]
    factor = 2 if from_weight_name(method.init) else 1
    alpha_factor = math.sqrt(factor) if method.rslora else factor
    modules = {path for path in attached if attention_of(root, path) is None}
    parameters = {part.name for part in parts} - modules
    modules -= {name.rpartition(".")[0] for name in parameters}
    faults: list[str] = []
    r, alpha = factor * method.r, _number(alpha_factor * method.alpha)
    fields: dict[str, Any] = {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": method.dropout,
        "use_rslora": method.rslora,
        "init_lora_weights": "gaussian" if method.init == "gaussian" else True,
        "fan_in_fan_out": _only_conv1d([root.module.get_submodule(path) for path in modules]),
    }
    ranks = {part.name: (_rank(part.layer), _number(_alpha(part.layer, method.rslora))) for part in parts}
    given = {key: factor * r for key, r in method.rank_pattern.items()}
    given_alpha = {key: _number(alpha_factor * alpha) for key, alpha in method.alpha_pattern.items()}
    # HF peft writes the patterns sorted, and takes the first that matches
    fields |= patterns((r, alpha), dict(sorted(given.items())), dict(sorted(given_alpha.items())), ranks)
    try:
        fields |= target_modules(root, modules, method.target_modules, method.exclude_modules)
    except PEFTError as error:
        faults += error.faults
    if parameters:
        fields["target_parameters"], more = _target_parameters(root, parameters, method.target_parameters)
        faults += more
        if any(is_conv1d(root.module.get_submodule(path)) for path in modules):
            faults.append("target_parameters: HF peft can't adapt them beside a Conv1D")
    if faults:
        raise PEFTError(faults)
    return fields


def _rank(layer: layers.LowRank) -> int:
    return int(layer.factors()[0].shape[layer.rank_dims[0]])


def _alpha(layer: layers.LowRank, rslora: bool) -> float:
    return layer.scale * (math.sqrt(_rank(layer)) if rslora else _rank(layer))


def _number(value: float) -> float:
    """Without the noise of a division and multiplication, and an int where it is whole, as HF peft writes alpha."""
    rounded = round(float(value), 12)
    return int(rounded) if rounded.is_integer() else rounded


def _only_conv1d(modules: Sequence[nn.Module]) -> bool:
    return any(is_conv1d(module) for module in modules) and not any(isinstance(m, nn.Linear) for m in modules)


def _target_parameters(root: PeftRoot, wanted: set[str], given: list[str]) -> tuple[list[str], list[str]]:
    names = _parameter_names(root.module)
    faults = [
        f"{name}: HF peft adapts no parameter of the whole model itself" for name in sorted(wanted) if "." not in name
    ]
    for candidate in (sorted(given), sorted({".".join(name.split(".")[-2:]) for name in wanted}), sorted(wanted)):
        if {name for name in names if matches(name, candidate)} == wanted:
            return candidate, faults
    return [], [*faults, f"target_parameters: HF peft would adapt others beside {', '.join(sorted(wanted))}"]


def _parameter_names(root: nn.Module) -> list[str]:
    return [f"{path}.{name}" for path, module in base_modules(root) for name in module._parameters]


def from_peft(cls: type[L], config: Mapping[str, Any], keys: Sequence[str], root: PeftRoot) -> L:
    """See `Method.from_peft`. Where the adapters go is taken from the keys; names are kept as given where they mean
    the same here."""
    if faults := [*_type_faults(config), *_value_faults(config)]:
        raise PEFTError(faults)
    listed = config["target_parameters"] or []
    parameters = {name for name in _parameter_names(root.module) if listed and matches(name, listed)}
    modules, faults = _adapted_modules(cls.peft_prefix, keys, root)
    modules -= {name.rpartition(".")[0] for name in parameters}
    if not modules and not parameters and not faults:
        faults.append("the directory holds no tensor of an adapter")
    init = _init(config["init_lora_weights"])
    if from_weight_name(init):
        faults += _start_faults(init, root, modules, parameters)
    if faults:
        raise PEFTError(faults)
    default = config["r"], config["lora_alpha"]
    given, given_alpha = config["rank_pattern"] or {}, config["alpha_pattern"] or {}
    ranks = {}
    for name in (*modules, *parameters):
        theirs = attention_of(root, name) or name
        r, alpha = pattern_value(given, theirs, default[0]), pattern_value(given_alpha, theirs, default[1])
        ranks[root.outer(name)] = r, alpha
    fields = {
        "r": default[0],
        "alpha": default[1],
        "dropout": config["lora_dropout"],
        "rslora": config["use_rslora"],
        "init": init,
        **patterns(default, given, given_alpha, ranks),
    }
    return _with_targets(cls, fields, config, root, modules, parameters)


def _with_targets(
    cls: type[L],
    fields: Mapping[str, Any],
    config: Mapping[str, Any],
    root: PeftRoot,
    modules: set[str],
    parameters: set[str],
) -> L:
    skip = {root.outer(path) for path in root.modules_to_save}
    paths = sorted(root.outer(path) for path in modules)
    names = sorted(root.outer(name) for name in parameters)
    by_path = partial(cls, **fields, target_modules=paths)
    given = config["target_modules"], config["exclude_modules"] or []
    for targets, exclude in (given, (paths, []), ("|".join(map(re.escape, paths)), [])):
        for listed in (config["target_parameters"] or [], names):
            try:
                method = by_path(target_modules=targets or [], exclude_modules=exclude, target_parameters=listed)
                found, faults = method._modules(root.model, skip)
                found_parameters, more = method._parameters(root.model, skip)
            except PEFTError:
                continue
            if not faults + more and set(found) == set(paths) and set(found_parameters) == set(names):
                return method
    return by_path(target_parameters=names)  # whatever is wrong is told when it is injected


def _adapted_modules(prefix: str, keys: Sequence[str], root: PeftRoot) -> tuple[set[str], list[str]]:
    found: dict[str, None] = {}
    foreign = []
    known = dict(base_modules(root.module))
    for key in keys:
        match = KEY.fullmatch(key.removeprefix(prefix))
        path = match["path"].replace(".base_layer", "") if match else ""
        if match is None or not key.startswith(prefix):
            foreign.append(f"{key} is no key of a LoRA")
        elif path not in known:
            foreign.append(f"{key}: {type(root.module).__name__} has no module {path!r}{suggestion(path, known)}")
        else:
            found[path] = None
    rest = [f"and {len(foreign) - 3} more keys of this kind"] if len(foreign) > 3 else []
    return set(found), [*foreign[:3], *rest]


def _type_faults(config: Mapping[str, Any]) -> list[str]:
    number, names = (int, float), (str, list, type(None))
    types: dict[str, tuple[type, ...]] = {
        "r": (int,),
        "lora_alpha": number,
        "lora_dropout": number,
        "use_rslora": (bool,),
        "target_modules": names,
        "exclude_modules": names,
        "target_parameters": (list, type(None)),
        "rank_pattern": (dict, type(None)),
        "alpha_pattern": (dict, type(None)),
    }
    faults = [
        f"{name}: {config[name]!r} is no {kinds[0].__name__}"
        for name, kinds in types.items()
        if not isinstance(config[name], kinds) or (isinstance(config[name], bool) and bool not in kinds)
    ]
    values = {"rank_pattern": (int,), "alpha_pattern": number}
    for name, kinds in values.items():
        given = config[name] if isinstance(config[name], dict) else {}
        wrong = [key for key, value in given.items() if not isinstance(value, kinds) or isinstance(value, bool)]
        faults += [f"{name}: {given[key]!r} for {key!r} is no number" for key in wrong] + pattern_faults(name, given)
    for name in ("target_modules", "exclude_modules", "target_parameters"):
        listed = config[name] if isinstance(config[name], list) else []
        faults += [f"{name}: {item!r} is no name" for item in listed if not isinstance(item, str) or not item]
    return faults


def _value_faults(config: Mapping[str, Any]) -> list[str]:
    faults = [
        f"{name}: {config[name]!r} can't be honoured: {reason}"
        for name, reason in UNSUPPORTED.items()
        if config[name] != DEFAULTS[name] and (config[name] or DEFAULTS[name])
    ]
    init = str(config["init_lora_weights"]).lower()
    if init in CHANGED_BASE:
        faults.append(
            f"init_lora_weights: {init!r} changed the base's weights at its start, and the directory does not hold "
            "them; save it in HF peft with path_initial_model_for_weight_conversion, and import that"
        )
    elif init not in UNCHANGED_BASE and init not in ("gaussian", "olora") and not init.startswith("pissa"):
        faults.append(f"init_lora_weights: {config['init_lora_weights']!r} is not known here")
    return faults


def _init(theirs: Any) -> str:
    init = str(theirs).lower()
    return "default" if init in UNCHANGED_BASE else init


def _start_faults(init: str, root: PeftRoot, modules: set[str], parameters: set[str]) -> list[str]:
    """Where HF peft could not have started from the weight, or did so wrongly."""
    faults = [f"{name}: HF peft has no init {init!r} for it" for name in sorted(parameters)]
    for path in sorted(modules):
        module = root.module.get_submodule(path)
        if is_conv1d(module) and init == "olora":
            faults.append(f"{path}: HF peft subtracts its {init} from a Conv1D in the wrong layout")
        elif not (isinstance(module, nn.Linear) or is_conv1d(module)):
            faults.append(f"{path}: HF peft has no init {init!r} for a {type(module).__name__}")
    return faults
