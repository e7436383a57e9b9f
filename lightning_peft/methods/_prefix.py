"""A prefix of trained keys and values in transformers' attention: how attention sees it, and the adapter that has it.

A model of transformers 5 looks up, by its config, the function that queries, keys and values are handed to. While an
attention module runs under a prefix, its config names a function of ours: that one puts the prefix in front, widens the
mask, and calls the function which the config named before. This is the one place that every attention passes through
with whatever its cache gave it. So no cache holds the prefix: a static one keeps its size, beams are reordered as ever;
encoders and cross-attention, which have no growing cache, take a prefix too; and a checkpointed layer makes it anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.methods._host import Adapter, Base, adapter_dtype, own_class
from lightning_peft.methods._targets import is_conv1d
from lightning_peft.methods.errors import PEFTError

IMPLEMENTATION = "lightning_peft_prefix"
KEY_LAYERS = ("k_proj", "key", "k", "linear_k", "to_k", "k_lin")
HEAD_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "heads")
FUSED_LAYERS = ("qkv_proj", "qkv", "query_key_value", "Wqkv", "c_attn")
"""Names of layers for queries, keys and values together; where `q_attn` stands beside, for keys and values."""
_FUNCTIONS: dict[type, tuple[Any, Callable[..., Any]]] = {}
"""Of each class of attention, transformers' table of attention functions as its module has it, and its eager one."""


class KeyShape(NamedTuple):
    """What one attention module's keys and values look like; grouped queries have fewer heads of keys than queries."""

    heads: int
    key_width: int
    value_width: int


class Prefix(NamedTuple):
    """Keys and values that every query of a row sees beside its own."""

    keys: Tensor
    """(1 or rows, heads, n, key width)."""
    values: Tensor
    """(1 or rows, heads, n, value width)."""
    visible: Tensor | None = None
    """(rows, n), False where a row must not see a key; None: all see all."""


class _Config:
    """The config of an attention module while it runs under a prefix: that of its model, with our function's name."""

    _attn_implementation = IMPLEMENTATION

    def __init__(self, inner: Any, prefix: Prefix) -> None:
        self.inner, self.prefix, self.was_used = inner, prefix, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def attend(base: Base, module: nn.Module, prefix: Prefix, *args: Any, **kwargs: Any) -> Any:
    """Run the attention `module`, whose own forward is `base`, with `prefix` in front of its keys and values.

    Its class must have been given to `prepare`.

    Raises:
        PEFTError: the prefix has another shape than the keys, or the attention is none that can take a prefix.
    """
    attention = cast(Any, module)
    config = attention.config
    attention.config = seen = _Config(config, prefix)
    try:
        output = base(*args, **kwargs)
    finally:
        attention.config = config
    if not seen.was_used:
        raise PEFTError(f"{own_class(module).__name__} did not call transformers' attention function, and so no prefix")
    return output


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **more: Any
) -> Any:
    """What stands in transformers' table: the attention function that the model chose, given the prefix as well."""
    seen = cast(_Config, module.config)
    seen.was_used = True
    prefix, chosen = seen.prefix, seen.inner._attn_implementation
    if fault := implementation_fault(chosen) or _misfit(prefix, key):
        raise PEFTError(f"{own_class(module).__name__}: {fault}")
    n = prefix.keys.shape[2]
    if attention_mask is None and chosen == "sdpa" and query.shape[2] > 1 and _is_causal(module, more):
        # sdpa would mask what is to come by itself, but for a mask of n columns too few
        attention_mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
    mask = _widened(attention_mask, n)
    if prefix.visible is not None:
        mask = _hidden(mask, prefix.visible, key.shape[2], torch.bool if chosen == "sdpa" else query.dtype)
    if more.get("position_bias") is not None:
        # T5's bias says how far a token is; a prefix is at no distance, and P_k has what weight it needs
        more["position_bias"] = F.pad(more["position_bias"], (n, 0))
    functions, eager = _FUNCTIONS[own_class(module)]
    function = functions.get_interface(chosen, eager)
    return function(module, query, _joined(prefix.keys, key), _joined(prefix.values, value), mask, *args, **more)


def _misfit(prefix: Prefix, key: Tensor) -> str | None:
    """Why the prefix can't stand before these keys."""
    rows, heads, _, width = prefix.keys.shape
    if (heads, width) == (key.shape[1], key.shape[3]) and rows in (1, key.shape[0]):
        return None
    return (
        f"the prefix's keys (rows, heads, tokens, width) are {tuple(prefix.keys.shape)}, and can't stand before keys "
        f"{tuple(key.shape)}"
    )


def _joined(prefix: Tensor, own: Tensor) -> Tensor:
    return torch.cat([prefix.to(own.dtype).expand(own.shape[0], -1, -1, -1), own], dim=2)


def _is_causal(module: nn.Module, more: Mapping[str, Any]) -> bool:
    """What sdpa goes by: the argument, then the module."""
    given = more.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _widened(mask: Tensor | None, n: int) -> Tensor | None:
    """The mask (…, keys), boolean or added to the scores, with n more keys in front that all may see."""
    if mask is None:
        return None
    return F.pad(mask, (n, 0), value=True) if mask.dtype == torch.bool else F.pad(mask, (n, 0))


def _hidden(mask: Tensor | None, visible: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """The widened mask, or one of `dtype`, with the keys of the prefix that a row must not see taken out."""
    seen = F.pad(visible[:, None, None], (0, keys), value=True)
    if mask is None:
        mask = torch.ones_like(seen) if dtype == torch.bool else torch.zeros_like(seen, dtype=dtype)
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def _eager_name(cls: type) -> str | None:
    """The name of the eager function that the class's forward would call; None where it looks up no function."""
    names = getattr(getattr(inspect.unwrap(getattr(cls, "forward", cls)), "__code__", None), "co_names", ())
    eager = next((name for name in names if name.endswith("eager_attention_forward")), None)
    return eager if "ALL_ATTENTION_FUNCTIONS" in names else None


def is_attention(module: nn.Module) -> bool:
    """Whether it is attention that looks up its function in transformers' table."""
    return _eager_name(own_class(module)) is not None and hasattr(module, "config")


def prepare(cls: type) -> None:
    """Get a class of attention ready for `attend`: done when an adapter is made or unpickled, as a table that is looked
    up in while a model is compiled must not change."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, _attention)
    names = inspect.unwrap(cast(Any, cls).forward).__globals__
    _FUNCTIONS[cls] = names["ALL_ATTENTION_FUNCTIONS"], names[_eager_name(cls)]


def implementation_fault(chosen: str | None) -> str | None:
    """Why attention of this `attn_implementation` takes no prefix; None where it takes one."""
    if chosen in (None, "eager", "sdpa"):
        return None
    return f"its mask under {chosen!r} can't be widened for a prefix; call model.set_attn_implementation('sdpa') before"


def key_shape(module: nn.Module) -> KeyShape:
    """The shape of the keys and values of an attention module, told from its layers and attributes.

    Raises:
        PEFTError: it can't be told.
    """
    key_width = getattr(module, "qk_head_dim", None) or _first(module, HEAD_WIDTHS)
    value_width = getattr(module, "v_head_dim", None) or key_width
    name = own_class(module).__name__
    if not isinstance(key_width, int) or not isinstance(value_width, int):
        raise PEFTError(f"{name} has none of {', '.join(HEAD_WIDTHS)}, and so the width of its keys is not known")
    heads = _first(module, HEAD_COUNTS) or _first(module.config, HEAD_COUNTS)
    if width := _width(_first(module, KEY_LAYERS)):
        heads = width // key_width
    elif isinstance(heads, int) and (width := _width(_first(module, FUSED_LAYERS))):
        of_queries = 0 if hasattr(module, "q_attn") else heads
        heads = (width // key_width - of_queries) // 2
    if not isinstance(heads, int) or heads < 1:
        raise PEFTError(f"{name} has none of {', '.join(KEY_LAYERS)}, and so the number of its keys is not known")
    return KeyShape(heads, key_width, value_width)


def _width(layer: Any) -> int | None:
    """How many features a linear layer puts out."""
    if layer is None:
        return None
    return cast(int, layer.nf) if is_conv1d(layer) else getattr(layer, "out_features", None)


def _first(thing: Any, names: Sequence[str]) -> Any:
    return next((value for name in names if (value := getattr(thing, name, None)) is not None), None)


class PrefixAdapter(Adapter):
    """Keys and values in front of those of one attention module; a subclass says how they come from what it trains.

    Args:
        module: attention, see `is_attention`.
        num_virtual_tokens: how many.

    Raises:
        PEFTError: the shape of the module's keys can't be told.
    """

    def __init__(self, module: nn.Module, num_virtual_tokens: int) -> None:
        super().__init__()
        self.num_virtual_tokens, self.shape, self.attention = num_virtual_tokens, key_shape(module), own_class(module)
        prepare(self.attention)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        prepare(self.attention)

    def tables(self) -> tuple[Tensor, Tensor]:
        """The keys (n, heads · key width) and values (n, heads · value width), in the adapter's dtype."""
        raise NotImplementedError

    def prefix(self) -> Prefix:
        """The same in attention's layout, for all rows alike."""
        keys, values = self.tables()
        heads, *widths = self.shape
        keys, values = (
            table.view(1, -1, heads, width).transpose(1, 2) for table, width in zip((keys, values), widths, strict=True)
        )
        return Prefix(keys, values)

    def forward(self, base: Base, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return attend(base, module, self.prefix(), *args, **kwargs)

    def forward_rows(
        self, rows: Sequence[Adapter | None], base: Base, module: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        """All rows at once, each seeing its own prefix: a cache can't be split by rows."""
        made = {id(row): row.prefix() for row in rows if isinstance(row, PrefixAdapter)}
        if not made:
            return base(*args, **kwargs)
        n = max(prefix.keys.shape[2] for prefix in made.values())
        padded = {
            key: [F.pad(table, (0, 0, 0, n - table.shape[2])) for table in (prefix.keys, prefix.values)]
            for key, prefix in made.items()
        }
        blank = [torch.zeros_like(table) for table in next(iter(padded.values()))]
        keys, values = (torch.cat(tables) for tables in zip(*(padded.get(id(row), blank) for row in rows), strict=True))
        lengths = [made[id(row)].keys.shape[2] if id(row) in made else 0 for row in rows]
        visible = torch.arange(n, device=keys.device) < torch.tensor(lengths, device=keys.device)[:, None]
        return attend(base, module, Prefix(keys, values, visible), *args, **kwargs)

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        raise PEFTError(
            "merge: a prefix adds keys and values to attention, which no weight of the base can hold; keep it as an "
            "adapter"
        )


class FreePrefix(PrefixAdapter):
    """Keys and values that are trained themselves, from N(0, 1)."""

    def __init__(self, module: nn.Module, num_virtual_tokens: int) -> None:
        super().__init__(module, num_virtual_tokens)
        heads, *widths = self.shape
        self.prefix_keys, self.prefix_values = (
            nn.Parameter(new(module, num_virtual_tokens, heads * width)) for width in widths
        )
        nn.init.normal_(self.prefix_keys)
        nn.init.normal_(self.prefix_values)

    def tables(self) -> tuple[Tensor, Tensor]:
        return self.prefix_keys, self.prefix_values


def new(module: nn.Module, *shape: int) -> Tensor:
    """Memory for an adapter's tensor, on the device of the attention module and in the dtype that goes with it."""
    like = next(module.parameters())
    return torch.empty(shape, dtype=adapter_dtype(like), device=like.device)
