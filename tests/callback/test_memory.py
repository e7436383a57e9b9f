"""Activation checkpointing and offloading: the same gradients to the bit, on any module, for less that is kept."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_peft import (
    PEFT,
    AdaLoRA,
    BitFit,
    Compacter,
    DiffPruning,
    DoRA,
    Houlsby,
    LoRA,
    Method,
    PEFTError,
    PrefixTuning,
    PromptTuning,
    PTuningV2,
    UniPELT,
    adapter_per_row,
    disable_adapters,
    inject,
    remove,
)
from lightning_peft.callback import memory
from lightning_peft.callback.memory import Checkpointed, OffloadingModule, apply_memory_options, offloaded_activations
from tests.callback.toys import Decoder, Manual, Toy, data, trainer

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=48, **SIZES)), "model.layers"),
    # gives its blocks the cache by position
    "gpt2": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=48, **GPT)), "transformer.h"),
    "bert": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=48, **SIZES)),
        "bert.encoder.layer",
    ),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=48, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0
            )
        ),
        "encoder.block",
    ),
}
METHODS: list[Method] = [
    LoRA(r=2, dropout=0.3, target_modules="all-linear"),
    DoRA(r=2, dropout=0.3, target_modules="all-linear"),
    AdaLoRA(init_r=4, target_r=2, dropout=0.3),
    DiffPruning(),
    BitFit(add_missing=True),
    Compacter(n=4, reduction=4),
    Houlsby(reduction=4),
    PrefixTuning(num_virtual_tokens=3),
    PTuningV2(num_virtual_tokens=3),
    PromptTuning(num_virtual_tokens=3),
    UniPELT(),
]


def built(name: str) -> Any:
    torch.manual_seed(1)
    return MODELS[name][0]().train()


def inputs_of(name: str) -> dict[str, Tensor]:
    ids = torch.randint(1, 48, (3, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids} if name != "resnet" else {"pixel_values": torch.randn(2, 3, 16, 16)}


def with_options(model: nn.Module, checkpointing: Any = False, offload: bool = False) -> Any:
    apply_memory_options(model, SimpleNamespace(gradient_checkpointing=checkpointing, offload_activations=offload))  # type: ignore[arg-type]
    return model


def gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """All gradients and the loss, with the random numbers of the same seed."""
    model.zero_grad()
    torch.manual_seed(2)
    loss = model(**inputs).loss
    torch.rand(1)  # what is drawn between the two passes is not what the second run is to see
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def kept_bytes(model: Any, inputs: dict[str, Tensor]) -> int:
    """Bytes of all storages that stay alive for the backward pass, but those of the model."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in storages.values() if storage.data_ptr() not in own)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_gradients_are_those_without_checkpointing(method: Method) -> None:
    model = inject(built("llama"), method)
    for parameter in model.parameters():
        if parameter.requires_grad:  # what starts at zero would hide a gradient
            nn.init.normal_(parameter, std=0.1)
    expected = gradients(model, inputs_of("llama"))
    assert_same(gradients(with_options(model, True), inputs_of("llama")), expected)
    assert sum(isinstance(module, Checkpointed) for module in model.modules()) == 2


@pytest.mark.parametrize("name", MODELS)
def test_whole_models_and_less_is_kept(name: str) -> None:
    model, inputs = built(name), inputs_of(name)
    expected, before = gradients(model, inputs), kept_bytes(model, inputs)
    keys = list(model.state_dict())
    with_options(model, True)
    paths = [path for path, module in model.named_modules() if isinstance(module, Checkpointed)]
    assert paths[:2] == [f"{MODELS[name][1]}.0", f"{MODELS[name][1]}.1"]
    assert_same(gradients(model, inputs), expected)
    assert list(model.state_dict()) == keys
    assert kept_bytes(model, inputs) < 0.5 * before


def test_eval_mode_checkpoints_as_well() -> None:
    """Where transformers' own switches itself off and says nothing."""
    model, inputs = inject(built("llama").eval(), LoRA(r=2)), inputs_of("llama")
    whole, expected = kept_bytes(model, inputs), gradients(model, inputs)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    less = kept_bytes(model, inputs)
    assert kept_bytes(model.eval(), inputs) >= whole > 2 * less
    model.gradient_checkpointing_disable()
    with_options(model, True)
    assert kept_bytes(model, inputs) == pytest.approx(less, rel=0.01)
    assert_same(gradients(model, inputs), expected)


def test_nothing_is_kept_or_run_again_without_gradients() -> None:
    model = with_options(built("llama"), True)
    with torch.no_grad():
        assert not model(**inputs_of("llama")).loss.requires_grad
    with torch.no_grad():
        made = model.eval().generate(torch.tensor([[3, 4]]), max_new_tokens=4, use_cache=True)
    assert torch.equal(made, remove(model).generate(torch.tensor([[3, 4]]), max_new_tokens=4, use_cache=True))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_cache_that_holds_earlier_tokens_is_refused(name: str) -> None:
    model = with_options(built(name), True)
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([[3, 4]]), use_cache=True).past_key_values
    with pytest.raises(PEFTError) as caught:
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    block = {"llama": "LlamaDecoderLayer", "gpt2": "GPT2Block"}[name]
    assert str(caught.value) == (
        f"gradient_checkpointing: {block} is given the keys and values of earlier tokens, and can't run again after it "
        "has added to them; train without past_key_values, or without gradient_checkpointing"
    )


def test_second_run_sees_the_adapters_of_the_first() -> None:
    """Although the backward pass begins when they are switched back."""
    model = inject(built("llama"), LoRA(r=2, target_modules="all-linear"))
    inject(model, LoRA(r=2, target_modules="all-linear"), adapter_name="other")
    for parameter in model.parameters():
        if parameter.dim() == 2 and 2 in parameter.shape:
            nn.init.normal_(parameter.requires_grad_(), std=0.1)
    embeds = torch.randn(3, 7, 32, requires_grad=True)

    def run() -> list[Tensor]:
        model.zero_grad()
        embeds.grad = None
        with adapter_per_row(model, ["default", None, "other"]):
            rows = model(inputs_embeds=embeds).logits.square().sum()
        with disable_adapters(model):
            bare = model(inputs_embeds=embeds).logits.pow(3).sum()
        (rows + bare).backward()
        return [embeds.grad.clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]  # type: ignore[attr-defined]

    expected = run()
    with_options(model, True)
    found = run()
    assert (
        len(found)
        == len(expected)
        == 1 + 2 * 2 * 14 + sum(p.grad is not None for n, p in model.named_parameters() if "adapters" not in n)
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_autocast_is_that_of_the_first_run() -> None:
    model = inject(built("llama"), LoRA(r=2, dropout=0.3))

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs_of("llama")).loss
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = run()
    with_options(model, True)
    assert_same(run(), expected)


class Mixer(nn.Module):
    """A block without attention, around a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.body = nn.Sequential(nn.Sequential(Mixer(), Mixer()), nn.Sequential(Mixer(), nn.BatchNorm1d(8)))
        self.heads = nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 2)])

    def forward(self, x: Tensor) -> Any:
        x = self.body(self.stem(x))
        return SimpleNamespace(loss=sum(head(x).square().sum() for head in self.heads))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (True, ["body.0.0", "body.0.1"]),
        (["body"], ["body"]),
        (["1.0", "stem"], ["stem", "body.1.0"]),
        (["heads"], ["heads.0", "heads.1"]),
    ],
)
def test_which_modules_are_meant(asked: Any, expected: list[str]) -> None:
    torch.manual_seed(0)
    model = inject(Stacked(), LoRA(r=2, dropout=0.2))
    inputs = {"x": torch.randn(5, 8)}
    before = gradients(model, inputs)
    with_options(model, asked)
    assert [path for path, module in model.named_modules() if isinstance(module, Checkpointed)] == expected
    assert_same(gradients(model, inputs), before)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            ["bodi"],
            "gradient_checkpointing: 'bodi' matches nothing; did you mean 'body'?",
        ),
        ("body", "gradient_checkpointing: 'body' is a string; give true, or a list, ['body']"),
    ],
)
def test_names_that_mean_nothing_are_told(asked: Any, message: str) -> None:
    with pytest.raises(PEFTError) as caught:
        with_options(Stacked(), asked)
    assert str(caught.value) == message


def test_model_without_blocks_is_told(tmp_path: Path) -> None:
    with pytest.raises(PEFTError) as caught:
        trainer(tmp_path, peft=PEFT(LoRA(r=2), gradient_checkpointing=True)).fit(Toy(), data())
    assert str(caught.value) == (
        "gradient_checkpointing: Toy has no repeated blocks that could be told; name the modules to run again, of "
        "which there are body, head"
    )


def test_trained_statistics_would_move_twice() -> None:
    model = inject(Stacked(), LoRA(r=2), modules_to_save=["body.1.1"])
    with pytest.raises(PEFTError) as caught:
        with_options(model, ["body.1"])
    assert str(caught.value) == (
        "gradient_checkpointing: body.1 would move the statistics of 1 twice in each step, which modules_to_save "
        "trains; leave it out of one of them"
    )
    with_options(model, ["body.0"])


def test_copies_pickles_and_removal() -> None:
    model, inputs = inject(built("llama"), LoRA(r=2, dropout=0.3)), inputs_of("llama")
    classes = [type(module) for module in built("llama").modules()]
    with_options(model, True)
    expected, keys = gradients(model, inputs), list(model.state_dict())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(copied.state_dict()) == keys
        assert_same(gradients(copied, inputs), expected)
        assert isinstance(copied.model.layers[0], Checkpointed)
        assert copied.model.layers[0] is not model.model.layers[0]
    remove(model)
    assert [type(module) for module in model.modules()] == classes
    assert "forward_before" not in vars(model.model.layers[0])


def test_forward_on_the_instance_is_run_and_given_back() -> None:
    model = built("llama")
    layer, called = model.model.layers[0], []
    own = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        called.append(1)
        return own(*args, **kwargs)

    layer.forward = forward
    with_options(model, True)
    gradients(model, inputs_of("llama"))
    assert len(called) == 2
    remove(model)
    assert vars(layer)["forward"] is forward


@pytest.mark.slow
def test_compiled_in_one_graph() -> None:
    torch.manual_seed(0)
    model = inject(built("llama"), LoRA(r=2))
    expected = gradients(model, inputs_of("llama"))
    with_options(model, True)
    model.compile(backend="aot_eager", fullgraph=True)
    for name, value in gradients(model, inputs_of("llama")).items():
        assert torch.allclose(value, expected[name], atol=1e-6), name


def offloaded(
    run: Callable[[], Tensor], module: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, list[Any]]:
    """The output of `run` and the shapes of what would have moved to the CPU, were the module on another device."""
    moved = []
    decide = memory._is_large_activation

    def deciding(tensor: Tensor, own: set[int]) -> bool:
        if is_large := decide(tensor, own):
            moved.append(tuple(tensor.shape))
        return is_large

    monkeypatch.setattr(memory, "_is_large_activation", deciding)
    monkeypatch.setattr(memory, "STORE", "elsewhere")
    with offloaded_activations(module):
        output = run()
    return output, moved


def test_activations_move_and_weights_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SMALLEST", 4 * 64 * 16)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 64), nn.Linear(64, 64)
    )
    model[0].requires_grad_(False)
    x = torch.randn(64, 16, requires_grad=True)

    def run() -> Tensor:
        return model(x.sin()).sum(dim=1, keepdim=True).expand(64, 640).square().sum()

    expected = torch.autograd.grad(run(), [x, *model[4].parameters()])
    output, moved = offloaded(run, model, monkeypatch)
    # what tanh gave, for itself and for the next layer, and the last layer's input; not x, a leaf, nor (64, 8), which
    # is small, nor weights of (64, 64), nor (64, 640), of 64 numbers
    assert moved == [(64, 16), (64, 16), (64, 64)]
    for one, other in zip(torch.autograd.grad(output, [x, *model[4].parameters()]), expected, strict=True):
        assert torch.equal(one, other)


def test_checkpointed_blocks_move_their_inputs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SMALLEST", 4 * 3 * 7 * 32)
    model, inputs = inject(built("llama"), LoRA(r=2, dropout=0.3, target_modules="all-linear")), inputs_of("llama")
    expected = gradients(model, inputs)
    torch.manual_seed(2)
    _, all_moved = offloaded(lambda: model(**inputs).loss, model, monkeypatch)
    with_options(model, True)
    model.zero_grad()
    torch.manual_seed(2)
    loss, moved = offloaded(lambda: model(**inputs).loss, model, monkeypatch)
    loss.backward()
    # the first block's input comes from frozen embeddings, without a gradient; behind the blocks, norm, head and loss
    assert len(moved) < 0.3 * len(all_moved)
    assert moved[0] == (3, 7, 32)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same({**found, "loss": loss.detach()}, expected)


def test_tensor_that_stays_and_is_changed_is_told() -> None:
    x = torch.randn(3, requires_grad=True)
    with offloaded_activations(nn.Linear(1, 1)):
        y = x.exp()
        z = y.sum()
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match=r"shape \(3,\) .* is at version 1, and was saved at version 0"):
        z.backward()


def test_what_stays_is_freed_with_its_graph() -> None:
    x = torch.randn(3, requires_grad=True)
    with offloaded_activations(nn.Linear(1, 1)):
        y = (x * 1).exp()  # saves its own output
    storage = StorageWeakRef(y.untyped_storage())
    del y
    assert storage.expired()


@pytest.mark.parametrize("module_class", [Decoder, Manual])
def test_training_is_the_same_to_the_bit(
    module_class: type[Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "SMALLEST", 64)
    monkeypatch.setattr(memory, "STORE", "elsewhere")

    def fit(**options: Any) -> Any:
        torch.manual_seed(5)
        module = module_class()
        peft = PEFT(LoRA(r=2, dropout=0.1, target_modules="all-linear"), modules_to_save=["head"], **options)
        trainer(tmp_path, peft=peft, max_epochs=1).fit(module, data())
        return module

    plain = fit()
    checkpointing = True if module_class is Decoder else ["body"]
    saving = fit(gradient_checkpointing=checkpointing, offload_activations=True)
    assert isinstance(saving, OffloadingModule)
    assert any(isinstance(module, Checkpointed) for module in saving.modules())
    assert not any(isinstance(module, (Checkpointed, OffloadingModule)) for module in plain.modules())
    assert_same(saving.state_dict(), plain.state_dict())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(saving)))
    assert isinstance(copied, OffloadingModule)
    assert type(remove(saving)) is module_class


@pytest.mark.parametrize("method", [LoRA(r=2), AdaLoRA(init_r=4, target_r=2)], ids=["plain", "with a penalty"])
def test_a_training_step_on_the_instance_is_run_and_given_back(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "SMALLEST", 64)
    monkeypatch.setattr(memory, "STORE", "elsewhere")

    def fit(offload: bool) -> Any:
        torch.manual_seed(5)
        module, called = Decoder(), []
        own = module.training_step

        def step(*args: Any) -> Any:
            called.append(1)
            return 2 * own(*args)

        module.training_step = step  # type: ignore[assignment, method-assign]
        peft = PEFT(method, modules_to_save=["head"], offload_activations=offload)
        trainer(tmp_path, peft=peft, max_epochs=1).fit(module, data())
        assert len(called) == 8
        state = module.state_dict()
        assert vars(remove(module))["training_step"] is step
        return state

    assert_same(fit(True), fit(False))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_activations_wait_on_the_cpu() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(1024, 1024), nn.GELU())]
    model = nn.Sequential(*layers).cuda().requires_grad_(False)
    x = torch.randn(8192, 1024, device="cuda", requires_grad=True)
    found = {}
    for name, block in {"kept": nn.Identity(), "moved": model}.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if name == "kept":
            loss = model(x).square().mean()
        else:
            with offloaded_activations(block):
                loss = model(x).square().mean()
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        (gradient,) = torch.autograd.grad(loss, x)
        found[name] = (held, gradient)
        del loss
    assert torch.equal(found["kept"][1], found["moved"][1])
    assert found["moved"][0] < 0.2 * found["kept"][0]
