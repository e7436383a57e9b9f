"""Where a model has its transformer blocks, and in each its attention and its feed-forward: told by structure, so that
it holds for transformers' models and for others."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from lightning_peft.methods._host import Host, own_class
from lightning_peft.methods._targets import base_modules, inside, is_conv1d

OUTPUT = re.compile(
    r"(o|out|output|dense)(_proj|_projection|_lin)?|wo|(c_)?proj|projection(_layer)?|(to|linear|attention)_out|post",
    re.IGNORECASE,
)
"""Names that attention's output projection has in transformers 5.23."""
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Attention:
    """One attention sublayer, to the block's own input or to another sequence."""

    path: str
    """The module that has the heads and calls the projections to queries, keys and values."""
    output: str
    """The module whose output is the sublayer's: the output projection, or `path` itself for nn.MultiheadAttention,
    which reads its projection's weight and never calls it."""


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward sublayer."""

    inputs: tuple[str, ...]
    """The projections that read the sublayer's input: one, or a gate and an up projection."""
    output: str
    """The projection whose output is the sublayer's. A mixture of experts has its whole module as input and output."""


@dataclass(frozen=True)
class Block:
    """One of a model's repeated blocks; paths are from the model's root."""

    path: str
    width: int
    """Features of what it reads and gives, in the last dimension."""
    attention: tuple[Attention, ...]
    feed_forward: FeedForward | None


class _Features(NamedTuple):
    read: int
    given: int


def find_blocks(model: nn.Module) -> list[Block]:
    """The transformer blocks of `model` in its own order, adapters passed over; empty where none can be told.

    Blocks are the items of a ModuleList or Sequential of which at least one has both an attention and a feed-forward;
    of nested lists, the innermost. An attention is a module with a number of heads, or their size, among its
    attributes, and linear layers.
    """
    modules = dict(base_modules(model))
    found: dict[str, Block] = {}
    # inner lists come before the ones that they are in
    for path, module in reversed(modules.items()):
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(_within(other, path) for other in found):
            continue
        items = {f"{path}.{name}" if path else name: item for name, item in module._modules.items() if item is not None}
        blocks = [_block(item_path, item) for item_path, item in items.items()]
        if any(block.attention and block.feed_forward for block in blocks):
            found |= {block.path: block for block in blocks if block.attention or block.feed_forward}
    # a block that stands in several places has its first path
    first: dict[int, str] = {}
    for path, module in modules.items():
        first.setdefault(id(module), path)
    return [found[path] for path, module in modules.items() if path in found and first[id(module)] == path]


def repeated_modules(model: nn.Module) -> dict[str, nn.Module]:
    """What `model` is mostly made of, by path: the layers that transformers would checkpoint, and beside them the
    transformer blocks of other models; where there is neither, the repeated items of innermost lists."""
    modules, layer = dict(base_modules(model)), _checkpointing_layer()
    layers: dict[str, nn.Module] = {}
    for path, module in modules.items():
        if isinstance(module, layer) and not inside(path, layers):
            layers[path] = module
    for block in find_blocks(model):
        if not inside(block.path, layers) and not any(inside(path, {block.path}) for path in layers):
            layers[block.path] = modules[block.path]
    return layers or _repeated_items(modules)


def _checkpointing_layer() -> Any:
    """transformers' class, for isinstance, where it has been imported; else none."""
    return getattr(sys.modules.get("transformers.modeling_layers"), "GradientCheckpointingLayer", ())


def _repeated_items(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for path, module in reversed(modules.items()):
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        items = {f"{path}.{name}": item for name, item in module.named_children() if _is_composed(item)}
        kinds = [own_class(item) for item in items.values()]
        if not any(inside(other, items) for other in found):
            found |= {name: item for name, item in items.items() if kinds.count(own_class(item)) > 1}
    return found


def _is_composed(module: nn.Module) -> bool:
    """Whether it is made of other modules and not just a list of them; a layer alone has nothing to gain."""
    children = [name for name in module._modules if not (isinstance(module, Host) and name == "adapters")]
    return bool(children) and not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))


def _block(path: str, module: nn.Module) -> Block:
    modules = {inner: each for inner, each in base_modules(module, path) if inner != path}
    linears = {inner: features for inner, each in modules.items() if (features := _features(each)) is not None}
    # the residual stream is read and written by every sublayer
    sizes = Counter(size for features in linears.values() for size in features)
    if not sizes:
        return Block(path, 0, (), None)
    width = sizes.most_common(1)[0][0]
    attention, taken = [], set()
    for core in _attention_cores(modules, linears):
        owner, output = _attention_output(path, core, modules, linears, width)
        taken.add(owner)
        if output is not None:
            attention.append(Attention(core, output))
    others = {inner: each for inner, each in modules.items() if not inside(inner, taken)}
    rest = {inner: features for inner, features in linears.items() if inner in others}
    feed_forward = _fused_experts(path, others, width) or _feed_forward(path, others, rest, width)
    return Block(path, width, tuple(attention), feed_forward)


def _features(module: nn.Module) -> _Features | None:
    if isinstance(module, nn.Linear):
        return _Features(module.in_features, module.out_features)
    return _Features(*module.weight.shape) if is_conv1d(module) else None  # type: ignore[misc]


def _attention_cores(modules: Mapping[str, nn.Module], linears: Iterable[str]) -> list[str]:
    cores: list[str] = []
    for path, module in modules.items():
        has_heads = any("head" in name and type(value) is int for name, value in vars(module).items())
        if has_heads and not inside(path, cores) and any(inside(linear, {path}) for linear in linears):
            cores.append(path)
    return cores


def _attention_output(
    block: str, core: str, modules: Mapping[str, nn.Module], linears: Mapping[str, _Features], width: int
) -> tuple[str, str | None]:
    """The module that holds the whole sublayer, and the path of its output."""
    if isinstance(modules[core], nn.MultiheadAttention):
        return core, core
    around = _parent(core)
    while around != block:
        others = [path for path in linears if inside(path, {around}) and not inside(path, {core})]
        if len(others) == 1 and linears[others[0]].given == width:
            # as in BERT: the heads in one module, the output projection in another beside it
            return around, others[0]
        if others:
            break
        around = _parent(around)
    own = [path for path, features in linears.items() if inside(path, {core}) and features.given == width]
    # of several that give the block's width, queries among them, the name tells; where none does, the order
    named = [path for path in own if any(OUTPUT.fullmatch(part) for part in path.removeprefix(core).split("."))]
    last = (named or own)[-1:]
    return core, last[0] if last else None


def _fused_experts(block: str, modules: Mapping[str, nn.Module], width: int) -> FeedForward | None:
    """A mixture whose experts' weights are stacked in parameters of three dimensions."""
    owners = [
        path
        for path, module in modules.items()
        if not isinstance(module, CONVS)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 3 and len(parameter) > 1 and width in parameter.shape[1:]
    ]
    if len(owners) < 2:
        return None
    mixture = _common(owners)
    if mixture in owners and _parent(mixture) != block:
        # the router stands beside the experts
        mixture = _parent(mixture)
    return None if mixture == block else FeedForward((mixture,), mixture)


def _feed_forward(
    block: str, modules: Mapping[str, nn.Module], linears: Mapping[str, _Features], width: int
) -> FeedForward | None:
    """The pair of projections with the widest inner layer; of equal ones, the last."""

    def inputs_of(output: str) -> list[str]:
        inner = linears[output].read
        # a gate and an up projection can be fused into one of twice the width
        reading = [_Features(width, inner), _Features(width, 2 * inner)]
        return [path for path, features in linears.items() if path != output and features in reading]

    outputs = [path for path, features in linears.items() if features.given == width and inputs_of(path)]
    for path in [path for path, module in modules.items() if isinstance(module, (nn.ModuleList, nn.ModuleDict))]:
        experts = {output.removeprefix(path).split(".")[1] for output in outputs if inside(output, {path})}
        if len(experts) > 1 and _parent(path) != block:
            # a mixture whose experts are modules of their own
            return FeedForward((_parent(path),), _parent(path))
    if not outputs:
        return None
    widest = max(linears[path].read for path in outputs)
    output = [path for path in outputs if linears[path].read == widest][-1]
    depths = {path: len(_common([path, output])) for path in inputs_of(output)}
    nearest = tuple(path for path, depth in depths.items() if depth == max(depths.values()))
    return FeedForward(nearest, output)


def _within(path: str, outer: str) -> bool:
    return not outer or inside(path, {outer})


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _common(paths: Iterable[str]) -> str:
    """The path of the innermost module that is or holds all of them."""
    parts = [path.split(".") for path in paths]
    same = 0
    while all(same < len(each) and each[same] == parts[0][same] for each in parts):
        same += 1
    return ".".join(parts[0][:same])
