"""A base that is streamed from files into a model on the meta device: the very bits that loading it whole gives."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from lightning_peft import LoRA, PEFTError, inject
from lightning_peft.quantization import Quantization, cast_base, load_base, meta_parameters, quantize
from lightning_peft.quantization.config import NAMES
from tests.methods.models import MODELS, TINY, inputs_of

Build = Callable[[], nn.Module]
pytestmark = pytest.mark.filterwarnings("ignore:.*weights stay dense")


class Plain(nn.Module):
    """A model as people write them: a buffer that isn't stored, statistics, a recurrent layer, a tie, a shared module,
    and something that was frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.register_buffer("positions", torch.arange(6.0)[:, None] / 6, persistent=False)
        self.up = nn.Linear(12, 12)
        self.again = self.up
        self.norm = nn.BatchNorm1d(6)
        self.rnn = nn.LSTM(12, 12, batch_first=True)
        self.mix = nn.Linear(12, 12, bias=False)
        self.register_buffer("steps", torch.tensor([3, 4]))
        self.out = nn.Linear(12, 20, bias=False)
        self.out.weight = self.embed.weight
        self.mix.weight.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids) + self.positions)
        y: Tensor = self.out(self.again(self.rnn(self.mix(self.up(x)))[0]))
        return y


class Wrapped(L.LightningModule):
    """What people train: the model is an attribute, and there is something beside it."""

    def __init__(self, model: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.net = model
        self.head = head


def decoder(**changes: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, "num_key_value_heads": 2, **changes}))


def body() -> nn.Module:
    return transformers.LlamaModel(transformers.LlamaConfig(**TINY, num_key_value_heads=2))


def classifier(labels: int = 3) -> nn.Module:
    config = transformers.LlamaConfig(**TINY, num_key_value_heads=2, num_labels=labels, pad_token_id=0)
    return transformers.LlamaForSequenceClassification(config)


def on_meta(build: Build) -> nn.Module:
    with torch.device("meta"):
        return build()


def without_weights(build: Build) -> nn.Module:
    with meta_parameters():
        return build()


def stored(build: Build, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A file with other weights than a fresh model has, tied ones once."""
    model = build()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 1)
    save_model(model.to(dtype), str(path))
    return path


def named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under all of its names, buffers that aren't stored included."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def whole(build: Build, path: Path) -> nn.Module:
    """The oracle: a model in memory, into which the whole file was read; its other buffers are its own."""
    model, state = build(), load_file(path)
    for name, tensor in named(model):
        if name in state:
            tensor.data = state.pop(name).clone()
    assert not state
    return model


def ties(model: nn.Module) -> set[frozenset[str]]:
    names: dict[int, set[str]] = {}
    for name, tensor in named(model):
        names.setdefault(id(tensor), set()).add(name)
    return {frozenset(group) for group in names.values()}


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    assert {path: type(module) for path, module in model.named_modules()} == {
        path: type(module) for path, module in expected.named_modules()
    }
    assert ties(model) == ties(expected)
    found, wanted = dict(named(model)), dict(named(expected))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        other = found[name]
        assert (other.dtype, other.device, other.requires_grad) == (tensor.dtype, tensor.device, tensor.requires_grad)
        assert torch.equal(other, tensor), name
    # a packed weight's scales are in its state dict alone
    packed, expected_packed = model.state_dict(), expected.state_dict()
    assert packed.keys() == expected_packed.keys()
    assert all(torch.equal(packed[key], tensor) for key, tensor in expected_packed.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear", "conv1D", "llama", "bert", "gpt2", "t5", "vit", "resnet", "mixtral"])
def test_a_model_gets_what_is_stored(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = stored(MODELS[name], tmp_path / "model.safetensors", dtype)
    model = on_meta(MODELS[name])
    assert load_base(model, path) is model
    expected = whole(MODELS[name], path)
    assert_same(model, expected)
    if dtype == torch.float32:
        inputs = inputs_of(name)
        one, other = (m.eval()(**inputs) for m in (model, expected))
        assert torch.equal(getattr(one, "logits", one), getattr(other, "logits", other))


@pytest.mark.parametrize("quantization", NAMES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "conv1D"])
def test_a_quantized_one_has_the_bits_of_one_that_was_loaded_whole(
    name: str, quantization: str, tmp_path: Path
) -> None:
    path = stored(MODELS[name], tmp_path / "model.safetensors", torch.bfloat16)
    model = load_base(on_meta(MODELS[name]), path, quantization=quantization)
    assert_same(model, quantize(whole(MODELS[name], path), quantization))


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_what_casting_after_loading_would_give(
    dtype: torch.dtype, quantization: str | None, tmp_path: Path
) -> None:
    for name in ("llama", "t5", "resnet"):
        path = stored(MODELS[name], tmp_path / f"{name}.safetensors")
        asked = None if name == "resnet" else quantization
        model = load_base(on_meta(MODELS[name]), path, dtype=dtype, quantization=asked)
        expected = whole(MODELS[name], path)
        assert_same(model, cast_base(quantize(expected, asked) if asked else expected, dtype))
        inputs = inputs_of(name)
        assert model(**inputs).logits.dtype == cast_base(expected, dtype)(**inputs).logits.dtype


def test_what_stays_in_fp32_is_raised_to_it_where_the_file_has_less(tmp_path: Path) -> None:
    path = stored(MODELS["resnet"], tmp_path / "model.safetensors", torch.bfloat16)
    model = load_base(on_meta(MODELS["resnet"]), path, dtype="bfloat16")
    found = {name: tensor.dtype for name, tensor in named(model) if tensor.is_floating_point()}
    statistics = {name for name in found if "normalization" in name}
    assert statistics
    assert {found[name] for name in statistics} == {torch.float32}
    assert {dtype for name, dtype in found.items() if name not in statistics} == {torch.bfloat16}


def test_a_model_of_ones_own_is_built_without_its_weights(tmp_path: Path) -> None:
    path = stored(Plain, tmp_path / "model.safetensors")
    model = without_weights(Plain)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    load_base(model, path)
    expected = whole(Plain, path)
    assert_same(model, expected)
    ids = torch.randint(20, (2, 6))
    assert torch.equal(model(ids), expected(ids))
    assert_same(load_base(without_weights(Plain), path, quantization="nf4-dq"), quantize(whole(Plain, path), "nf4-dq"))


def test_parameters_that_are_one_are_one_without_weights() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = nn.Parameter(torch.ones(3))
            self.a, self.b, self.c = weight, weight, nn.Parameter(torch.ones(3), requires_grad=False)
            self.register_parameter("d", None)
            self.lazy = nn.LazyLinear(2)

    model = without_weights(Both)
    assert model.a is model.b
    assert model.a is not model.c
    assert (model.a.requires_grad, model.c.requires_grad) == (True, False)
    assert not nn.Linear(2, 2).weight.is_meta


def test_no_tensor_is_a_view_of_the_file(tmp_path: Path) -> None:
    path = stored(MODELS["llama"], tmp_path / "model.safetensors")
    model, expected = load_base(on_meta(MODELS["llama"]), path), whole(MODELS["llama"], path)
    with path.open("r+b") as file:
        file.seek(-1000, 2)
        file.write(bytes(1000))
    assert_same(model, expected)
    assert all(tensor.is_contiguous() for _, tensor in named(model))


# names ---------------------------------------------------------------------------------------------------------------


CORRESPONDENCES: dict[str, tuple[Build, Build, list[str], str, str]] = {
    # what is stored, what is filled, skip, and the prefixes in the file and in the model of what both have
    "in a LightningModule": (decoder, lambda: Wrapped(decoder()), [], "", "net."),
    "from a LightningModule": (lambda: Wrapped(decoder()), decoder, [], "net.", ""),
    "the body, into the whole": (body, classifier, ["score"], "", "model."),
    "the body out of the whole": (decoder, body, [], "model.", ""),
    "the body out of the whole, in a LightningModule": (
        decoder,
        lambda: Wrapped(body()),
        [],
        "model.",
        "net.",
    ),
    "the whole, into another whole": (decoder, classifier, ["score"], "model.", "model."),
    "the same, in a LightningModule": (decoder, lambda: Wrapped(classifier()), ["score"], "model.", "net.model."),
}


@pytest.mark.parametrize("case", CORRESPONDENCES)
def test_prefixes_are_found(case: str, tmp_path: Path) -> None:
    source, build, skip, before, after = CORRESPONDENCES[case]
    path = stored(source, tmp_path / "model.safetensors")
    model = on_meta(build)
    tensors = dict(named(model))
    common = [key for key in load_file(path) if after + key.removeprefix(before) in tensors]
    beside = set(load_file(path)) - set(common)
    assert beside <= {"lm_head.weight"}
    assert len(common) >= 20
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_base(model, path, skip=skip)
    told = [str(warning.message) for warning in caught if "load_base" in str(warning.message)]
    assert told == [f"load_base: {key} of the file are left out: the model has no such head" for key in beside]
    tensors = dict(named(model))
    for key in common:
        assert torch.equal(tensors[after + key.removeprefix(before)], load_file(path)[key])
    assert not any(tensor.is_meta for tensor in tensors.values())


def test_what_is_not_a_head_of_another_model_is_not_left_out(tmp_path: Path) -> None:
    path = stored(decoder, tmp_path / "model.safetensors")
    state = load_file(path)
    for key in ("extra", "lm_head.bias", "model.layers.2.mlp.up_proj.weight"):
        save_file({**state, key: torch.zeros(1)}, tmp_path / "more.safetensors")
        with pytest.raises(PEFTError, match=f"holds 1 tensor that the model doesn't have: {re.escape(key)}; "):
            load_base(on_meta(decoder), tmp_path / "more.safetensors")
        model = load_base(on_meta(decoder), tmp_path / "more.safetensors", skip=[key])
        assert_same(model, whole(decoder, path))


def test_layers_that_are_all_alike_are_not_guessed_at(tmp_path: Path) -> None:
    path = stored(lambda: nn.Linear(4, 4), tmp_path / "model.safetensors")
    model = on_meta(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    with pytest.raises(PEFTError, match="fit several parts of the model equally well: 0, 1; load each part by itself"):
        load_base(model, path)
    load_base(model[0], path)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_tie_may_be_stored_under_any_of_its_names_or_under_all(name: str, tmp_path: Path) -> None:
    path = stored(MODELS[name], tmp_path / "model.safetensors")
    expected = whole(MODELS[name], path)
    names = next(sorted(group) for group in ties(expected) if len(group) > 1)
    state = {key: value for key, value in load_file(path).items() if key not in names}
    weight = dict(named(expected))[names[0]].detach()
    for chosen in ([names[0]], [names[-1]], names):
        save_file({**state, **{key: weight.clone() for key in chosen}}, tmp_path / "tied.safetensors")
        assert_same(load_base(on_meta(MODELS[name]), tmp_path / "tied.safetensors"), expected)
    save_file({**state, names[0]: weight.clone(), names[1]: weight + 1}, tmp_path / "parted.safetensors")
    with pytest.raises(
        PEFTError, match=f"{names[0]} and {names[1]} differ, and are one tied tensor in the model; build "
    ):
        load_base(on_meta(MODELS[name]), tmp_path / "parted.safetensors")


def test_a_tie_that_the_configuration_breaks_is_two_tensors(tmp_path: Path) -> None:
    state = load_file(stored(lambda: decoder(tie_word_embeddings=False), tmp_path / "model.safetensors"))
    model = load_base(on_meta(lambda: decoder(tie_word_embeddings=False)), tmp_path / "model.safetensors")
    assert not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])


def test_what_older_files_hold_besides_is_left_out(tmp_path: Path) -> None:
    path = stored(MODELS["bert"], tmp_path / "model.safetensors")
    state = load_file(path)
    state["bert.embeddings.position_ids"] = torch.zeros(1, 512, dtype=torch.int64)
    save_file(state, tmp_path / "older.safetensors")
    expected = whole(MODELS["bert"], path)
    assert_same(load_base(on_meta(MODELS["bert"]), tmp_path / "older.safetensors"), expected)
    path = stored(decoder, tmp_path / "model.safetensors")
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4, dtype=torch.bfloat16)}
    save_file({**load_file(path), **frequencies}, tmp_path / "older.safetensors")
    assert_same(load_base(on_meta(decoder), tmp_path / "older.safetensors"), whole(decoder, path))


# what starts anew ----------------------------------------------------------------------------------------------------


def test_a_new_head_starts_as_its_model_starts_it(tmp_path: Path) -> None:
    path = stored(body, tmp_path / "model.safetensors", torch.bfloat16)
    torch.manual_seed(3)
    model = load_base(on_meta(lambda: classifier(400)), path, quantization="nf4", dtype="bfloat16", skip=["score"])
    weight = model.score.weight
    assert type(model.score) is nn.Linear
    assert (weight.dtype, weight.requires_grad) == (torch.float32, True)
    assert 0.018 < float(weight.detach().std()) < 0.022  # transformers' initializer_range
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert type(model.model.layers[0].mlp.up_proj) is not nn.Linear


def test_a_new_head_of_a_plain_model_is_reset(tmp_path: Path) -> None:
    def build(outputs: int = 3) -> nn.Module:
        head = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Linear(64, outputs))
        return nn.ModuleDict({"body": nn.Linear(4, 8), "head": head})

    state = load_file(stored(build, tmp_path / "model.safetensors"))
    save_file({key: value for key, value in state.items() if "body" in key}, tmp_path / "body.safetensors")
    model = load_base(on_meta(build), tmp_path / "body.safetensors", skip=["head"])
    assert torch.equal(model["body"].weight, state["body.weight"])
    assert float(model["head"][0].weight.detach().abs().max()) <= 8**-0.5
    assert float(model["head"][0].weight.detach().std()) > 0.1
    assert torch.equal(model["head"][1].running_var, torch.ones(64))
    # what the file has of it is taken, and what has another shape there is told
    with pytest.warns(
        UserWarning, match=r"load_base: head\.2\.bias, head\.2\.weight start anew: they have another shape"
    ):
        model = load_base(on_meta(lambda: build(5)), tmp_path / "model.safetensors", skip=["head"])
    assert torch.equal(model["head"][0].weight, state["head.0.weight"])
    assert model["head"][2].weight.shape == (5, 64)
    assert float(model["head"][2].weight.detach().abs().max()) <= 64**-0.5


def test_what_has_a_value_keeps_it_with_a_warning(tmp_path: Path) -> None:
    path = stored(decoder, tmp_path / "model.safetensors")
    head = nn.Linear(3, 3)
    before = copy.deepcopy(head)
    with pytest.warns(
        UserWarning, match=r"load_base: head\.weight, head\.bias are not in the file, and keep the values"
    ):
        model = load_base(Wrapped(on_meta(decoder), head), path)
    assert torch.equal(model.head.weight, before.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_base(Wrapped(on_meta(decoder), head), path, skip=["head"])
    assert torch.equal(model.head.weight, before.weight)


def test_a_model_that_is_not_on_the_meta_device_is_filled_as_well(tmp_path: Path) -> None:
    path = stored(decoder, tmp_path / "model.safetensors")
    assert_same(load_base(decoder(), path), whole(decoder, path))


def test_adapters_stand_on_it_afterwards(tmp_path: Path) -> None:
    path = stored(decoder, tmp_path / "model.safetensors", torch.bfloat16)
    model = load_base(on_meta(decoder), path, quantization="nf4-dq", dtype="bfloat16").train()
    inject(model, LoRA(r=2, target_modules="all-linear"))
    ids = torch.randint(1, 48, (2, 5))
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients
    assert all("adapters" in name and grad is not None for name, grad in gradients.items())


# bad input -----------------------------------------------------------------------------------------------------------


def assert_untouched(model: nn.Module) -> None:
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(type(module).__name__ not in ("Linear4bit", "Linear8bit") for module in model.modules())


def test_all_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    path = stored(decoder, tmp_path / "model.safetensors")
    state = load_file(path)
    state["model.layers.0.mlp.up_project.weight"] = state.pop("model.layers.0.mlp.up_proj.weight")
    state["model.norm.weight"] = state["model.norm.weight"][:30]
    state["lm_head.weight"] = state["lm_head.weight"].to(torch.int8)
    state["extra"] = torch.zeros(1)
    save_file(state, path)
    model = on_meta(decoder)
    with pytest.raises(PEFTError) as raised:
        load_base(model, path, quantization="nf4", dtype="bfloat16", skip=["mlp2"])
    assert list(raised.value.faults) == [
        f"{path}: lacks 1 tensor of the model: model.layers.0.mlp.up_proj.weight (it has "
        "model.layers.0.mlp.up_project.weight); what is to start anew, such as a head, can be named in skip "
        "(modules_to_save)",
        f"{path}: holds 2 tensors that the model doesn't have: extra, model.layers.0.mlp.up_project.weight; what is to "
        "be left out can be named in skip",
        f"{path}: model.norm.weight has the shape (30,), the model's model.norm.weight (32,)",
        f"{path}: lm_head.weight holds int8, the model's lm_head.weight float32",
        f"{path}: is read by the model's own names; for a model whose tensors transformers renames or merges as it "
        "loads them, use from_pretrained",
        f"skip: 'mlp2' matches nothing, in the model or in {path}; did you mean 'mlp'?",
    ]
    assert_untouched(model)


BAD: dict[str, tuple[Build, dict[str, Any], str]] = {
    "a name of no quantization": (decoder, {"quantization": "nf5"}, "quantization: 'nf5' is none of .*mean 'nf4'"),
    "a name of no dtype": (decoder, {"dtype": "bfloat32"}, "base_dtype: 'bfloat32' is none of"),
    "the meta device": (decoder, {"device": "meta"}, "device: on the meta device there are no weights"),
    "no device": (decoder, {"device": "cudo"}, "device: 'cudo' can't be used here"),
    "one name": (decoder, {"skip": "lm_head"}, r"skip: 'lm_head' is a string; give a list, \['lm_head'\]"),
    "adapters": (
        lambda: inject(decoder(), LoRA(r=2, target_modules=["q_proj"])), {}, "adapters stand on the model; load its",
    ),
    "a buffer that nothing computes": (
        Plain,
        {},
        r"positions is in no file \(persistent=False\), and Plain has no reset_parameters that computes it; build the "
        r"model inside `with lightning_peft\.quantization\.meta_parameters\(\):`",
    ),
    "a part that nothing starts": (
        lambda: Wrapped(decoder(), nn.ParameterList([torch.ones(3)])),
        {"skip": ["head"]},
        r"head\.0 is not in the file, and ParameterList has no reset_parameters that starts it anew; build it outside",
    ),
    "a quantization of nothing": (lambda: nn.Embedding(4, 2), {"quantization": "nf4"}, "has no linear layer that can"),
    "no shape yet": (lambda: nn.Sequential(nn.LazyLinear(4)), {}, "0: LazyLinear has no shape yet; give it its sizes"),
}  # fmt: skip


SOURCES: dict[str, Build] = {
    "a buffer that nothing computes": Plain,
    "a quantization of nothing": lambda: nn.Embedding(4, 2),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_before_a_weight_is_loaded(case: str, tmp_path: Path) -> None:
    build, arguments, message = BAD[case]
    path = stored(SOURCES.get(case, decoder), tmp_path / "model.safetensors")
    model = on_meta(build)
    with pytest.raises(PEFTError, match=message):
        load_base(model, path, **arguments)
    if "shape" not in case:
        assert_untouched(model)


def test_a_plain_tensor_on_the_meta_device_is_refused(tmp_path: Path) -> None:
    class Table(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.table = torch.arange(4)

    path = stored(Table, tmp_path / "model.safetensors")
    with pytest.raises(
        PEFTError, match=r"^table is a plain tensor attribute on the meta device, which nothing can fill; "
    ):
        load_base(on_meta(Table), path)
    assert torch.equal(load_base(without_weights(Table), path).table, torch.arange(4))


def test_files_and_models_that_are_quantized_are_refused(tmp_path: Path) -> None:
    path = stored(decoder, tmp_path / "model.safetensors")
    packed = quantize(whole(decoder, path), "nf4")
    save_file(packed.state_dict(), tmp_path / "packed.safetensors")
    with pytest.raises(PEFTError, match="its weights are quantized already; give the file of the dense model"):
        load_base(on_meta(decoder), tmp_path / "packed.safetensors", quantization="nf4")
    with pytest.raises(PEFTError, match=r"model\.layers\.0\.self_attn\.q_proj: Linear4bit is quantized already; build"):
        load_base(packed, path)


def test_weights_that_are_not_finite_are_named_where_they_are_packed(tmp_path: Path) -> None:
    state = load_file(stored(decoder, tmp_path / "model.safetensors"))
    key = "model.layers.1.mlp.down_proj.weight"
    state[key][3, 4] = torch.inf
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(
        PEFTError, match=rf"model\.safetensors: {re.escape(key)} has weights that are not finite, which"
    ):
        load_base(on_meta(decoder), tmp_path / "model.safetensors", quantization="nf4")
    load_base(on_meta(decoder), tmp_path / "model.safetensors")


def test_the_names_to_skip_of_a_configuration_are_checked_too(tmp_path: Path) -> None:
    path = stored(decoder, tmp_path / "model.safetensors")
    config = Quantization(skip_modules=["down_proj"])
    model = load_base(on_meta(decoder), path, quantization=config)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert_same(model, quantize(whole(decoder, path), config))
    with pytest.raises(
        PEFTError, match=re.escape("skip_modules: 'downproj' matches nothing; did you mean 'down_proj'")
    ):
        load_base(on_meta(decoder), path, quantization=Quantization(skip_modules=["downproj"]))
