"""`target_modules` of the methods that stand one adapter on a whole layer: what it means, and what a layer must be."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence

from torch import Tensor, nn

from lightning_peft.methods._host import own_tensors
from lightning_peft.methods._targets import ALL_LINEAR, base_modules, find, inside, is_conv1d, matches, output_heads
from lightning_peft.methods.base import Attachment
from lightning_peft.methods.errors import PEFTError

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def targeted(
    model: nn.Module,
    patterns: str | Sequence[str],
    usable: Callable[[nn.Module], bool],
    exclude: str | Sequence[str],
    skip: Container[str],
    describe: Callable[[nn.Module], str],
) -> tuple[dict[str, nn.Module], list[str]]:
    """The modules by path that `target_modules` means, and what is wrong with it; see `_targets.find`."""
    if patterns != ALL_LINEAR:
        return find("target_modules", patterns, dict(base_modules(model)), usable, exclude, skip, describe)
    linear = {path: module for path, module in linear_layers(model).items() if usable(module)}
    if not linear:
        return {}, [
            f"target_modules: {ALL_LINEAR!r} matches nothing; {type(model).__name__} has no linear layer that can be "
            "adapted"
        ]
    return find("target_modules", r".*", linear, usable, exclude, skip, describe)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every Linear, Conv1D and MultiheadAttention outside of the output head, by path: what "all-linear" means."""
    heads = output_heads(model)
    return {
        path: module
        for path, module in base_modules(model)
        if (isinstance(module, (nn.Linear, nn.MultiheadAttention)) or is_conv1d(module)) and not inside(path, heads)
    }


def with_attention_outputs(found: Mapping[str, nn.Module], exclude: str | Sequence[str]) -> dict[str, nn.Module]:
    """The modules, and the output layer of each nn.MultiheadAttention among them, which is part of its attention."""
    outputs = {
        f"{path}.out_proj": module.out_proj
        for path, module in found.items()
        if isinstance(module, nn.MultiheadAttention) and not matches(f"{path}.out_proj", exclude)
    }
    return {**found, **{path: module for path, module in outputs.items() if path not in found}}


def in_attention(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether `path` is a layer of nn.MultiheadAttention, which reads its output layer's tensors and never calls it."""
    return bool(path) and isinstance(modules[path.rpartition(".")[0]], nn.MultiheadAttention)


def weight_of(module: nn.Module, name: str = "weight") -> Tensor:
    """The layer's own weight.

    Raises:
        PEFTError: it is computed, or has no shape yet.
    """
    weight = own_tensors(module).get(name)
    if weight is None:
        raise PEFTError(
            f"{type(module).__name__} computes its {name}, by a parametrization say; remove that first "
            "(torch.nn.utils.parametrize.remove_parametrizations) or exclude the module"
        )
    if isinstance(weight, nn.UninitializedParameter):
        raise PEFTError(f"{type(module).__name__} has no shape yet; run one batch through the model first")
    return weight


def once(attachments: Iterable[Attachment]) -> list[Attachment]:
    """The attachments without those for a module that an earlier one stands on already, under another name."""
    first: dict[int, Attachment] = {}
    for attachment in attachments:
        first.setdefault(id(attachment.module), attachment)
    return list(first.values())
