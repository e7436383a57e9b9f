"""LoftQ: LoRA that starts from what quantization loses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_peft import IA3, PEFT, DoRA, Hybrid, LoRA, PEFTError, inject
from lightning_peft.methods._quantized import dense_weight, keep_error, kept_error
from lightning_peft.quantization import load_base, quantize
from lightning_peft.quantization.meta import meta_parameters


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(96, 128), nn.Linear(128, 96, bias=False), nn.Linear(96, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.down(torch.tanh(self.up(x)))))


METHOD = LoRA(init="loftq", r=12, alpha=3, rank_pattern={"down": 24}, target_modules=["up", "down"])


def base() -> Net:
    torch.manual_seed(0)
    return Net()


def quantized(kind: str, method: Any = METHOD) -> Net:
    return quantize(base(), kind, skip=["out"], error_ranks=method.error_ranks(base()))


def start(layer: Any) -> Tensor:
    adapter = layer.adapters["default"]
    return (adapter.scale * adapter.lora_B @ adapter.lora_A).detach()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "fp4", "int8"])
def test_the_start_is_the_best_that_the_rank_can_say_of_the_error(kind: str, rslora: bool) -> None:
    method = LoRA(init="loftq", r=12, alpha=3, rslora=rslora, rank_pattern={"down": 24}, target_modules=["up", "down"])
    assert method.error_ranks(base()) == {"up": 12, "down": 24}
    model = inject(quantized(kind, method), method)
    plain = quantize(base(), kind, skip=["out"])
    for name, rank in {"up": 12, "down": 24}.items():
        layer = model.get_submodule(name)
        # the base is what it is without LoftQ
        assert torch.equal(layer.weight, plain.get_submodule(name).weight)
        E = base().get_submodule(name).weight.detach() - dense_weight(layer)
        left = (E - start(layer)).norm()
        S = torch.linalg.svdvals(E)
        assert left < E.norm()
        # at least 97 % of what could be taken from the squared error is
        assert (E.norm() ** 2 - left**2) >= 0.97 * S[:rank].square().sum()
        assert layer.adapters["default"].lora_A.shape[0] == rank
        assert kept_error(layer) is None
    assert not hasattr(model.up.adapters["default"], "lora_A0")


@pytest.mark.parametrize("cls", [LoRA, DoRA])
def test_outputs_start_nearer_to_those_of_the_base_before_it_was_quantized(cls: type[LoRA]) -> None:
    method = cls(init="loftq", r=24, target_modules=["up", "down"])
    assert not method.identity_at_start
    x = torch.randn(200, 96)
    expected, model = base()(x), quantized("nf4", method)
    before = (model(x) - expected).norm()
    assert (inject(model, method)(x) - expected).norm() < 0.9 * before


def test_the_same_start_comes_again_and_no_random_number_is_drawn() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = (nn.Linear(96, 128) for _ in range(2))
    second.load_state_dict(first.state_dict())
    torch.manual_seed(5)
    for layer in (first, second):
        keep_error(layer, torch.ones(128, 96), 4)
    assert torch.equal(torch.rand(1), expected)
    for one, other in zip(kept_error(first), kept_error(second), strict=True):
        assert torch.equal(one, other)


def test_streamed_and_converted_bases_give_the_same_start(tmp_path: Path) -> None:
    save_file(base().state_dict(), tmp_path / "model.safetensors")
    with meta_parameters():
        streamed = Net()
    load_base(streamed, tmp_path, quantization="nf4-dq", skip=["out"], error_ranks=METHOD.error_ranks(streamed))
    ours, other = inject(streamed, METHOD), inject(quantized("nf4-dq"), METHOD)
    assert ours.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in ours.state_dict().items())


class Module(L.LightningModule):
    def __init__(self, on_meta: bool) -> None:
        super().__init__()
        self.on_meta = on_meta

    def configure_model(self) -> None:
        if self.on_meta:
            with meta_parameters():
                self.net = Net()
        else:
            self.net = base()

    def training_step(self, batch: Tensor) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.0)


@pytest.mark.parametrize("on_meta", [False, True])
def test_the_callback_keeps_the_error_as_it_quantizes(on_meta: bool, tmp_path: Path) -> None:
    save_file({f"net.{key}": tensor for key, tensor in base().state_dict().items()}, tmp_path / "model.safetensors")
    callback = PEFT(
        METHOD,
        modules_to_save=["out"],
        quantization="nf4",
        base_weights=tmp_path / "model.safetensors" if on_meta else None,
    )
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(accelerator="cpu", max_steps=1, callbacks=[callback], **options)
    module = Module(on_meta)
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(4, 96)))
    expected = inject(quantized("nf4"), METHOD)
    for name in ("up", "down"):
        assert torch.equal(start(module.net.get_submodule(name)), start(expected.get_submodule(name)))


def test_a_hybrid_asks_for_its_parts() -> None:
    method = Hybrid(methods=[METHOD, IA3(target_modules=["out"])])
    assert method.starts_from_error
    assert method.error_ranks(base()) == {"up": 12, "down": 24}
    assert not Hybrid(methods=[LoRA(), IA3()]).starts_from_error
    assert LoRA(r=2).error_ranks(base()) == {}


def test_a_base_whose_loss_is_not_known_is_refused() -> None:
    with pytest.raises(PEFTError) as error:
        inject(quantize(base(), "nf4"), LoRA(init="loftq", target_modules=["up"]))
    assert error.value.faults == (
        "LoRA.target_modules: up: init: 'loftq' starts from what quantization loses, and this layer was quantized "
        "before; let PEFT(LoRA(init='loftq', …), quantization=…) quantize a base in full precision, or choose another "
        "init",
    )
    with pytest.raises(PEFTError) as error:
        inject(base(), LoRA(init="loftq", target_modules=["up"]))
    assert error.value.faults == (
        "LoRA.init: 'loftq' starts from what quantization loses, and no targeted module is quantized; let PEFT(…, "
        "quantization='nf4-dq') quantize the base, or choose another init",
    )
    with pytest.raises(PEFTError, match=r"up: r: 13 is more than the 12 singular values of its error that were kept"):
        inject(quantized("nf4"), LoRA(init="loftq", r=13, target_modules=["up"]))


def test_a_layer_that_stays_dense_among_quantized_ones_starts_as_ever() -> None:
    method = LoRA(init="loftq", r=4, target_modules=["up", "out"])
    model = quantize(base(), "nf4", skip=["out"], error_ranks=method.error_ranks(base()))
    inject(copy.deepcopy(model), method)
    inject(model, method)
    assert start(model.out).abs().max() == 0
    assert start(model.up).abs().max() > 0
