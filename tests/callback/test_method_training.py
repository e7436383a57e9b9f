"""A method's penalty and its work after each step, in every way that a LightningModule is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lightning_peft import LoRA, inject, trainable_parameters
from lightning_peft.methods._host import Adapter
from tests.callback.toys import Manual, Toy, data, trainer

WEIGHT = 0.3


@dataclass(kw_only=True)
class Decayed(LoRA):
    """LoRA with the sum of its squares in the loss, which keeps the gradient's norm that each step was taken with."""

    seen: ClassVar[list[tuple[int, float, float]]] = []

    def penalty(self, attached: Mapping[str, Adapter]) -> Tensor | None:
        return WEIGHT * sum(p.square().sum() for adapter in attached.values() for p in adapter.parameters())

    def after_step(self, attached: Mapping[str, Adapter], step: int, total_steps: float) -> None:
        norm = sum(float(p.grad.square().sum()) for adapter in attached.values() for p in adapter.parameters())
        self.seen.append((step, total_steps, norm))

    def report(self, attached: Mapping[str, Adapter]) -> dict[str, float]:
        return {"adapters": float(len(attached))}


class Plain(Toy):
    """Without dropout, so that steps can be told by hand."""

    def build(self) -> None:
        super().build()
        self.body[3].p = 0.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Mapped(Plain):
    def training_step(self, batch: list[Tensor], _: int) -> Any:
        return {"loss": self.loss(batch), "more": 1}


class ManualPlain(Manual):
    def build(self) -> None:
        super().build()
        self.body[3].p = 0.0

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.body.parameters(), lr=0.05), torch.optim.SGD(self.head.parameters(), lr=0.05)]


def method(kind: type[LoRA] = Decayed) -> LoRA:
    return kind(r=2, target_modules=["body.0", "body.4"])


def by_hand(accumulate: int = 1, clip: float | None = None, steps: int = 4) -> tuple[dict[str, Tensor], list[float]]:
    """The trained tensors of as many steps of plain torch, and the norms of the adapters' gradients."""
    model = Plain()
    torch.manual_seed(5)
    inject(model, method(), modules_to_save=["head"])
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.eval()
    own = [p for name, p in trainable_parameters(model).items() if "lora" in name]
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.05)
    norms = []
    batches = iter(data())
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            loss = model.loss(next(batches)) + WEIGHT * sum(p.square().sum() for p in own)
            (loss / accumulate).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
        optimizer.step()
        norms.append(sum(float(p.grad.square().sum()) for p in own))
    return {name: p.detach() for name, p in trainable_parameters(model).items()}, norms


@pytest.mark.parametrize(
    ("module", "options", "hand"),
    [
        (Plain, {}, {}),
        (Mapped, {}, {}),
        (Plain, {"accumulate_grad_batches": 2}, {"accumulate": 2}),
        (Plain, {"gradient_clip_val": 0.1}, {"clip": 0.1}),
        (ManualPlain, {}, {}),
    ],
)
def test_penalty_and_steps_are_those_of_a_loop_by_hand(
    module: type[Toy], options: dict[str, Any], hand: dict[str, Any], tmp_path: Path
) -> None:
    Decayed.seen.clear()
    torch.manual_seed(5)
    # Lightning counts a step of each optimizer
    steps = 8 if module is ManualPlain else 4
    run = trainer(tmp_path, method=method(), max_steps=steps, max_epochs=-1, **options)
    model = module()
    torch.manual_seed(5)
    run.fit(model, data())
    expected, norms = by_hand(**hand)
    found = {name: p.detach() for name, p in trainable_parameters(model).items()}
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)
    assert [step for step, _, _ in Decayed.seen] == [1, 2, 3, 4]
    assert {total for _, total, _ in Decayed.seen} == {steps}
    assert [norm for _, _, norm in Decayed.seen] == pytest.approx(norms, rel=1e-4)


def test_steps_go_on_after_a_resume(tmp_path: Path) -> None:
    Decayed.seen.clear()
    run = trainer(tmp_path, method=method(), max_epochs=1)
    run.fit(Plain(), data())
    run.save_checkpoint(tmp_path / "one.ckpt")
    trainer(tmp_path, method=method(), max_epochs=2).fit(Plain(), data(), ckpt_path=tmp_path / "one.ckpt")
    assert [step for step, _, _ in Decayed.seen] == list(range(1, 17))


def test_what_a_method_reports_is_logged(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, method=method(), max_epochs=1, logger=logger, log_every_n_steps=2)
    run.fit(Plain(), data())
    assert float(run.callback_metrics["adapters"]) == 2


def test_a_method_without_any_leaves_training_alone(tmp_path: Path) -> None:
    model = Plain()
    trainer(tmp_path, method=method(LoRA), max_epochs=1).fit(model, data())
    assert type(model).training_step is Plain.training_step
