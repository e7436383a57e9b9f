"""UniPELT against its equation in float64, written by hand from what its layers are given; its gates ignore padding."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_peft import (
    Hybrid,
    LoRA,
    PEFTError,
    Pfeiffer,
    PrefixTuning,
    UniPELT,
    adapter_per_row,
    disable_adapters,
    inject,
    merge,
    trainable_parameters,
)
from lightning_peft.cli.classes import parameters
from lightning_peft.injection import adapters, method_adapters, set_adapter
from lightning_peft.methods import _gates as gates
from tests.callback.toys import Decoder, data, trainer
from tests.methods.models import MODELS, inputs_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
METHOD = {"num_virtual_tokens": 3, "reduction": 8, "r": 2}


def base_of(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(1)
    model = MODELS[name]().eval().to(dtype)
    if options:
        model.set_attn_implementation(options["attention"])
    return model


def adapted(model: Any, **fields: Any) -> Any:
    torch.manual_seed(3)
    inject(model, UniPELT(**{**METHOD, **fields}))
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def gates_of(model: nn.Module) -> dict[str, gates.BlockGates]:
    return {path: a for path, a in adapters(model, "default").items() if isinstance(a, gates.BlockGates)}


def recorded(model: nn.Module, run: Callable[[], Any]) -> dict[str, Tensor]:
    """The gates (kinds, rows) of every block in one forward."""
    found: dict[str, Tensor] = {}
    patch = pytest.MonkeyPatch()
    names = {id(block): path for path, block in gates_of(model).items()}
    own = gates.BlockGates.gates

    def noted(self: gates.BlockGates, *args: Any) -> Tensor:
        found[names[id(self)]] = result = own(self, *args)
        return result

    with patch.context() as context, torch.no_grad():
        context.setattr(gates.BlockGates, "gates", noted)
        run()
    return found


def logits(model: Any, **inputs: Tensor) -> Tensor:
    return model(**inputs).logits


def test_every_layer_of_a_padded_bert_by_hand() -> None:
    model = adapted(base_of("bert", attention="eager"))
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def note(path: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs[path] = (*args, *kwargs.values())[0]
        outputs[path] = output[0] if isinstance(output, tuple) else output

    for path, module in model.named_modules():
        if ".adapters" not in path:
            module.register_forward_hook(lambda _, *call, path=path: note(path, *call), with_kwargs=True)
    lengths = torch.tensor([7, 4, 1])
    mask = torch.arange(7) < lengths[:, None]
    with torch.no_grad():
        model(input_ids=torch.randint(2, 48, (3, 7)), attention_mask=mask.long())
    own = adapters(model, "default")
    shared = next(adapter.prefix for adapter in own.values() if isinstance(adapter, gates.GatedPrefix))
    hidden = torch.tanh(shared.prefix_embedding @ shared.hidden_weight.T + shared.hidden_bias)
    seen = 0
    for layer in ("bert.encoder.layer.0", "bert.encoder.layer.1"):
        x = inputs[layer]
        block = own[layer]
        mean = torch.stack([row[:n].mean(0) for row, n in zip(x, lengths.tolist(), strict=True)])
        g_prefix, g_adapter, g_lora = (1 / (1 + (-(mean @ block.gate_weight.T + block.gate_bias)).exp())).T
        attention = f"{layer}.attention.self"
        for name in ("query", "key", "value"):
            module = model.get_submodule(f"{attention}.{name}")
            expected = x @ module.weight.T + module.bias
            if name != "key":
                lora = own[f"{attention}.{name}"].lora
                expected = expected + g_lora[:, None, None] * (16 / 2) * (x @ lora.lora_A.T @ lora.lora_B.T)
            torch.testing.assert_close(outputs[f"{attention}.{name}"], expected, rtol=1e-10, atol=1e-10)
        made = hidden @ own[attention].prefix.output_weight.T + own[attention].prefix.output_bias
        heads = [outputs[f"{attention}.{name}"].view(3, 7, 4, 8).transpose(1, 2) for name in ("query", "key", "value")]
        keys, values = (
            torch.cat([g_prefix[:, None, None, None] * table.view(1, 3, 4, 8).transpose(1, 2), given], 2)
            for table, given in zip(made.split(32, 1), heads[1:], strict=True)
        )
        scores = heads[0] @ keys.mT / math.sqrt(8)
        visible = torch.cat([torch.ones(3, 3, dtype=torch.bool), mask], 1)
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
        attended = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        torch.testing.assert_close(outputs[attention], attended, rtol=1e-8, atol=1e-8)
        dense, bottleneck = model.get_submodule(f"{layer}.output.dense"), own[f"{layer}.output.dense"].bottleneck
        h = inputs[f"{layer}.output.dense"] @ dense.weight.T + dense.bias
        update = (h @ bottleneck.down.weight.T + bottleneck.down.bias).relu() @ bottleneck.up.weight.T
        expected = h + g_adapter[:, None, None] * (update + bottleneck.up.bias)
        torch.testing.assert_close(outputs[f"{layer}.output.dense"], expected, rtol=1e-10, atol=1e-10)
        seen += 1
    assert seen == len(gates_of(model)) == 2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("name", "side"), [("bert", "right"), ("llama", "right"), ("llama", "left"), ("gpt2", "left"), ("t5", "right")]
)
def test_gates_of_padded_rows_are_those_of_the_rows_alone(name: str, side: str, attention: str) -> None:
    model = adapted(base_of(name, attention=attention))
    lengths, width = [6, 3, 1], 6
    rows = [torch.randint(2, 48, (n,)) for n in lengths]

    def run(ids: Tensor, mask: Tensor) -> None:
        more: dict[str, Tensor] = {"decoder_input_ids": torch.full((len(ids), 2), 5)} if name == "t5" else {}
        if name in ("llama", "gpt2"):
            more["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        model(input_ids=ids, attention_mask=mask, **more)

    def padded(values: Tensor) -> Tensor:
        room = (width - len(values), 0) if side == "left" else (0, width - len(values))
        return nn.functional.pad(values, room)

    ids = torch.stack([padded(row) for row in rows])
    mask = torch.stack([padded(torch.ones_like(row)) for row in rows])
    together = recorded(model, lambda: run(ids, mask))
    assert together
    for place, row in enumerate(rows):
        alone = recorded(model, lambda row=row: run(row[None], torch.ones_like(row)[None]))
        assert alone.keys() == together.keys() == gates_of(model).keys()
        for path, found in alone.items():
            torch.testing.assert_close(together[path][:, place], found[:, 0], rtol=1e-8, atol=1e-8)
    values = torch.cat([*together.values()])
    assert values.std() > 1e-3


def test_with_gates_wide_open_it_is_its_parts_together_and_shut_it_has_no_update() -> None:
    inputs = inputs_of("llama")
    model = adapted(base_of("llama"))
    parts = base_of("llama")
    targets = ["q_proj", "v_proj"]
    methods = [PrefixTuning(num_virtual_tokens=3), Pfeiffer(reduction=8), LoRA(r=2, target_modules=targets)]
    inject(parts, Hybrid(methods=methods))
    own = {key: tensor for key, tensor in model.state_dict().items() if ".adapters." in key and ".gate_" not in key}
    renamed = {
        key.replace("default.prefix.", "default.0.")
        .replace("default.bottleneck.", "default.1.")
        .replace("default.lora.", "default.2."): tensor
        for key, tensor in own.items()
    }
    assert renamed.keys() == {key for key in parts.state_dict() if ".adapters." in key}
    parts.load_state_dict(renamed, strict=False)
    with torch.no_grad():
        for block in gates_of(model).values():
            block.gate_bias.fill_(1e4)
        torch.testing.assert_close(logits(model, **inputs), logits(parts, **inputs), rtol=1e-9, atol=1e-9)
        for block in gates_of(model).values():
            block.gate_bias.fill_(-1e4)
        for adapter in adapters(parts, "default").values():
            for name, parameter in adapter.named_parameters():
                if "output_" in name or "lora_B" in name or "up." in name:
                    parameter.zero_()
        torch.testing.assert_close(logits(model, **inputs), logits(parts, **inputs), rtol=1e-9, atol=1e-9)


def test_the_gates_means_are_reported() -> None:
    model = adapted(base_of("bert"))
    method = UniPELT(**METHOD)
    attached = method_adapters(model, "default")
    assert method.report(attached) == {}
    found = recorded(model, lambda: model(**inputs_of("bert")))
    means = torch.stack([*found.values()]).mean((0, 2))
    report = method.report(attached)
    assert list(report) == ["gate_prefix", "gate_adapter", "gate_lora"]
    torch.testing.assert_close(torch.tensor([*report.values()], dtype=torch.double), means)
    assert method.report(method_adapters(copy.deepcopy(model), "default")) == {}


def test_a_trainer_logs_the_gates(tmp_path: Path) -> None:
    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    method = UniPELT(num_virtual_tokens=2, r=2)
    run = trainer(tmp_path, method=method, max_epochs=1, logger=logger, log_every_n_steps=2)
    run.fit(Decoder(), data())
    assert {"gate_prefix", "gate_adapter", "gate_lora"} <= run.callback_metrics.keys()
    assert all(0 < float(run.callback_metrics[f"gate_{kind}"]) < 1 for kind in gates.KINDS)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_gradients_under_gradient_checkpointing_are_the_same(name: str) -> None:
    inputs = inputs_of(name)

    def gradients(model: Any) -> Mapping[str, Tensor]:
        model.train()
        logits(model, **inputs).square().mean().backward()
        return {key: p.grad for key, p in trainable_parameters(model).items() if p.grad is not None}

    expected = gradients(adapted(base_of(name)))
    model = adapted(base_of(name))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model)
    assert found.keys() == expected.keys() == trainable_parameters(model).keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("cache", [None, "static"])
def test_left_padded_rows_generate_what_they_generate_alone(cache: str | None) -> None:
    model = adapted(base_of("llama"))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options["cache_implementation"] = cache
    ids = torch.randint(2, 48, (2, 5))
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    together = model.generate(input_ids=ids, attention_mask=mask, **options)
    for row, start in ((0, 0), (1, 3)):
        own = ids[row : row + 1, start:]
        alone = model.generate(input_ids=own, attention_mask=torch.ones_like(own), **options)
        assert alone[0, own.shape[1] :].tolist() == together[row, 5:].tolist()


def test_parameters_of_a_llama_of_7b() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    inject(model, UniPELT())
    width, layers, n = 4096, 32, 10
    prefix = n * width + (width * 512 + 512) + layers * (512 + 1) * 2 * width
    bottleneck = layers * (2 * width * (width // 16) + width + width // 16)
    lora = layers * 2 * (2 * 8 * width)
    gate = layers * 3 * (width + 1)
    assert sum(p.numel() for p in trainable_parameters(model).values()) == prefix + bottleneck + lora + gate


def test_disabled_it_is_the_base_and_it_can_not_be_merged() -> None:
    model, inputs = base_of("gpt2").requires_grad_(False), inputs_of("gpt2")
    before = logits(model, **inputs)
    adapted(model)
    with disable_adapters(model):
        assert torch.equal(logits(model, **inputs), before)
    assert (logits(model, **inputs) - before).abs().max() > 1e-2
    with pytest.raises(PEFTError, match=r"^merge: "):
        merge(model)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_rows_run_through_their_own_adapters_and_gates(name: str) -> None:
    model, inputs = base_of(name), inputs_of(name)
    for adapter_name, n in (("first", 3), ("second", 2)):
        inject(model, UniPELT(**{**METHOD, "num_virtual_tokens": n}), adapter_name=adapter_name)
        with torch.no_grad():
            for parameter in trainable_parameters(model).values():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    names = ["second", None, "first"]
    with torch.no_grad():
        whole = {}
        for adapter_name in ("first", "second"):
            set_adapter(model, adapter_name)
            whole[adapter_name] = logits(model, **inputs)
        with disable_adapters(model):
            base = logits(model, **inputs)
        expected = torch.stack([whole["second"][0], base[1], whole["first"][2]])
        with adapter_per_row(model, names):
            torch.testing.assert_close(logits(model, **inputs), expected, rtol=1e-8, atol=1e-8)


def test_where_queries_and_values_are_one_layer_lora_stands_on_all_of_it() -> None:
    found = adapters(adapted(base_of("gpt2")), "default")
    kinds = {
        path.removeprefix("transformer."): type(adapter).__name__ for path, adapter in found.items() if "h.0" in path
    }
    assert kinds == {
        "h.0": "BlockGates",
        "h.0.attn": "GatedPrefix",
        "h.0.attn.c_attn": "GatedLoRA",
        "h.0.mlp.c_proj": "GatedBottleneck",
    }


def test_wrong_fields_are_told_at_once() -> None:
    with pytest.raises(PEFTError) as error:
        UniPELT(num_virtual_tokens=0, reduction=0, r=0, alpha=0, dropout=1.0)
    assert error.value.faults == (
        "UniPELT.num_virtual_tokens: 0 is no number of them; at least 1",
        "UniPELT.reduction: 0 is no divisor; it must be 1 or more",
        "UniPELT.r: 0 is not a rank; it must be 1 or more",
        "UniPELT.alpha: 0 would switch the adapter off; it must not be 0",
        "UniPELT.dropout: 1.0 is not a probability below 1; it must be in [0, 1)",
    )


def test_models_that_it_does_not_fit_are_refused_with_the_reasons() -> None:
    with pytest.raises(PEFTError) as error:
        inject(base_of("bert"), UniPELT(reduction=5))
    [fault] = error.value.faults
    assert fault.startswith("UniPELT: Pfeiffer.reduction: 5 does not divide 32 features; 1, 2, 4, 8, 16, 32 do")
    with pytest.raises(PEFTError) as error:
        inject(MODELS["resnet"](), UniPELT())
    assert len(error.value.faults) == 2
    assert all(fault.startswith("UniPELT: ") for fault in error.value.faults)


def test_the_command_line_knows_the_types_of_its_fields() -> None:
    found = {name: parameter.hint for name, parameter in parameters(UniPELT).items()}
    assert found == {"num_virtual_tokens": int, "reduction": int, "r": int, "alpha": float, "dropout": float}
