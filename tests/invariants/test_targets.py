"""What is targeted, and what is said where a name means nothing: all faults, and the model is left as it was."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_peft import METHODS, LoRA, PEFTError, inject
from lightning_peft.injection import adapters
from lightning_peft.methods._prefix_method import PrefixMethod

from .cases import Encoder, bert, gpt2, llama, mixtral, stack, t5
from .checks import assert_same_bits, bits, frame

TARGETED = {
    name: cls
    for name, cls in METHODS.items()
    # a prefix is for attention alone: tests/methods/test_prefix_targets.py
    if "target_modules" in {f.name for f in dataclasses.fields(cls)} and not issubclass(cls, PrefixMethod)
}
LORA_LIKE = {name: cls for name, cls in METHODS.items() if issubclass(cls, LoRA)}
targeted = pytest.mark.parametrize("name", TARGETED)
lora_like = pytest.mark.parametrize("name", LORA_LIKE)
quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
BERT_NAMES = "word_embeddings, position_embeddings, token_type_embeddings, query, key, value, dense, classifier"


def fitting(name: str) -> dict[str, int]:
    """Fields with which the method fits layers of 12, 16 and 20 features."""
    return {"r": 4} if "r" in {field.name for field in dataclasses.fields(METHODS[name])} else {}


def faults_of(
    model: nn.Module, name: str, *, save: object = (), adapter_name: str = "default", **fields: object
) -> list[str]:
    """What is said, having seen that the model is untouched."""
    own, before = frame(model), bits(model)
    with pytest.raises(PEFTError) as error:
        inject(model, METHODS[name](**fields), modules_to_save=save, adapter_name=adapter_name)  # type: ignore[arg-type]
    assert frame(model) == own
    assert_same_bits(bits(model), before)
    assert str(error.value) == "\n".join(error.value.faults)
    return list(error.value.faults)


@targeted
def test_a_target_that_matches_nothing_names_the_nearest_modules(name: str):
    nearest = f"{name}.target_modules: 'quary' matches nothing; did you mean 'query'?"
    assert faults_of(bert(), name, target_modules=["quary"]) == [nearest]


@lora_like
def test_a_target_that_is_near_nothing_is_answered_with_the_names_there_are(name: str):
    faults = faults_of(bert(), name, target_modules=["zzz"])
    assert faults == [f"{name}.target_modules: 'zzz' matches nothing; names that can be: {BERT_NAMES}"]


@lora_like
def test_a_module_that_can_not_be_adapted_is_named_with_its_kind(name: str):
    assert faults_of(bert(), name, target_modules=["LayerNorm"]) == [
        f"{name}.target_modules: 'LayerNorm' matches bert.embeddings.LayerNorm, a LayerNorm, which can not be adapted; "
        f"names that can be: {BERT_NAMES}"
    ]


@lora_like
def test_all_faults_are_told_at_once(name: str):
    fields = {
        "target_modules": ["quary", "valeu", "key"],
        "exclude_modules": ["dens"],
        "target_parameters": ["weigth"],
        "rank_pattern": {"kee": 3},
    }
    assert faults_of(bert(), name, save=["clasifier"], adapter_name="a.b", **fields) == [
        "modules_to_save: 'clasifier' matches nothing; did you mean 'classifier' or 'layer'?",
        "adapter_name: 'a.b' can't be one: it must be without dots, and no attribute of ModuleDict",
        f"{name}.target_modules: 'quary' matches nothing; did you mean 'query'?",
        f"{name}.target_modules: 'valeu' matches nothing; did you mean 'value'?",
        f"{name}.exclude_modules: 'dens' matches nothing; did you mean 'dense'?",
        f"{name}.target_parameters: 'weigth' matches nothing; did you mean 'weight'?",
        f"{name}.rank_pattern: 'kee' matches no targeted module; did you mean 'key'?",
    ]


@lora_like
def test_wrong_fields_are_told_at_once(name: str):
    with pytest.raises(PEFTError) as error:
        METHODS[name](r=0, alpha=0, dropout=1.0, init="pisa", lora_plus=-1, target_modules=[], exclude_modules="(")  # type: ignore[call-arg]
    assert error.value.faults == (
        f"{name}.r: 0 is not a rank; it must be 1 or more",
        f"{name}.alpha: 0 would switch the adapter off; it must not be 0",
        f"{name}.dropout: 1.0 is not a probability below 1; it must be in [0, 1)",
        f"{name}.target_modules: is empty, and target_parameters too; name at least one",
        f"{name}.lora_plus: -1 is not a ratio of learning rates; it must be above 0",
        f"{name}.init: 'pisa' is none of default, gaussian, pissa, pissa_niter_16, olora, loftq; did you mean 'pissa'?",
        f"{name}.exclude_modules: '(' is not a regular expression (missing ), unterminated subpattern at position 0)",
    )


@lora_like
@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"target_modules": "quer"}, "target_modules: 'quer' matches nothing; did you mean 'query'?"),
        (
            {"target_modules": ["query"], "exclude_modules": ["query"]},
            "target_modules: all that 'query' matches is left out by exclude_modules or modules_to_save",
        ),
        (
            {"target_modules": ["query"], "rank_pattern": {"quary": 2}},
            "rank_pattern: 'quary' matches no targeted module; did you mean 'query'?",
        ),
        (
            {"target_modules": ["query"], "init": "pissa", "r": 17},
            "target_modules: bert.encoder.layer.0.attention.self.query: r: 17 is more than the 16 that init 'pissa' "
            "can take from a weight of (16, 16)",
        ),
    ],
)
def test_one_fault(name: str, fields: dict[str, object], fault: str):
    assert faults_of(bert(), name, **fields) == [f"{name}.{fault}"]


@lora_like
def test_layers_that_a_rank_or_shape_does_not_fit(name: str):
    model = stack(layer=nn.Conv2d(4, 4, 1, groups=4), lazy=nn.LazyLinear(3))
    assert _told(model, name, ["layer"], r=6) == [
        f"{name}.target_modules: layer: r: 6 is no multiple of the layer's 4 groups; it must be"
    ]
    assert _told(model, name, ["lazy"], r=4) == [
        f"{name}.target_modules: lazy: LazyLinear has no shape yet; run one batch through the model first"
    ]


def _told(model: nn.Module, name: str, targets: list[str], r: int) -> list[str]:
    with pytest.raises(PEFTError) as error:
        inject(model, METHODS[name](target_modules=targets, r=r))  # type: ignore[call-arg]
    return list(error.value.faults)


@targeted
def test_modules_to_save_must_be_a_list_of_modules_with_parameters(name: str):
    assert faults_of(bert(), name, save="classifier", **fitting(name)) == [
        "modules_to_save: 'classifier' is a string; give a list, ['classifier']"
    ]
    assert faults_of(bert(), name, save=["dropout"], **fitting(name)) == [
        "modules_to_save: 'dropout' matches bert.embeddings.dropout, a Dropout without parameters, which can not be "
        "adapted; names that can be: bert, embeddings, word_embeddings, position_embeddings, token_type_embeddings, "
        "LayerNorm, encoder, layer and 11 more"
    ]


LAYER = "bert.encoder.layer.0"
IN_ATTENTION = [f"{LAYER}.attention.self.{name}" for name in ("query", "key", "value")]
DENSE = [f"{LAYER}.attention.output.dense", f"{LAYER}.intermediate.dense", f"{LAYER}.output.dense", "bert.pooler.dense"]


@lora_like
@pytest.mark.parametrize(
    ("build", "fields", "paths"),
    [
        (bert, {}, [*IN_ATTENTION, *DENSE]),
        (bert, {"exclude_modules": ["dense"]}, IN_ATTENTION),
        (bert, {"exclude_modules": r".*\.(dense|key)"}, [IN_ATTENTION[0], IN_ATTENTION[2]]),
        (bert, {"target_modules": r".*\.(query|value)"}, [IN_ATTENTION[0], IN_ATTENTION[2]]),
        (bert, {"target_modules": ["self.query", IN_ATTENTION[2]]}, [IN_ATTENTION[0], IN_ATTENTION[2]]),
        (gpt2, {}, [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]),
        (
            Encoder,
            {},
            [f"encoder.layers.0.{name}" for name in ("self_attn", "self_attn.out_proj", "linear1", "linear2")],
        ),
        (mixtral("eager"), {}, [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]),
        (mixtral("eager"), {"target_modules": [], "target_parameters": ["down_proj"]}, ["model.layers.0.mlp.experts"]),
    ],
)
def test_what_patterns_mean(name: str, build, fields: dict[str, object], paths: list[str]):
    assert [*adapters(inject(build(), METHODS[name](**fields)), "default")] == paths  # type: ignore[arg-type]


@lora_like
@pytest.mark.parametrize(
    ("build", "head"), [(bert, "classifier"), (gpt2, "lm_head"), (llama, "lm_head"), (t5, "lm_head")]
)
def test_all_linear_is_every_linear_layer_but_the_head(name: str, build, head: str):
    model = build()
    linear = {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) or "Conv1D" in repr(type(module))
    }
    assert {*adapters(inject(model, METHODS[name]()), "default")} == linear - {head}


@targeted
@quick
@given(names=st.lists(st.text(max_size=12), min_size=1, max_size=3, unique=True))
def test_garbage_names_are_refused_each_by_its_name(name: str, names: list[str]):
    model = stack(layer=nn.Linear(20, 20), act=nn.Tanh(), head=nn.Linear(20, 12))
    wrong = [garbage for garbage in names if garbage not in ("layer", "head")]
    if not wrong:
        return
    faults = faults_of(model, name, target_modules=names, **fitting(name))
    assert len(faults) == len(wrong)
    for garbage, fault in zip(wrong, faults, strict=True):
        assert fault.startswith(f"{name}.target_modules: {garbage!r} matches ")


def broken_expression(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return None


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
@targeted
@quick
@given(pattern=st.text(alphabet="layerhd.*+?()[]|^$\\", min_size=1, max_size=8))
def test_a_garbage_expression_is_refused_or_means_what_it_matches(name: str, pattern: str):
    model = stack(layer=nn.Linear(20, 20), head=nn.Linear(20, 12))
    if broken := broken_expression(pattern):
        with pytest.raises(PEFTError) as refused:
            METHODS[name](target_modules=pattern)  # type: ignore[call-arg]
        assert refused.value.faults == (f"{name}.target_modules: {pattern!r} is not a regular expression ({broken})",)
        return
    expression = re.compile(pattern)
    meant = [path for path in ("layer", "head") if expression.fullmatch(path)]
    if meant:
        assert [*adapters(inject(model, METHODS[name](target_modules=pattern, **fitting(name))), "default")] == meant  # type: ignore[call-arg]
    else:
        fault = faults_of(model, name, target_modules=pattern)[0]
        assert fault.startswith(f"{name}.target_modules: {pattern!r} matches nothing; ")


@targeted
@quick
@given(name_of_adapter=st.text(max_size=8) | st.sampled_from(["keys", "forward", "a.b", ""]))
def test_an_adapter_s_name_is_a_key_of_the_state_or_is_refused(name: str, name_of_adapter: str):
    model = stack(layer=nn.Linear(20, 20))
    if not name_of_adapter or "." in name_of_adapter or hasattr(nn.ModuleDict(), name_of_adapter):
        assert faults_of(model, name, target_modules=["layer"], adapter_name=name_of_adapter, **fitting(name)) == [
            f"adapter_name: {name_of_adapter!r} can't be one: it must be without dots, and no attribute of ModuleDict"
        ]
    else:
        method = METHODS[name](target_modules=["layer"], **fitting(name))  # type: ignore[call-arg]
        inject(model, method, adapter_name=name_of_adapter)
        added = [key for key in model.state_dict() if key not in ("layer.weight", "layer.bias")]
        assert added
        assert all(key.startswith(f"layer.adapters.{name_of_adapter}.") for key in added)
