"""The plan's peak of a step beside the one that the allocator records in a real run, by Trainer and callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import pytest
import torch
from packaging.version import Version
from torch import nn

from lightning_peft import PEFT, LoRA
from lightning_peft.callback.base import Base
from lightning_peft.methods import METHODS
from lightning_peft.methods.base import Method
from lightning_peft.planning.building import Setting
from lightning_peft.planning.choosing import base_of
from lightning_peft.planning.estimates import Planner
from lightning_peft.state import adapter_tensors
from lightning_peft.tasks import CausalLM, ImageClassification, SequenceClassification
from tests.planning.measuring import cpu_peak, fit


def llama() -> L.LightningModule:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(hidden_size=64, intermediate_size=172, num_hidden_layers=5, vocab_size=500, **heads)
    return CausalLM(LlamaForCausalLM(config))


def bert() -> L.LightningModule:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 5, "num_attention_heads": 4}
    return SequenceClassification(BertForSequenceClassification(BertConfig(vocab_size=500, **sizes)), num_labels=2)


def vit() -> L.LightningModule:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5, "num_attention_heads": 4}
    return ImageClassification(ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **sizes)), num_labels=2)


def resnet() -> L.LightningModule:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[2, 2, 2, 2], layer_type="basic")
    return ImageClassification(ResNetForImageClassification(config), num_labels=2)


class Plain(L.LightningModule):
    """Somebody's own module: no task, no transformers, a batch of pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 4))
        self.example_input_array = None

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        x, y = batch
        loss = nn.functional.cross_entropy(self.layers(x), y)
        self.log("loss", loss)
        return {"loss": loss}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class Pairs(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        rows = torch.utils.data.TensorDataset(torch.zeros(512, 64), torch.zeros(512, dtype=torch.int64))
        return torch.utils.data.DataLoader(rows, batch_size=512)


@dataclass(frozen=True)
class Case:
    module: Callable[[], L.LightningModule]
    method: Callable[[], Method] | None
    rows: int | None = None
    length: int | None = None
    base: str = "none"
    checkpointing: bool = False
    save: tuple[str, ...] = ()
    precision: str = "32-true"
    accumulate: int = 1
    data: Callable[[], L.LightningDataModule] | None = None


def lora() -> Method:
    return LoRA(r=8, target_modules="all-linear", dropout=0.1)


CASES = {
    "lora": Case(llama, lora, 4, 256),
    "lora, bf16, longer": Case(llama, lora, 2, 512, base="bf16", precision="bf16-mixed"),
    "lora, nf4-dq": Case(llama, lora, 4, 128, base="nf4-dq", precision="bf16-mixed"),
    "lora, checkpointing": Case(llama, lora, 4, 256, checkpointing=True),
    "full, accumulated": Case(llama, None, 2, 64, accumulate=2),
    "bitfit": Case(bert, METHODS["BitFit"], 16, 64, save=("classifier",)),
    "ia3, int8": Case(bert, METHODS["IA3"], 16, 64, base="int8", save=("classifier",)),
    "dora on images": Case(vit, METHODS["DoRA"], 16, save=("classifier",)),
    "convolutions": Case(resnet, lambda: LoRA(r=4, target_modules=["convolution"]), 2, save=("classifier",)),
    "own module": Case(Plain, lora, data=Pairs),
}


@pytest.mark.parametrize("name", CASES)
def test_a_planned_peak_is_that_of_a_run(name: str) -> None:
    case = CASES[name]
    if case.base == "int8" and Version(torch.__version__).release < (2, 12):
        pytest.skip("torch 2.11 makes no fake parameter of this kind, which the plan says")
    base = base_of(case.base, Base())
    planner = Planner(
        case.module(),
        case.data() if case.data else None,
        precision=case.precision,
        accumulate_grad_batches=case.accumulate,
        rows=case.rows,
        length=case.length,
        on_gpu=False,
    )
    method = None if case.method is None else case.method()
    plan = planner.estimate(Setting(method, base, case.save, case.checkpointing))
    assert not plan.fault

    callback = (
        None
        if case.method is None
        else PEFT(
            case.method(),
            modules_to_save=list(case.save),
            quantization=base.quantization,
            base_dtype=base.dtype,
            gradient_checkpointing=case.checkpointing,
        )
    )
    kept: list[L.LightningModule] = []

    def run() -> None:
        kept.append(case.module())
        callbacks = [] if callback is None else [callback]
        steps, options = 2 * case.accumulate, {"accumulate_grad_batches": case.accumulate, "precision": case.precision}
        fit(kept[0], planner.batch, steps, callbacks=callbacks, **options)

    measured = cpu_peak(run)
    assert plan.peak == pytest.approx(measured, rel=0.03)
    assert plan.trainable == sum(each.numel() for each in kept[0].parameters() if each.requires_grad)
    states = [state for optimizer in kept[0].trainer.optimizers for state in optimizer.state.values()]
    saved = adapter_tensors(kept[0], "default") if case.method else kept[0].model.state_dict()
    tensors = [*saved.values(), *(value for state in states for value in state.values())]
    assert plan.checkpoint_bytes == sum(tensor.nbytes for tensor in tensors)
    assert plan.activations > measured / 4, "too small a case to tell anything of activations"
