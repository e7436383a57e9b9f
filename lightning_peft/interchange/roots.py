"""Which module of a model an adapter directory, or a merged model, is about: the one that other libraries load."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from torch import nn

from lightning_peft.methods._host import hosts
from lightning_peft.methods._targets import base_modules
from lightning_peft.methods._targets import is_transformers_model as is_transformers_model


def peft_root(model: nn.Module) -> tuple[str, nn.Module]:
    """The path and the module below which names mean the same to HF peft and to transformers.

    It is the outermost transformers model that holds every adapted module and every one that is trained whole. Where
    there is none, it is `model` itself, or, for a LightningModule, its only child that holds adapters. Before anything
    is injected, every transformers model will do, and every child with parameters, as long as there is only one.

    Returns:
        The path, empty for `model` itself, and the module.
    """
    needed = {id(host) for _, host in hosts(model)}
    holding = [
        (path, module)
        for path, module in base_modules(model)
        if is_transformers_model(module) and needed <= {id(inner) for inner in module.modules()}
    ]
    if holding:
        path, root = holding[0]
        inside = {id(module) for module in root.modules()}
        if all(id(module) in inside for _, module in holding):
            return path, root
    if not isinstance(model, LightningModule):
        return "", model
    children = [(name, child) for name, child in model.named_children() if _takes_part(child, bool(needed))]
    return children[0] if len(children) == 1 else ("", model)


def _takes_part(child: nn.Module, injected: bool) -> bool:
    things = hosts(child) if injected else child.parameters()
    return any(True for _ in things)
