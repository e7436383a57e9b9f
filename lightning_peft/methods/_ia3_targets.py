"""Which layers of a model project keys and values, and which project a feed-forward block's activation: what (IA)³
scales where nothing else is said.

Told by names, since no structure sets a key from a query. In transformers 5.23, of 553 types of model, keys and values
are found in 512 and feed-forward blocks in 489; most others are convolutional, have no attention or fuse experts.
"""

from __future__ import annotations

import re

from torch import nn

from lightning_peft.methods._targets import base_modules, inside, is_conv1d, output_heads

KEY_OR_VALUE = re.compile(
    r"[kv]_(proj|lin)|(key|value)_(proj|layer)|(to|linear|project)_(k|v|kv|key|value)|projection_(key|value)|kv_b?_?proj"
    # layers that project the query as well
    r"|query_key_value|(to_)?qkv|qkv_proj|Wqkv|c_attn|att_proj"
)
KEY_OR_VALUE_IN_ATTENTION = re.compile(r"k|v|kv|key|value|in_proj")
"""Names that other layers have too, and that mean a key or value in a module that is named for attention."""
FEED_FORWARD = re.compile(
    r"down_proj|proj_down|fc2|fc_out|wo|w2|w_out|lin2|linear_?2|linear_fc2|linear_down|dense_4h_to_h|ffn_output|output_dense"
    # names that attention's output layer has too
    r"|(mlp|ff|ffn|feed_forward)\.(c_proj|Wo|out_proj|proj_out|layer_2|output)|output(_query)?\.dense"
)
"""The end of the path of a feed-forward block's last layer."""


def found_projections(model: nn.Module) -> tuple[dict[str, nn.Module], set[str]]:
    """Layers that project keys or values, or a feed-forward block's activation, by path, output heads left out; and
    which of them are the latter."""
    heads = output_heads(model)
    found: dict[str, nn.Module] = {}
    feed_forward: set[str] = set()
    for path, module in base_modules(model):
        if not path or inside(path, heads):
            continue
        if isinstance(module, nn.MultiheadAttention):
            found[path] = module
        elif isinstance(module, nn.Linear) or is_conv1d(module):
            *outer, name = path.removesuffix(".linear").split(".")
            is_attention = any("att" in part.lower() for part in outer[-3:])
            if KEY_OR_VALUE.fullmatch(name) or (is_attention and KEY_OR_VALUE_IN_ATTENTION.fullmatch(name)):
                found[path] = module
            elif _is_feed_forward(outer, name):
                found[path] = module
                feed_forward.add(path)
    return found, feed_forward


def _is_feed_forward(outer: list[str], name: str) -> bool:
    if any("att" in part.lower() for part in outer[-2:]):
        return False
    return any(FEED_FORWARD.fullmatch(end) for end in (name, ".".join([*outer[-1:], name])))
