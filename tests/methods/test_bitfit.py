"""BitFit: which biases train, that nothing else does, and what is computed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft import (
    BitFit,
    PEFTError,
    disable_adapters,
    inject,
    merge,
    trainable_parameters,
    unmerge,
)
from lightning_peft.injection import adapters
from tests.interchange.peft_oracle import (
    base_of,
)
from tests.methods.models import MODELS, NO_DROPOUT, TINY, inputs_of
from tests.methods.test_parameter_counts import count, llama_7b

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def own_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters by the name of what they are copies of."""
    return {name.replace(".adapters.default", ""): p for name, p in trainable_parameters(model).items()}


BIASED = ["bert", "gpt2", "vit", "resnet", "gpt-oss", "attention", "conv2d", "conv1D"]


@pytest.mark.parametrize("name", BIASED)
def test_gradients_and_ten_steps_are_those_of_the_model_whose_biases_alone_train(name: str) -> None:
    base = base_of(name)
    ours, theirs = inject(copy.deepcopy(base), BitFit()), copy.deepcopy(base)
    expected = {key: p for key, p in theirs.named_parameters() if re.search(r"(^|[._])bias$", key)}
    for parameter in theirs.parameters():
        parameter.requires_grad_(any(parameter is bias for bias in expected.values()))
    own = own_names(ours)
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[key], expected[key]) for key in own)
    inputs = inputs_of(name)

    def run(model: nn.Module) -> Tensor:
        output = model(**inputs)
        return output if isinstance(output, Tensor) else output.logits

    goal = torch.randn_like(run(ours))
    optimizers = [torch.optim.AdamW(tensors.values(), lr=1e-2) for tensors in (own, expected)]
    for step in range(11):
        outputs = [run(model) for model in (ours, theirs)]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
        for optimizer, output in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            (output - goal).square().mean().backward()
        if step == 0:
            for key, parameter in own.items():
                torch.testing.assert_close(parameter.grad, expected[key].grad, rtol=1e-5, atol=1e-6)
            for optimizer in optimizers:
                # a key's bias has no effect on attention, and AdamW would blow its rounding errors up
                optimizer.param_groups[0]["eps"] = 1e-4
        for optimizer in optimizers:
            optimizer.step()
    assert (run(ours) - run(base)).abs().max() > 1e-2
    with disable_adapters(ours):
        assert torch.equal(run(ours), run(base))
    merge(ours)
    torch.testing.assert_close(run(ours), run(theirs), rtol=1e-5, atol=1e-5)
    unmerge(ours)
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in base.state_dict().items())


class Loose(nn.Module):
    """Biases, and what is none, as parameters of a module of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj_bias = nn.Parameter(torch.zeros(4))
        self.bias = nn.Parameter(torch.zeros(4))
        for name in ("weight", "biases", "bias_table", "relative_attention_bias", "e_score_correction_bias"):
            self.register_parameter(name, nn.Parameter(torch.zeros(4)))
        self.relative_bias = nn.Embedding(8, 2)
        self.register_buffer("shift_bias", torch.zeros(4))


def test_what_counts_for_a_bias() -> None:
    model = nn.ModuleDict(
        {
            "norm": nn.LayerNorm(4),
            "plain_norm": nn.LayerNorm(4, bias=False),
            "rms": nn.RMSNorm(4),
            "batch": nn.BatchNorm2d(4),
            "fixed": nn.BatchNorm2d(4, affine=False),
            "group": nn.GroupNorm(2, 4),
            "linear": nn.Linear(4, 4),
            "bare": nn.Linear(4, 4, bias=False),
            "conv": nn.ConvTranspose1d(4, 4, 2),
            "bilinear": nn.Bilinear(4, 4, 4),
            "conv1D": Conv1D(4, 4),
            "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "lstm": nn.LSTM(4, 4, num_layers=2),
            "cell": nn.GRUCell(4, 4),
            "words": nn.Embedding(8, 4),
            "loose": Loose(),
        }
    )
    assert {*own_names(inject(model, BitFit()))} == {
        *(f"{name}.bias" for name in ("norm", "batch", "group", "linear", "conv", "bilinear", "conv1D", "loose")),
        "attention.in_proj_bias",
        "attention.out_proj.bias",
        "lstm.bias_ih_l0",
        "lstm.bias_hh_l0",
        "lstm.bias_ih_l1",
        "lstm.bias_hh_l1",
        "cell.bias_ih",
        "cell.bias_hh",
        "loose.up_proj_bias",
    }


@pytest.mark.parametrize("make", [lambda: nn.LSTM(4, 4, num_layers=2), lambda: nn.GRU(4, 4, bidirectional=True)])
def test_recurrent_layers_run_with_their_trained_biases(make: Callable[[], nn.Module]) -> None:
    base = make()
    model = moved(inject(nn.Sequential(copy.deepcopy(base)), BitFit()))
    theirs = copy.deepcopy(base)
    with torch.no_grad():
        for key, value in own_names(model).items():
            theirs.get_parameter(key.removeprefix("0.")).copy_(value)
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(model(x)[0], theirs(x)[0])
    wanted = torch.autograd.grad(theirs(x)[0].sum(), [p for n, p in theirs.named_parameters() if "bias" in n])
    found = torch.autograd.grad(model(x)[0].sum(), [*trainable_parameters(model).values()])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    with disable_adapters(model):
        assert torch.equal(model(x)[0], base(x)[0])


def test_statistics_of_a_frozen_batch_norm_stay_while_its_bias_trains() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Tanh())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    inject(model, BitFit()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(8, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert not torch.equal(own_names(model)["1.bias"], before["1.bias"])
    assert not model[1].training


def test_tied_biases_stay_tied() -> None:
    model = transformers.BertForMaskedLM(transformers.BertConfig(**TINY, **NO_DROPOUT)).eval()
    head = model.cls.predictions
    assert head.bias is head.decoder.bias
    inject(model, BitFit())
    found = adapters(model, "default")
    assert found["cls.predictions"].bias is found["cls.predictions.decoder"].bias
    inputs = inputs_of("bert")
    base = model(**inputs).logits
    with torch.no_grad():
        found["cls.predictions"].bias.add_(1)
    torch.testing.assert_close(model(**inputs).logits, base + 1)
    merge(model)
    torch.testing.assert_close(model(**inputs).logits, base + 1)


ADDABLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, bias=False), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, bias=False, groups=2, padding_mode="reflect", padding=1), (2, 4, 7, 6)),
    "conv3d without batch": (lambda: nn.Conv3d(3, 5, 2, bias=False), (3, 4, 5, 3)),
}


@pytest.mark.parametrize("name", ADDABLE)
def test_a_bias_that_was_missing_starts_at_zero_and_is_the_layer_s_own(name: str) -> None:
    make, shape = ADDABLE[name]
    base = make().double()
    model = inject(nn.Sequential(copy.deepcopy(base)), BitFit(add_missing=True))
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.equal(model(x), base(x))
    (bias,) = trainable_parameters(moved(model)).values()
    theirs = copy.deepcopy(base)
    theirs.bias = nn.Parameter(bias.detach().clone())
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(theirs(x))
    for one, other in zip(
        torch.autograd.grad(model(x), bias, grad), torch.autograd.grad(theirs(x), theirs.bias, grad), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    with disable_adapters(model):
        assert torch.equal(model(x), base(x))
    with pytest.raises(PEFTError) as caught:
        merge(model)
    assert caught.value.faults == (
        f"BitFit gave a {type(base).__name__} a bias, which the base has no place for; keep the adapter, or train "
        "without add_missing",
    )


def test_missing_biases_are_added_outside_of_the_head_or_where_it_is_named() -> None:
    model = MODELS["llama"]()
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {*adapters(inject(model, BitFit(add_missing=True)), "default")} == linear - {"lm_head"}
    model = inject(MODELS["llama"](), BitFit(add_missing=True, target_modules=["lm_head", "v_proj"]))
    assert {path.rpartition(".")[2] for path in adapters(model, "default")} == {"lm_head", "v_proj"}
    assert count(model) == 48 + 2 * 16


def test_an_attention_without_biases_is_given_none() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, bias=False), "up": nn.Linear(8, 4, bias=False)})
    assert [*adapters(inject(model, BitFit(add_missing=True)), "default")] == ["up"]


def test_a_named_attention_has_its_output_layer_with_it() -> None:
    def found(**fields: Any) -> list[str]:
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
        saved = fields.pop("modules_to_save", ())
        inject(model, BitFit(target_modules=["attention"], **fields), modules_to_save=saved)
        return sorted(name for name in own_names(model) if name.endswith("bias"))

    both = ["attention.in_proj_bias", "attention.out_proj.bias"]
    assert found() == both
    assert found(exclude_modules=["out_proj"]) == both[:1]
    assert found(modules_to_save=["out_proj"]) == both


def test_over_a_bf16_base_biases_are_kept_in_fp32() -> None:
    model = inject(nn.Sequential(nn.Linear(8, 8).bfloat16()), BitFit())
    (bias,) = trainable_parameters(model).values()
    assert bias.dtype == torch.float32
    with torch.no_grad():
        for _ in range(100):
            bias.add_(1e-4)  # each step alone would be lost in bf16
    start = model[0]._parameters["bias"].float()
    torch.testing.assert_close(bias, start + 1e-2, rtol=0, atol=1e-5)
    assert model(torch.zeros(1, 8).bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(model(torch.zeros(1, 8).bfloat16())[0], bias.bfloat16(), rtol=0, atol=0)


def test_nothing_is_kept_for_the_backward_pass_but_the_weight() -> None:
    model = inject(nn.Sequential(nn.Linear(48, 80).bfloat16()), BitFit())
    x = torch.randn(1000, 48).bfloat16()
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}), t)[1], lambda t: t
    ):
        model(x)
    assert sum(kept.values()) <= 48 * 80 * 2


def test_parameter_counts() -> None:
    per_layer = 4 * 4096 + 2 * 11008 + 4096
    model = inject(llama_7b(), BitFit(add_missing=True))
    assert count(model) == 32 * per_layer == 1_359_872
    assert all(p.is_meta and p.dtype == torch.float32 for p in trainable_parameters(model).values())
    with torch.device("meta"):
        bert = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=2))
    # BERT base: the embeddings' norm; in a layer q, k, v, o, two norms, and up (3072) and down; the pooler; the head
    assert count(inject(bert, BitFit())) == 768 + 12 * (4 * 768 + 2 * 768 + 3072 + 768) + 768 + 2 == 102_914


WRONG_FIELDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no targets": (
        {"target_modules": []},
        ["target_modules: is empty; name at least one, or leave it out for every module with a bias"],
    ),
    "expressions": (
        {"target_modules": "*k", "exclude_modules": "b)"},
        [
            "target_modules: '*k' is not a regular expression (nothing to repeat at position 0)",
            "exclude_modules: 'b)' is not a regular expression (unbalanced parenthesis at position 1)",
        ],
    ),
}


@pytest.mark.parametrize("fault", WRONG_FIELDS)
def test_wrong_fields_are_told(fault: str) -> None:
    fields, expected = WRONG_FIELDS[fault]
    with pytest.raises(PEFTError) as caught:
        BitFit(**fields)
    assert caught.value.faults == tuple(f"BitFit.{one}" for one in expected)


@pytest.mark.parametrize(
    ("build", "fields", "faults"),
    [
        (
            MODELS["llama"],
            {},
            ["target_modules: LlamaForCausalLM has no bias; add_missing: true gives it some"],
        ),
        (MODELS["t5"], {}, ["target_modules: T5ForConditionalGeneration has no bias; add_missing: true gives it some"]),
        (
            lambda: nn.ModuleDict({"words": nn.Embedding(4, 4)}),
            {"add_missing": True},
            ["target_modules: ModuleDict has no bias, and no layer that could be given one"],
        ),
        (
            MODELS["llama"],
            {"target_modules": ["q_prj", "v_proj", "norm"]},
            [
                "target_modules: 'q_prj' matches nothing; the model has none that can be",
                "target_modules: 'v_proj' matches model.layers.0.self_attn.v_proj, a Linear without a bias "
                "(add_missing gives it one), which can not be adapted; the model has none that can be",
                "target_modules: 'norm' matches model.norm, a LlamaRMSNorm without a bias, which can not be adapted; "
                "the model has none that can be",
            ],
        ),
        (
            MODELS["llama"],
            {"target_modules": "all-linear"},
            ["target_modules: 'all-linear' matches nothing; LlamaForCausalLM has no linear layer that can be adapted"],
        ),
        (
            lambda: nn.ModuleDict({"up": nn.LazyLinear(8), "down": nn.LazyLinear(8, bias=False)}),
            {"add_missing": True},
            [
                "target_modules: up: LazyLinear has no shape yet; run one batch through the model first",
                "target_modules: down: LazyLinear has no shape yet; run one batch through the model first",
            ],
        ),
    ],
)
def test_what_does_not_fit_a_model_is_told_at_once(
    build: Callable[[], nn.Module], fields: dict[str, Any], faults: list[str]
) -> None:
    with pytest.raises(PEFTError) as caught:
        inject(build(), BitFit(**fields))
    assert caught.value.faults == tuple(f"BitFit.{fault}" for fault in faults)


def test_all_linear_is_the_biases_of_every_linear_layer_but_the_head() -> None:
    model = MODELS["bert"]()
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {*adapters(inject(model, BitFit(target_modules="all-linear")), "default")} == linear - {"classifier"}
