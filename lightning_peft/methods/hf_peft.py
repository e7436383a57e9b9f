"""HFPeft: the other methods of the package peft, through this package's callback, checkpoints and export."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from lightning_peft.methods import _peft_config as configs
from lightning_peft.methods._host import Adapter
from lightning_peft.methods._peft_bridge import PeftLayer, peft_layers, wrapped
from lightning_peft.methods._peft_names import target_modules
from lightning_peft.methods._target_modules import linear_layers, once
from lightning_peft.methods._targets import ALL_LINEAR, base_modules, matches, pattern_value
from lightning_peft.methods.base import Attachment, Method, PeftRoot, PeftTensor
from lightning_peft.methods.errors import PEFTError, suggestion


@dataclass(kw_only=True)
class HFPeft(Method):
    r"""A method of HF peft that puts layers around modules: VeRA, OFT, LoHa, LoKr, layer-norm tuning and others.

    Each of its layers runs beside the frozen module, which keeps its name. At the start the model's outputs are what
    the method makes of them. Needs the package peft.

    Raises:
        PEFTError: peft is not installed, or with all that is wrong with the configuration.
    """

    config: dict[str, Any] | Any
    """A configuration of peft, such as `VeraConfig(r=256)`, or a mapping of its fields with `peft_type` among them. It
    is kept as the mapping, without what has its default."""

    learning_rate: ClassVar[float] = 1e-3
    peft_defaults: ClassVar[Mapping[str, Any]] = configs.AnyFields()

    def __post_init__(self) -> None:
        configs.checked_peft()
        if hasattr(self.config, "to_dict"):
            given = self.config.to_dict()
            self.config = {name: value for name, value in given.items() if value is not None}
        super().__post_init__()
        self.config = configs.concise(self.config)
        vars(self)["peft_defaults"] = configs.defaults(self.config["peft_type"])

    def faults(self) -> list[str]:
        """What is wrong with the configuration."""
        return configs.config_faults(self.config)

    def attachments(self, model: nn.Module, skip: Container[str]) -> Sequence[Attachment]:
        """One adapter for each module that peft finds."""
        modules = dict(base_modules(model))
        config = dict(self.config)
        if config.get("target_modules") == ALL_LINEAR:
            config["target_modules"] = sorted(linear_layers(model))
        faults = _name_faults(config, modules)
        try:
            layers = {} if faults else peft_layers(configs.made_config(config), model, skip)
        except PEFTError as error:
            faults += [f"config: {config['peft_type']}: {fault}" for fault in error.faults]
        if faults:
            raise PEFTError([f"HFPeft.{fault}" for fault in faults])
        return once(Attachment(path, modules[path], layer) for path, layer in layers.items())

    @classmethod
    def reads_peft(cls, config: Mapping[str, Any]) -> bool:
        """Whether it is a type of peft that no method of this package is."""
        try:
            configs.checked_peft()
        except PEFTError:
            return False
        return config.get("peft_type") in configs.config_classes() and not configs.own_method(config)

    def to_peft(self, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, Any]:
        """The configuration, with names that mean the same modules in the root.

        Raises:
            PEFTError: there are no such names, or peft stores this method in another form.
        """
        known = configs.defaults(self.config["peft_type"])
        given, exclude = self.config.get("target_modules") or [], self.config.get("exclude_modules") or []
        names = target_modules(root, set(attached), given, exclude)
        names |= dict.fromkeys(("layers_to_transform", "layers_pattern"))
        for field in ("rank_pattern", "alpha_pattern"):
            patterns = self.config.get(field) or {}
            values = {path: pattern_value(patterns, root.outer(path), None) for path in attached}
            names[field] = {f"^{re.escape(path)}$": value for path, value in values.items() if value is not None}
        fields: dict[str, Any] = self.config | {name: value for name, value in names.items() if name in known}
        self._compare(root, attached, fields)
        return fields

    def peft_tensors(self, root: PeftRoot, attached: Mapping[str, Adapter]) -> dict[str, PeftTensor]:
        """The layers' tensors; what all layers share comes once."""
        found: dict[str, PeftTensor] = {}
        for path, adapter in attached.items():
            layer = cast(PeftLayer, adapter)
            for name, tensor in layer.layer.state_dict(keep_vars=True).items():
                place = "base_model." if name in layer.shared else f"{self.peft_prefix}{path}."
                found[place + re.sub(r"\.default(?=\.|$)", "", name)] = PeftTensor(tensor, tensor)
        return found

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], keys: Sequence[str], root: PeftRoot) -> HFPeft:
        """Where the adapters go is taken from the keys."""
        paths, faults = set[str](), []
        modules = dict(base_modules(root.module))
        for key in keys:
            if not key.startswith(cls.peft_prefix):
                continue  # shared by all layers
            parts = key.removeprefix(cls.peft_prefix).split(".")
            path = next((p for end in range(len(parts), 0, -1) if (p := ".".join(parts[:end])) in modules), None)
            if path is None or not any(True for _ in modules[path].parameters()):
                faults.append(
                    f"{key}: {type(root.module).__name__} has no such module{suggestion('.'.join(parts), modules)}"
                )
            else:
                paths.add(root.outer(path))
        if faults:
            raise PEFTError(faults)
        known = configs.defaults(config["peft_type"])
        fields = {name: value for name, value in config.items() if name in known and value is not None}
        places = {"target_modules": "|".join(map(re.escape, sorted(paths))), "exclude_modules": None}
        places |= dict.fromkeys(("layers_to_transform", "layers_pattern"))
        fields |= {name: value for name, value in places.items() if name in known}
        return cls(config={name: value for name, value in fields.items() if value is not None})

    def _compare(self, root: PeftRoot, attached: Mapping[str, Adapter], fields: Mapping[str, Any]) -> None:
        """Let peft make the adapter anew, and see that it has the same tensors."""
        from peft import get_peft_model_state_dict

        saved = {path for path, _ in base_modules(root.module) if matches(path, root.modules_to_save)}
        model = wrapped(configs.made_config({**fields, "peft_type": self.config["peft_type"]}), root.module, saved)
        theirs: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
        ours = self.peft_tensors(root, attached)
        wrong = sorted(
            {key for key in theirs if key not in ours}
            | {key for key, tensor in ours.items() if key not in theirs or theirs[key].shape != tensor.value.shape}
        )
        if wrong:
            raise PEFTError(f"HFPeft: HF peft stores {self.config['peft_type']} in another form ({wrong[0]}, …)")


def _name_faults(config: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> list[str]:
    """Names in a list that mean nothing: peft is content if one of them means something."""
    faults = []
    for field in ("target_modules", "exclude_modules"):
        names = config.get(field)
        if isinstance(names, list):
            known = dict.fromkeys(path.rpartition(".")[2] for path in modules if path)
            faults += [
                f"config: {field}: {name!r} matches nothing{suggestion(str(name), known)}"
                for name in names
                if not any(matches(path, [name]) for path in modules)
            ]
    return faults
