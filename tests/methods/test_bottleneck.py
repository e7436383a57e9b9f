"""Houlsby's, Pfeiffer's and parallel adapters: their equations, places, counts, and what is refused."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import (
    METHODS,
    PEFTError,
    adapter_per_row,
    disable_adapters,
    inject,
    merge,
    remove,
    set_adapter,
    trainable_parameters,
)
from lightning_peft.injection import adapters
from lightning_peft.methods.base import Method
from lightning_peft.methods.houlsby import Houlsby
from lightning_peft.methods.parallel import ParallelAdapter
from lightning_peft.methods.pfeiffer import Pfeiffer

from .models import MODELS, TINY, inputs_of

R = 3
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1),
}
Bottlenecks = dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]


@torch.no_grad()
def move(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable_parameters(model).values():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output[0]


def tensors(adapter: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """D, b, U, b'."""
    own = dict(adapter.named_parameters())
    return own["down.weight"], own["down.bias"], own["up.weight"], own["up.bias"]


# the equation


@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("method", [Houlsby, Pfeiffer, ParallelAdapter])
def test_on_a_linear_layer_it_is_the_equation(method: type[Houlsby], activation: str) -> None:
    base = nn.Linear(6, 5).double()
    x = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True)
    model = move(inject(nn.Sequential(copy.deepcopy(base)), method(r=R, activation=activation, target_modules=["0"])))
    D, b, U, c = tensors(adapters(model, "default")["0"])
    read = 6 if method is ParallelAdapter else 5
    assert [tuple(t.shape) for t in (D, b, U, c)] == [(R, read), (R,), (5, R), (5,)]
    y = base(x)
    h, s = (x, 4.0) if method is ParallelAdapter else (y, 1.0)
    f = FORMULAS[activation]
    expected = y + s * (torch.einsum("or,...r->...o", U, f(torch.einsum("ri,...i->...r", D, h) + b)) + c)
    output = model(x)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    wanted, grad = [x, D, b, U, c], torch.randn_like(output)
    for one, other in zip(
        torch.autograd.grad(output, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("layer", "x", "letters"),
    [
        (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7), "l"),
        (nn.Conv2d(4, 6, 3, padding=2, dilation=2), (2, 4, 5, 7), "hw"),
        (nn.Conv2d(4, 6, 1), (4, 5, 7), "hw"),
        (nn.Conv3d(4, 6, 3, padding="same"), (2, 4, 3, 4, 5), "dhw"),
    ],
    ids=["1d", "2d", "2d without a batch", "3d"],
)
@pytest.mark.parametrize("method", [Houlsby, ParallelAdapter])
def test_a_convolution_s_channels_are_adapted_at_each_position(
    method: type[Houlsby], layer: nn.Module, x: tuple[int, ...], letters: str
) -> None:
    layer = copy.deepcopy(layer).double()
    images = torch.randn(*x, dtype=torch.float64)
    y = layer(images).detach()
    model = move(inject(nn.Sequential(layer), method(r=R, activation="relu", target_modules=["0"])))
    D, b, U, c = tensors(adapters(model, "default")["0"])
    h, s = (images, 4.0) if method is ParallelAdapter else (y, 1.0)
    ones = (-1, *[1] * len(letters))
    hidden = (torch.einsum(f"rc,...c{letters}->...r{letters}", D, h) + b.view(ones)).clamp(min=0)
    expected = y + s * (torch.einsum(f"or,...r{letters}->...o{letters}", U, hidden) + c.view(ones))
    torch.testing.assert_close(model(images), expected, rtol=1e-11, atol=1e-11)


class Reference:
    """The adapters as hooks on a bare model, made of torch's own layers."""

    def __init__(self, model: nn.Module, activation: nn.Module, scale: float | None) -> None:
        self.model, self.activation, self.scale = model, activation, scale
        self.layers = nn.ModuleDict()
        self.read: dict[str, Tensor] = {}

    def add(self, path: str, width: int, r: int, reader: str | None) -> tuple[nn.Linear, nn.Linear]:
        down, up = nn.Linear(width, r), nn.Linear(r, width)
        self.layers[path.replace(".", "/")] = nn.ModuleList([down, up])
        if reader is not None:
            self.model.get_submodule(reader).register_forward_pre_hook(
                lambda _, args, path=path: self.read.update({path: args[0]})
            )

        def changed(_: nn.Module, args: Any, output: Any) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            if reader is None:
                y = y + up(self.activation(down(y)))
            else:
                y = y + self.scale * up(self.activation(down(self.read[path])))
            return (y, *output[1:]) if isinstance(output, tuple) else y

        self.model.get_submodule(path).register_forward_hook(changed)
        return down, up


LLAMA = [f"model.layers.{i}" for i in range(2)]
BERT = [f"bert.encoder.layer.{i}" for i in range(2)]
GPT2 = [f"transformer.h.{i}" for i in range(2)]
T5_FF = [
    *[f"encoder.block.{i}.layer.1.DenseReluDense" for i in range(2)],
    *[f"decoder.block.{i}.layer.2.DenseReluDense" for i in range(2)],
]
FEED_FORWARDS = {
    "llama": [(f"{path}.mlp.gate_proj", f"{path}.mlp.down_proj") for path in LLAMA],
    "bert": [(f"{path}.intermediate.dense", f"{path}.output.dense") for path in BERT],
    "gpt2": [(f"{path}.mlp.c_fc", f"{path}.mlp.c_proj") for path in GPT2],
    "t5": [(f"{path}.wi", f"{path}.wo") for path in T5_FF],
    "vit": [(f"vit.layers.{i}.mlp.fc1", f"vit.layers.{i}.mlp.fc2") for i in range(2)],
    "mixtral": [(f"{path}.mlp", f"{path}.mlp") for path in LLAMA],
    "gpt-oss": [(f"{path}.mlp", f"{path}.mlp") for path in LLAMA],
}
ATTENTIONS = {
    "llama": [f"{path}.self_attn.o_proj" for path in LLAMA],
    "bert": [f"{path}.attention.output.dense" for path in BERT],
    "gpt2": [f"{path}.attn.c_proj" for path in GPT2],
    "t5": [
        *[f"encoder.block.{i}.layer.0.SelfAttention.o" for i in range(2)],
        *[f"decoder.block.{i}.layer.{name}.o" for i in range(2) for name in ("0.SelfAttention", "1.EncDecAttention")],
    ],
    "vit": [f"vit.layers.{i}.attention.o_proj" for i in range(2)],
    "mixtral": [f"{path}.self_attn.o_proj" for path in LLAMA],
    "gpt-oss": [f"{path}.self_attn.o_proj" for path in LLAMA],
}  # fmt: skip


def places(name: str, method: type[Method]) -> list[tuple[str | None, str]]:
    ff = FEED_FORWARDS[name]
    if method is ParallelAdapter:
        return list(ff)
    attention = [*ATTENTIONS[name]] if method is Houlsby else []
    return [(None, path) for path in [*attention, *[output for _, output in ff]]]


def with_reference(name: str, method: type[Houlsby]) -> tuple[nn.Module, Reference]:
    torch.manual_seed(3)
    base = MODELS[name]()
    reference = Reference(
        copy.deepcopy(base).requires_grad_(False),
        nn.GELU() if method is Houlsby else nn.ReLU(),
        4.0 if method is ParallelAdapter else None,
    )
    model = move(inject(base, method(reduction=8)))
    own = trainable_parameters(model)
    for reader, path in places(name, method):
        down, up = reference.add(path, TINY["hidden_size"], TINY["hidden_size"] // 8, reader)
        with torch.no_grad():
            for layer, at, end in ((down, reader or path, "down"), (up, path, "up")):
                layer.weight.copy_(own[f"{at}.adapters.default.{end}.weight"])
                layer.bias.copy_(own[f"{at}.adapters.default.{end}.bias"])
    assert sum(p.numel() for p in own.values()) == sum(p.numel() for p in reference.layers.parameters())
    return model, reference


@pytest.mark.parametrize("name", FEED_FORWARDS)
@pytest.mark.parametrize("method", [Houlsby, Pfeiffer, ParallelAdapter])
def test_a_model_computes_and_trains_as_with_hooks_of_plain_layers(method: type[Houlsby], name: str) -> None:
    model, reference = with_reference(name, method)
    inputs = inputs_of(name)
    runs = []
    for run_model, parameters in (
        (model, list(trainable_parameters(model).values())),
        (reference.model, list(reference.layers.parameters())),
    ):
        run_model.train()
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = logits(run_model, inputs).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append((losses, logits(run_model, inputs).detach()))
    assert runs[0][0][-1] < runs[0][0][0]
    torch.testing.assert_close(torch.tensor(runs[0][0]), torch.tensor(runs[1][0]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FEED_FORWARDS)
@pytest.mark.parametrize("method", [Houlsby, Pfeiffer, ParallelAdapter])
def test_at_the_start_outputs_are_the_base_s_and_remove_gives_it_back(method: type[Houlsby], name: str) -> None:
    model, inputs = MODELS[name]().eval(), inputs_of(name)
    keys = list(model.state_dict())
    with torch.no_grad():
        before = logits(model, inputs)
        inject(model, method(reduction=4))
        assert torch.equal(logits(model, inputs), before)
        move(model)
        assert (logits(model, inputs) - before).abs().max() > 1e-3
        with disable_adapters(model):
            assert torch.equal(logits(model, inputs), before)
        remove(model)
        assert list(model.state_dict()) == keys
        assert torch.equal(logits(model, inputs), before)


# the parallel adapter's two ends


def parallel_bert(seed: int = 1, name: str = "default") -> nn.Module:
    torch.manual_seed(3)
    return move(inject(MODELS["bert"](), ParallelAdapter(r=R), adapter_name=name), seed)


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    run().square().sum().backward()
    found = [p.grad.clone() for p in trainable_parameters(model).values() if p.grad is not None]
    assert len(found) == 2 * 4
    return found


@pytest.mark.parametrize("reentrant", [False, True])
def test_parallel_under_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model, inputs = parallel_bert().train(), inputs_of("bert")
    expected = gradients(model, lambda: logits(model, inputs))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for one, other in zip(gradients(model, lambda: logits(model, inputs)), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    copy.deepcopy(model)  # recomputation leaves nothing behind that can't be copied


def test_parallel_with_the_whole_model_checkpointed() -> None:
    model, inputs = parallel_bert().train(), inputs_of("bert")
    expected = gradients(model, lambda: logits(model, inputs))
    found = gradients(model, lambda: checkpoint(logits, model, inputs, use_reentrant=False))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_parallel_compiled_is_one_graph_and_computes_the_same() -> None:
    model, compiled, inputs = parallel_bert(), parallel_bert(), inputs_of("bert")
    expected, output = gradients(model, lambda: logits(model, inputs)), logits(model, inputs)
    torch._dynamo.reset()
    compiled.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(logits(compiled, inputs), output, rtol=1e-5, atol=1e-6)
        for one, other in zip(gradients(compiled, lambda: logits(compiled, inputs)), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [Houlsby, ParallelAdapter])
def test_rows_run_through_their_own_adapters(method: type[Houlsby]) -> None:
    torch.manual_seed(3)
    model = MODELS["bert"]().eval()
    for seed, name in enumerate(("first", "second")):
        move(inject(model, method(r=R), adapter_name=name), seed)
    inputs = inputs_of("bert")
    alone = {}
    with torch.no_grad():
        for name in ("first", "second"):
            set_adapter(model, name)
            alone[name] = logits(model, inputs)
        with disable_adapters(model):
            alone[None] = logits(model, inputs)
        rows: list[str | None] = ["second", None, "first"]
        with adapter_per_row(model, rows):
            together = logits(model, inputs)
    expected = torch.stack([alone[name][row] for row, name in enumerate(rows)])
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-6)
    assert (alone["first"] - alone["second"]).abs().max() > 1e-3


def test_parallel_copies_have_a_passage_of_their_own() -> None:
    model, inputs = parallel_bert().eval(), inputs_of("bert")
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    with torch.no_grad():
        expected = logits(model, inputs)
        for copied in copies:
            assert torch.equal(logits(copied, inputs), expected)
    ends = [
        adapters(each, "default")[f"bert.encoder.layer.{i}.{end}.dense"].passage
        for each in (model, *copies)
        for i in range(2)
        for end in ("intermediate", "output")
    ]
    assert ends[0::2] == ends[1::2]
    assert len({id(end) for end in ends}) == 8
    assert all(end.hidden is None for end in ends)


def test_parallel_can_be_copied_after_a_forward_that_broke_off() -> None:
    model, inputs = parallel_bert().eval(), inputs_of("bert")
    expected = logits(model, inputs).detach()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.bert.encoder.layer[0].intermediate.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model, inputs)
    handle.remove()
    for each in (copy.deepcopy(model), model):
        assert torch.equal(logits(each, inputs), expected)


def test_parallel_hooks_see_the_adapted_output() -> None:
    model, inputs = parallel_bert().eval(), inputs_of("bert")
    seen: list[Tensor] = []
    layer = model.bert.encoder.layer[0]
    layer.output.dense.register_forward_hook(lambda _, __, y: seen.append(y))
    layer.intermediate.dense.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer.intermediate.register_forward_hook(lambda _, __, h: seen.append(h))
    logits(model, inputs)
    x, h, y = seen
    D, b = (dict(model.named_parameters())[f"bert.encoder.layer.0.intermediate.dense.adapters.default.down.{n}"]
            for n in ("weight", "bias"))  # fmt: skip
    U, c = (dict(model.named_parameters())[f"bert.encoder.layer.0.output.dense.adapters.default.up.{n}"]
            for n in ("weight", "bias"))  # fmt: skip
    W, bias = layer.output.dense.weight, layer.output.dense.bias
    expected = h @ W.T + bias + 4 * ((x @ D.T + b).relu() @ U.T + c)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


def test_parallel_at_a_last_layer_that_runs_alone_is_told() -> None:
    model = parallel_bert().eval()
    with pytest.raises(PEFTError) as error:
        model.bert.encoder.layer[0].output.dense(torch.ones(1, 40))
    assert error.value.faults == (
        "ParallelAdapter: the feed-forward's last layer, a Linear, ran without its first; name the modules to adapt in "
        "target_modules",
    )


# precision


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("method", [Houlsby, ParallelAdapter])
def test_over_a_bf16_base_and_under_autocast_adapters_train_in_fp32(method: type[Houlsby], name: str) -> None:
    inputs = inputs_of(name)
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        model = move(inject(MODELS[name]().to(dtype), method(r=R)))
        seen: set[torch.dtype] = set()
        for _, module in model.named_modules():
            if type(module).__name__ == "Projection":
                module.register_forward_hook(lambda _, args, y, seen=seen: seen.update((args[0].dtype, y.dtype)))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits(model, inputs).float().square().sum().backward()
        assert seen == {torch.bfloat16}
        own = trainable_parameters(model).values()
        assert {p.dtype for p in own} == {torch.float32}
        assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in own)


# counts


def llama_7b() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # 2·d·m + d + m for each of two adapters in a layer
        (Houlsby(), 32 * 2 * (2 * 4096 * 256 + 4096 + 256)),
        (Houlsby(reduction=64), 32 * 2 * (2 * 4096 * 64 + 4096 + 64)),
        (Houlsby(r=8), 32 * 2 * (2 * 4096 * 8 + 4096 + 8)),
        (Pfeiffer(), 32 * (2 * 4096 * 256 + 4096 + 256)),
        (ParallelAdapter(), 32 * (2 * 4096 * 256 + 4096 + 256)),
        (Pfeiffer(exclude_modules=r".*layers\.[12]?\d\..*"), 2 * (2 * 4096 * 256 + 4096 + 256)),
        (Houlsby(exclude_modules=["o_proj"]), 32 * (2 * 4096 * 256 + 4096 + 256)),
    ],
)
def test_llama_7b(method: Houlsby, expected: int) -> None:
    model = inject(llama_7b(), method)
    own = trainable_parameters(model).values()
    assert sum(p.numel() for p in own) == expected
    assert all(p.is_meta for p in own)


def test_bert_base_as_the_papers_count() -> None:
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig())
    inject(model, Houlsby(r=64))
    assert (
        sum(p.numel() for p in trainable_parameters(model).values()) == 12 * 2 * (2 * 768 * 64 + 768 + 64) == 2_379_264
    )


# places that are named


def resnet() -> nn.Module:
    return MODELS["resnet"]().eval()


RESNET_BLOCKS = [f"resnet.encoder.stages.{stage}.layers.0" for stage in range(2)]


def test_a_resnet_s_blocks_and_convolutions_by_name() -> None:
    inputs = inputs_of("resnet")
    for targets, widths in (
        (r".*stages\.\d\.layers\.\d", dict(zip(RESNET_BLOCKS, (8, 16), strict=True))),
        (["shortcut.convolution"], {f"{RESNET_BLOCKS[1]}.shortcut.convolution": 16}),
    ):
        model = resnet()
        with torch.no_grad():
            before = logits(model, inputs)
            inject(model, Houlsby(r=R, target_modules=targets))
            assert torch.equal(logits(model, inputs), before)
            assert {p: tuple(a.up.weight.shape) for p, a in adapters(model, "default").items()} == {
                path: (width, R) for path, width in widths.items()
            }
            move(model)
            seen: dict[str, Tensor] = {}
            for path in widths:
                model.get_submodule(path).register_forward_hook(lambda _, __, y, p=path, s=seen: s.update({p: y}))
            assert (logits(model, inputs) - before).abs().max() > 1e-4
        assert {path: y.shape[1] for path, y in seen.items()} == widths


class Own(nn.Module):
    """A module of one's own that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return self.mix(x), 7


@pytest.mark.parametrize("method", [Houlsby, ParallelAdapter])
def test_a_module_of_one_s_own_by_name(method: type[Houlsby]) -> None:
    model = nn.ModuleDict({"own": Own().double()})
    x = torch.randn(4, 6, dtype=torch.float64)
    y = model["own"](x)[0].detach()
    move(inject(model, method(r=R, activation="relu", target_modules=["own"])))
    D, b, U, c = tensors(adapters(model, "default")["own"])
    h, s = (x, 4.0) if method is ParallelAdapter else (y, 1.0)
    output, rest = model["own"](x)
    torch.testing.assert_close(output, y + s * ((h @ D.T + b).clamp(min=0) @ U.T + c), rtol=1e-12, atol=1e-12)
    assert rest == 7


@pytest.mark.parametrize("method", [Houlsby, Pfeiffer, ParallelAdapter])
def test_the_blocks_of_torch_are_found_and_no_fast_path_passes_them_over(method: type[Houlsby]) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = move(inject(nn.TransformerEncoder(layer, 2), method(r=R))).eval()
    x = torch.randn(3, 5, 8)
    expected = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
        with disable_adapters(model):
            assert (model(x) - expected).abs().max() > 1e-3
    per_layer = {Houlsby: ["self_attn", "linear2"], Pfeiffer: ["linear2"], ParallelAdapter: ["linear1", "linear2"]}
    assert [*adapters(model, "default")] == [f"layers.{i}.{name}" for i in range(2) for name in per_layer[method]]


def test_what_is_trained_whole_is_left_out() -> None:
    model = inject(MODELS["bert"](), Pfeiffer(r=R), modules_to_save=["layer.0.output", "classifier"])
    kinds = {path: type(each).__name__ for path, each in adapters(model, "default").items()}
    assert [path for path, kind in kinds.items() if kind == "Bottleneck"] == ["bert.encoder.layer.1.output.dense"]
    model = inject(MODELS["bert"](), ParallelAdapter(r=R), modules_to_save=["layer.0.intermediate"])
    kinds = {path: type(each).__name__ for path, each in adapters(model, "default").items()}
    assert [path for path, kind in kinds.items() if kind in ("Down", "Up")] == [
        f"bert.encoder.layer.1.{end}.dense" for end in ("intermediate", "output")
    ]


# what is refused


def faults_of(model: nn.Module, method: Method) -> list[str]:
    keys = list(model.state_dict())
    with pytest.raises(PEFTError) as error:
        inject(model, method)
    assert list(model.state_dict()) == keys
    assert trainable_parameters(model).keys() == dict(model.named_parameters()).keys()
    return list(error.value.faults)


@pytest.mark.parametrize("name", ["Houlsby", "Pfeiffer", "ParallelAdapter", "Compacter"])
def test_wrong_fields_are_told_at_once(name: str) -> None:
    with pytest.raises(PEFTError) as error:
        METHODS[name](r=0, reduction=0, activation="rellu", target_modules=[], exclude_modules="(")  # type: ignore[call-arg]
    assert error.value.faults[:5] == (
        f"{name}.r: 0 is no width; it must be 1 or more, or None",
        f"{name}.reduction: 0 is no divisor; it must be 1 or more",
        f"{name}.activation: 'rellu' is none of relu, gelu, silu, tanh; did you mean 'relu' or 'gelu'?",
        f"{name}.target_modules: is empty; name a module, or leave it None to find the blocks",
        f"{name}.exclude_modules: '(' is not a regular expression (missing ), unterminated subpattern at position 0)",
    )
    with pytest.raises(PEFTError) as error:
        METHODS[name](target_modules="all-linear")  # type: ignore[call-arg]
    assert error.value.faults == (
        f"{name}.target_modules: 'all-linear' is no place for a bottleneck adapter; leave it None to find the blocks, "
        "or name modules",
    )


def test_a_scale_of_zero_is_refused() -> None:
    with pytest.raises(PEFTError) as error:
        ParallelAdapter(scale=0)
    assert error.value.faults == ("ParallelAdapter.scale: 0 would switch the adapter off; it must not be 0",)


def test_a_width_that_reduction_does_not_divide_is_told_once_with_what_does() -> None:
    assert faults_of(MODELS["bert"](), Houlsby(reduction=12)) == [
        "Houlsby.reduction: 12 does not divide 32 features; 1, 2, 4, 8, 16, 32 do, or give r "
        "(bert.encoder.layer.0.attention.output.dense and 3 more)"
    ]
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 10))
    assert faults_of(model, Pfeiffer(reduction=4, target_modules=r"\d")) == [
        "Pfeiffer.reduction: 4 does not divide 6 features; 1, 2, 3, 6 do, or give r (0)",
        "Pfeiffer.reduction: 4 does not divide 10 features; 1, 2, 5, 10 do, or give r (1)",
    ]


@pytest.mark.parametrize("method", [Houlsby, Pfeiffer, ParallelAdapter])
def test_a_model_without_blocks_is_refused(method: type[Houlsby]) -> None:
    assert faults_of(resnet(), method()) == [
        f"{method.__name__}.target_modules: no transformer block with such a sublayer is found in "
        "ResNetForImageClassification; name the modules whose output to adapt"
    ]


def test_modules_that_can_not_be_adapted_are_told() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(4, 4), "act": nn.Tanh(), "attn": nn.MultiheadAttention(4, 2)})
    model["row"] = nn.Sequential(nn.Linear(4, 4))
    can = "which can not be adapted; names that can be: layer, attn, 0"
    expected = [
        f"Houlsby.target_modules: 'act' matches act, a Tanh, {can}",
        "Houlsby.target_modules: 'out_proj' matches attn.out_proj, a NonDynamicallyQuantizableLinear of an "
        f"nn.MultiheadAttention, which never calls it, {can}",
        f"Houlsby.target_modules: 'row' matches row, a Sequential (name its last layer instead), {can}",
        "Houlsby.target_modules: 'lair' matches nothing; did you mean 'layer'?",
        "Houlsby.exclude_modules: 'atn' matches nothing; did you mean 'attn' or 'act'?",
    ]
    fields = {"target_modules": ["layer", "act", "out_proj", "row", "lair"], "exclude_modules": ["atn"]}
    assert faults_of(model, Houlsby(r=2, **fields)) == expected  # type: ignore[arg-type]


def test_parallel_refuses_what_has_no_features_to_read_or_moves_them() -> None:
    model = nn.ModuleDict({
        "words": nn.Embedding(5, 4),
        "strided": nn.Conv2d(3, 4, 3, stride=2),
        "valid": nn.Conv1d(3, 4, 3),
        "same": nn.Conv1d(3, 4, 3, padding=1),
    })  # fmt: skip
    fields = {"target_modules": ["words", "strided", "valid", "same"]}
    assert faults_of(model, ParallelAdapter(r=2, **fields)) == [  # type: ignore[arg-type]
        "ParallelAdapter.target_modules: reads no features that an adapter beside it could read (words)",
        "ParallelAdapter.target_modules: a convolution that changes the size can have no adapter beside it "
        "(strided and 1 more)",
    ]


class Pooled(nn.Module):
    """Gives one row for all that it reads, or a dict of it."""

    def __init__(self, as_dict: bool) -> None:
        super().__init__()
        self.layer, self.as_dict = nn.Linear(4, 4), as_dict

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x).mean(1)
        return {"y": y} if self.as_dict else y


class Flat(nn.Module):
    """Gives the features of all positions in one row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).flatten(1)


def test_what_only_running_shows_is_told_then() -> None:
    x = torch.ones(2, 3, 4)
    model = inject(nn.Sequential(Pooled(as_dict=True)), Houlsby(r=2, target_modules=["0"]))
    with pytest.raises(PEFTError, match=r"^a bottleneck adapter can't change the output of Pooled, a dict; name a mod"):
        model(x)
    model = inject(nn.Sequential(Pooled(as_dict=False)), ParallelAdapter(r=2, target_modules=["0"]))
    with pytest.raises(PEFTError, match=r"^ParallelAdapter: Pooled makes \(2, 4\) of \(2, 3, 4\); it must keep all si"):
        model(x)
    model = inject(nn.Sequential(Flat()), Houlsby(r=2, target_modules=["0"]))
    with pytest.raises(PEFTError, match=r"^a bottleneck adapter for 4 features met a tensor of \(2, 12\); name anothe"):
        model(x)


@pytest.mark.parametrize("name", ["Houlsby", "Pfeiffer", "ParallelAdapter", "Compacter"])
def test_merging_is_refused_with_the_reason_and_changes_nothing(name: str) -> None:
    model = move(inject(MODELS["bert"](), METHODS[name](r=4))).eval()  # type: ignore[call-arg]
    inputs = inputs_of("bert")
    expected = logits(model, inputs)
    with pytest.raises(PEFTError) as error:
        merge(model)
    assert error.value.faults == (
        "merge: a bottleneck adapter is not linear, so that no weight of the base computes the same; keep it attached",
    )
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("name", ["Houlsby", "Pfeiffer", "ParallelAdapter", "Compacter"])
def test_a_module_with_two_names_is_adapted_once(name: str) -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": layer, "two": layer, "last": nn.Linear(4, 4)})
    inject(model, METHODS[name](r=4, target_modules=["one", "two", "last"]))  # type: ignore[call-arg]
    standing = [module for module in model.values() if hasattr(module, "adapters")]
    assert len({id(module.adapters["default"]) for module in standing}) == 2
    model["two"](torch.ones(1, 4)).sum().backward()
