"""LoRA's fields: what is said of every wrong one, alone and together, before a model is seen and when it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import DoRA, LoRA, PEFTError, inject

INITS = "default, gaussian, pissa, pissa_niter_16, olora, loftq"
WRONG_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "r 0": ({"r": 0}, "r: 0 is not a rank; it must be 1 or more"),
    "r negative": ({"r": -3}, "r: -3 is not a rank; it must be 1 or more"),
    "alpha": ({"alpha": 0.0}, "alpha: 0.0 would switch the adapter off; it must not be 0"),
    "dropout 1": ({"dropout": 1.0}, "dropout: 1.0 is not a probability below 1; it must be in [0, 1)"),
    "dropout negative": ({"dropout": -0.1}, "dropout: -0.1 is not a probability below 1; it must be in [0, 1)"),
    "dropout nan": ({"dropout": float("nan")}, "dropout: nan is not a probability below 1; it must be in [0, 1)"),
    "no targets": ({"target_modules": []}, "target_modules: is empty, and target_parameters too; name at least one"),
    "empty target": ({"target_modules": ""}, "target_modules: is empty, and target_parameters too; name at least one"),
    "lora_plus": ({"lora_plus": 0.0}, "lora_plus: 0.0 is not a ratio of learning rates; it must be above 0"),
    "lora_plus negative": ({"lora_plus": -16}, "lora_plus: -16 is not a ratio of learning rates; it must be above 0"),
    "init": ({"init": "pisa"}, f"init: 'pisa' is none of {INITS}; did you mean 'pissa'?"),
    "init without likeness": ({"init": "zzz"}, f"init: 'zzz' is none of {INITS}"),
    "init in capitals": ({"init": "OLoRA"}, f"init: 'OLoRA' is none of {INITS}; did you mean 'olora'?"),
    "init without iterations": (
        {"init": "pissa_niter_0"},
        f"init: 'pissa_niter_0' is none of {INITS}; did you mean 'pissa_niter_16' or 'pissa'?",
    ),
    "rank_pattern": ({"rank_pattern": {"query": 0}}, "rank_pattern: 'query' has rank 0; it must be 1 or more"),
    "rank_pattern expression": (
        {"rank_pattern": {"a(": 2}},
        "rank_pattern: 'a(' is not a regular expression (missing ), unterminated subpattern at position 1)",
    ),
    "alpha_pattern expression": (
        {"alpha_pattern": {"[": 2}},
        "alpha_pattern: '[' is not a regular expression (unterminated character set at position 0)",
    ),
    "target expression": (
        {"target_modules": "*.query"},
        "target_modules: '*.query' is not a regular expression (nothing to repeat at position 0)",
    ),
    "exclude expression": (
        {"exclude_modules": "b)"},
        "exclude_modules: 'b)' is not a regular expression (unbalanced parenthesis at position 1)",
    ),
}


def message(method: type[LoRA], **fields: Any) -> str:
    with pytest.raises(PEFTError) as caught:
        method(**fields)
    return str(caught.value)


@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize("fault", WRONG_FIELDS)
def test_wrong_field_is_told(fault: str, method: type[LoRA]) -> None:
    fields, expected = WRONG_FIELDS[fault]
    assert message(method, **fields) == f"{method.__name__}.{expected}"


def test_all_wrong_fields_are_told_at_once() -> None:
    together = ["r 0", "alpha", "dropout 1", "no targets", "lora_plus", "init", "rank_pattern", "exclude expression"]
    fields = {name: value for fault in together for name, value in WRONG_FIELDS[fault][0].items()}
    assert message(LoRA, **fields).splitlines() == [f"LoRA.{WRONG_FIELDS[fault][1]}" for fault in together]


def test_alpha_pattern_of_zero_is_told() -> None:
    assert message(LoRA, alpha_pattern={"query": 0}).startswith("LoRA.alpha_pattern: 'query'")


def test_rank_that_is_no_whole_number_is_told() -> None:
    assert message(LoRA, r=2.5) == "LoRA.r: 2.5 is not a rank; it must be 1 or more"


def test_fields_at_the_edge_are_taken() -> None:
    method = LoRA(r=1, alpha=-2, dropout=0.99, lora_plus=1e-3, init="pissa_niter_1", target_modules=r"a\.b")
    assert method.fields() == {
        "r": 1,
        "alpha": -2,
        "dropout": 0.99,
        "target_modules": r"a\.b",
        "target_parameters": [],
        "exclude_modules": [],
        "rank_pattern": {},
        "alpha_pattern": {},
        "rslora": False,
        "init": "pissa_niter_1",
        "lora_plus": 1e-3,
    }
    assert LoRA() == LoRA(r=8, alpha=16, dropout=0.0, target_modules="all-linear", init="default", lora_plus=None)


def model() -> nn.Module:
    return nn.ModuleDict(
        {
            "first": nn.Linear(4, 3),
            "grouped": nn.Conv2d(4, 6, 3, groups=2),
            "words": nn.Embedding(5, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "norm": nn.LayerNorm(4),
            "bilinear": nn.Bilinear(3, 3, 3),
        }
    )


NAMES = "first, grouped, words, attention, out_proj"
REACH = "multiplies its input with the weights itself, where dropout can't reach; set it to 0 or exclude the module"
WRONG_ON_MODEL: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no such module": (
        {"target_modules": ["frist"]},
        ["target_modules: 'frist' matches nothing; did you mean 'first'?"],
    ),
    "nothing like it": (
        {"target_modules": ["zzz"]},
        [f"target_modules: 'zzz' matches nothing; names that can be: {NAMES}"],
    ),
    "two of three": (
        {"target_modules": ["first", "frist", "word"]},
        [
            "target_modules: 'frist' matches nothing; did you mean 'first'?",
            "target_modules: 'word' matches nothing; did you mean 'words'?",
        ],
    ),
    "not adaptable": (
        {"target_modules": ["norm"]},
        [f"target_modules: 'norm' matches norm, a LayerNorm, which can not be adapted; names that can be: {NAMES}"],
    ),
    "rank and groups": (
        {"r": 3, "target_modules": ["grouped"]},
        ["target_modules: grouped: r: 3 is no multiple of the layer's 2 groups; it must be"],
    ),
    "groups and a start from the weight": (
        {"r": 2, "init": "pissa", "target_modules": ["grouped"]},
        [
            "target_modules: grouped: init: 'pissa' has no meaning for a layer with groups; exclude it or choose "
            "'default'"
        ],
    ),
    "rank too large for the weight": (
        {"r": 5, "init": "pissa", "target_modules": ["first", "words"]},
        [
            "target_modules: first: r: 5 is more than the 3 that init 'pissa' can take from a weight of (3, 4)",
            "target_modules: words: r: 5 is more than the 4 that init 'pissa' can take from a weight of (4, 5)",
        ],
    ),
    "rank too large by iterations": (
        {"r": 4, "init": "pissa_niter_2", "target_modules": ["first"]},
        ["target_modules: first: r: 4 is more than the 3 that init 'pissa_niter_2' can take from a weight of (3, 4)"],
    ),
    "rank too large for QR": (
        {"init": "olora", "target_modules": ["first"]},
        ["target_modules: first: r: 8 is more than the 3 that init 'olora' can take from a weight of (3, 4)"],
    ),
    "dropout in attention": (
        {"dropout": 0.1, "target_modules": ["attention"]},
        [
            f"target_modules: attention: dropout: a MultiheadAttention {REACH}",
            f"target_modules: attention.out_proj: dropout: a NonDynamicallyQuantizableLinear {REACH}",
        ],
    ),
    "weight of one dimension": (
        {"target_parameters": ["first.bias"]},
        [
            "target_parameters: 'first.bias' matches first.bias, of shape (3,), which can not be adapted; names that "
            "can be: weight, in_proj_weight"
        ],
    ),
    "weight and its module": (
        {"target_modules": ["attention"], "target_parameters": ["attention.in_proj_weight"]},
        ["target_parameters: attention is in target_modules too"],
    ),
    "patterns that match nothing": (
        {"target_modules": ["first"], "rank_pattern": {"words": 2}, "alpha_pattern": {"frist": 3}},
        [
            "rank_pattern: 'words' matches no targeted module",
            "alpha_pattern: 'frist' matches no targeted module; did you mean 'first'?",
        ],
    ),
    "exclusion that matches nothing": (
        {"target_modules": ["first"], "exclude_modules": ["word"]},
        ["exclude_modules: 'word' matches nothing; did you mean 'words' or 'norm'?"],
    ),
    "several at once": (
        {"r": 3, "target_modules": ["frist", "grouped"], "target_parameters": ["gate"], "rank_pattern": {"zzz": 2}},
        [
            "target_modules: 'frist' matches nothing; did you mean 'first'?",
            "target_parameters: 'gate' matches nothing; names that can be: weight, in_proj_weight",
            "rank_pattern: 'zzz' matches no targeted module",
            "target_modules: grouped: r: 3 is no multiple of the layer's 2 groups; it must be",
        ],
    ),
}


def assert_refused(base: nn.Module, method: LoRA, faults: list[str]) -> None:
    before, classes = copy.deepcopy(base.state_dict()), [type(module) for module in base.modules()]
    trainable = [p.requires_grad for p in base.parameters()]
    with pytest.raises(PEFTError) as caught:
        inject(base, method)
    assert list(caught.value.faults) == [f"{type(method).__name__}.{fault}" for fault in faults]
    assert [type(module) for module in base.modules()] == classes
    assert [p.requires_grad for p in base.parameters()] == trainable
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize("fault", WRONG_ON_MODEL)
def test_field_that_does_not_fit_the_model_is_told_and_the_model_untouched(fault: str, method: type[LoRA]) -> None:
    fields, faults = WRONG_ON_MODEL[fault]
    assert_refused(model(), method(**fields), faults)


def test_dropout_on_target_parameters_is_told_beside_other_faults() -> None:
    method = LoRA(dropout=0.1, target_modules=["frist"], target_parameters=["bilinear.weight"])
    faults = [
        "target_modules: 'frist' matches nothing; did you mean 'first'?",
        "dropout: 0.1 can't act on target_parameters (bilinear); set it to 0",
    ]
    assert_refused(model(), method, faults)


def test_each_exclusion_has_to_match() -> None:
    method = LoRA(target_modules=["first"], exclude_modules=["words", "norn"])
    assert_refused(model(), method, ["exclude_modules: 'norn' matches nothing; did you mean 'norm'?"])


def test_all_linear_written_otherwise_is_suggested() -> None:
    method = LoRA(target_modules="all_linear")
    assert_refused(model(), method, ["target_modules: 'all_linear' matches nothing; did you mean 'all-linear'?"])


def test_layer_without_a_shape_yet_is_told() -> None:
    lazy = nn.ModuleDict({"lazy": nn.LazyLinear(3)})
    with pytest.raises(PEFTError) as caught:
        inject(lazy, LoRA(target_modules=["lazy"]))
    assert str(caught.value) == (
        "LoRA.target_modules: lazy: LazyLinear has no shape yet; run one batch through the model first"
    )
    assert type(lazy["lazy"]) is nn.LazyLinear


def test_layer_without_a_shape_that_is_no_target_is_told_before_anything_is_attached() -> None:
    mixed = nn.ModuleDict({"first": nn.Linear(4, 3), "lazy": nn.LazyLinear(3)})
    with pytest.raises(PEFTError, match="lazy: LazyLinear has no shape yet; run one batch through the model first"):
        inject(mixed, LoRA(target_modules=["first"]))
    assert type(mixed["first"]) is nn.Linear


@pytest.mark.parametrize("normed", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_layer_whose_weight_is_computed_is_adapted_or_told(normed: Callable[[nn.Module], nn.Module]) -> None:
    base = nn.Sequential(normed(nn.Linear(4, 3))).eval()
    x = torch.randn(2, 4)
    expected = base(x)
    told = ""
    try:
        inject(base, LoRA(target_modules=["0"]))
    except PEFTError as error:
        told = str(error)
    assert told == "" or "LoRA.target_modules: 0: ParametrizedLinear computes its weight" in told
    torch.testing.assert_close(base(x), expected, rtol=1e-6, atol=1e-6)


def test_unknown_and_positional_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'rank'"):
        LoRA(rank=8)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="takes 1 positional argument but 2 were given"):
        LoRA(8)  # type: ignore[misc]
