"""LoRA+ and the user's optimizers: groups of their own for B, under every scheduler, and nothing frozen left in any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.optim import lr_scheduler as S

from lightning_peft import PEFT, LoRA, PEFTError, inject, trainable_parameters
from lightning_peft.callback.optimizers import keep_trainable
from lightning_peft.injection import adapters

STEPS = 9
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: S.LambdaLR(o, lambda step: 1 / (step + 1)),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: S.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: S.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: S.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: S.PolynomialLR(o, STEPS + 1),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, STEPS + 1),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 0.3, total_steps=STEPS + 2),
    "OneCycleLR in three": lambda o: S.OneCycleLR(o, 0.3, total_steps=STEPS + 2, three_phase=True),
    "CyclicLR": lambda o: S.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CyclicLR halving": lambda o: S.CyclicLR(o, 0.01, 0.1, step_size_up=2, mode="triangular2"),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, factor=0.5, patience=1, min_lr=0.02),
    "SequentialLR": lambda o: S.SequentialLR(
        o, [S.LinearLR(o, 0.1, total_iters=3), S.CosineAnnealingLR(o, STEPS)], milestones=[3]
    ),
    "SequentialLR of three": lambda o: S.SequentialLR(
        o, [S.ConstantLR(o, 0.1), S.ExponentialLR(o, 0.9), S.LinearLR(o)], milestones=[2, 5]
    ),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.LinearLR(o, 0.1, total_iters=3), S.ExponentialLR(o, 0.9)], o),
}


def pair() -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))


def step(optimizer: Optimizer, scheduler: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    if isinstance(scheduler, S.ReduceLROnPlateau):
        scheduler.step(1.0)
    elif scheduler is not None:
        scheduler.step()


def rate(optimizer: Optimizer, parameter: nn.Parameter) -> Any:
    """The learning rate that `parameter` trains with; it is in one group alone."""
    (group,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    return group["lr"]


def rates(schedule: Callable[[Optimizer], Any], factor: float | None) -> tuple[list[float], list[float]]:
    """The rates of A and B at each step, from one group that was split by `factor`, or not."""
    A, B = pair()
    optimizer = SGD([A, B], lr=0.1, momentum=0.9)
    scheduler = schedule(optimizer)
    if factor is not None:
        keep_trainable({"optimizer": optimizer, "lr_scheduler": scheduler}, {"A": A, "B": B}, {B: factor})
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(STEPS):
        for parameter, values in zip((A, B), found, strict=True):
            values.append(rate(optimizer, parameter))
        step(optimizer, scheduler)
    return found


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rate_of_B_is_the_ratio_times_that_of_A_at_every_step(name: str) -> None:
    unsplit, same = rates(SCHEDULERS[name], None)
    assert unsplit == same
    assert len(set(unsplit)) > 1
    for factor in (16.0, 0.5):  # powers of two, which multiply without rounding
        rates_A, rates_B = rates(SCHEDULERS[name], factor)
        assert rates_A == unsplit
        assert rates_B == [factor * value for value in unsplit]
    rates_A, rates_B = rates(SCHEDULERS[name], 10.0)
    assert rates_A == unsplit
    assert rates_B == pytest.approx([10 * value for value in unsplit], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        *((name, n) for name in ("OneCycleLR", "OneCycleLR in three", "LambdaLR", "ReduceLROnPlateau") for n in (2, 3)),
        ("SequentialLR of three", 3),
        ("SequentialLR of three", 2),
    ],
)
def test_groups_of_the_user_keep_their_rates_and_options(name: str, groups: int) -> None:
    pairs = [pair() for _ in range(groups)]

    def built() -> tuple[Optimizer, Any]:
        options = [{"params": list(p), "lr": 0.1 * 2**i, "weight_decay": 0.01 * i} for i, p in enumerate(pairs)]
        optimizer = SGD(options, lr=0.1, momentum=0.9)
        if name == "LambdaLR":
            return optimizer, S.LambdaLR(optimizer, [lambda t, i=i: 1 / (t + 1 + i) for i in range(groups)])
        if name.startswith("OneCycleLR"):
            top = [0.3 * 2**i for i in range(groups)]
            return optimizer, S.OneCycleLR(optimizer, top, total_steps=STEPS + 2, three_phase=name.endswith("three"))
        if name == "ReduceLROnPlateau":
            return optimizer, S.ReduceLROnPlateau(optimizer, patience=0, min_lr=[0.02 * 2**i for i in range(groups)])
        return optimizer, SCHEDULERS[name](optimizer)

    plain, plain_scheduler = built()
    expected = []
    for _ in range(STEPS):
        expected.append([rate(plain, A) for A, _ in pairs])
        step(plain, plain_scheduler)
    optimizer, scheduler = built()
    trainable = {f"{i}{n}": parameter for i, p in enumerate(pairs) for n, parameter in zip("AB", p, strict=True)}
    keep_trainable(([optimizer], [scheduler]), trainable, {B: 16.0 for _, B in pairs})
    assert len(optimizer.param_groups) == 2 * groups
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01 * i for i in range(groups)] * 2
    for values in expected:
        assert [rate(optimizer, A) for A, _ in pairs] == values
        assert [rate(optimizer, B) for _, B in pairs] == [16 * value for value in values]
        step(optimizer, scheduler)


def test_step_of_B_is_the_ratio_times_that_of_A() -> None:
    A, B = pair()
    optimizer = SGD([A, B], lr=0.25)
    keep_trainable(optimizer, {"A": A, "B": B}, {B: 4.0})
    step(optimizer, None)
    assert A.tolist() == [0.75, 0.75]
    assert B.tolist() == [0.0, 0.0, 0.0]


def test_rate_that_is_a_tensor_is_split_too() -> None:
    A, B = pair()
    optimizer = AdamW([A, B], lr=torch.tensor(0.5), foreach=False, capturable=False)
    scheduler = S.ExponentialLR(optimizer, 0.5)
    keep_trainable([{"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}}], {"A": A, "B": B}, {B: 4.0})
    found = []
    for _ in range(3):
        found.append((float(rate(optimizer, A)), float(rate(optimizer, B))))
        step(optimizer, scheduler)
    assert found == [(0.5, 2.0), (0.25, 1.0), (0.125, 0.5)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.attention = nn.MultiheadAttention(6, 2)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = x + self.attention(x, x, x)[0]
        return self.head(self.conv(x.mT).mT)


TARGETS = ["words", "attention", "conv", "head"]


def test_ratio_is_for_every_B_and_nothing_else() -> None:
    method = LoRA(r=2, lora_plus=16.0, target_modules=TARGETS)
    model = inject(Net(), method)
    factors = method.learning_rate_factors(adapters(model, "default"))
    names = {name for name, parameter in model.named_parameters() if factors.get(parameter) == 16.0}
    assert names == {name for name in trainable_parameters(model) if name.endswith("lora_B")}
    assert len(names) == len(factors) == 5
    assert LoRA(target_modules=TARGETS).learning_rate_factors(adapters(model, "default")) == {}


@pytest.mark.parametrize("kind", [AdamW, Adagrad, SGD])
def test_frozen_parameters_leave_the_optimizer_and_its_state(kind: type[Optimizer]) -> None:
    model = Net()
    method = LoRA(r=2, lora_plus=4.0, target_modules=TARGETS)
    inject(model, method)
    optimizer = kind(model.parameters(), lr=0.01)  # type: ignore[call-arg]
    before = len(optimizer.state)
    assert before == (len(list(model.parameters())) if kind is Adagrad else 0)
    trained = trainable_parameters(model)
    keep_trainable(optimizer, trained, method.learning_rate_factors(adapters(model, "default")))
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in trained.values()}
    assert len(held) == len(trained) == 10
    model(torch.arange(6).view(2, 3)).square().sum().backward()
    optimizer.step()
    assert {id(p) for p in optimizer.state} <= {id(p) for p in trained.values()}
    assert len(optimizer.state_dict()["state"]) == (0 if kind is SGD else len(trained))


def test_names_of_parameters_stay_beside_them() -> None:
    model = inject(Net(), LoRA(r=2, lora_plus=4.0, target_modules=["head"]))
    optimizer = SGD(model.named_parameters(), lr=0.1)
    trained = trainable_parameters(model)
    B = trained["head.adapters.default.lora_B"]
    keep_trainable(optimizer, trained, {B: 4.0})
    names = [group["param_names"] for group in optimizer.param_groups]
    assert names == [["head.adapters.default.lora_A"], ["head.adapters.default.lora_B"]]


def stale_message(count: int, total: int, first: str) -> str:
    listed = f"{first}, …" if count > 1 else first
    return (
        f"configure_optimizers: {count} of {total} trainable parameters are in no optimizer ({listed}). It seems "
        "to have been built before the adapters were attached, or over a part of the model: build it in "
        "configure_optimizers, over self.parameters()"
    )


def test_optimizer_from_before_the_injection_is_refused() -> None:
    model = Net()
    stale = AdamW(model.parameters())
    scheduler = S.StepLR(stale, 1)
    inject(model, LoRA(r=2, target_modules=["head", "conv"]))
    with pytest.raises(PEFTError) as caught:
        keep_trainable(([stale], [scheduler]), trainable_parameters(model), {})
    assert str(caught.value) == stale_message(4, 4, "conv.adapters.default.lora_A")


def test_optimizer_over_a_part_is_refused_and_two_over_the_whole_are_taken() -> None:
    model = inject(Net(), LoRA(r=2, target_modules=["head", "conv"]))
    trained = trainable_parameters(model)
    names = list(trained)
    with pytest.raises(PEFTError) as caught:
        keep_trainable(AdamW([trained[name] for name in names[:3]]), trained, {})
    assert str(caught.value) == stale_message(1, 4, "head.adapters.default.lora_B")
    one, other = AdamW(model.conv.parameters()), AdamW(model.head.parameters())
    keep_trainable([one, {"optimizer": other, "lr_scheduler": S.StepLR(other, 1)}], trained, {})
    assert [len(o.param_groups[0]["params"]) for o in (one, other)] == [2, 2]
    keep_trainable(None, trained, {})  # optimized by hand, without torch's optimizers


def test_lbfgs_trains_what_is_left_in_it() -> None:
    model = inject(Net(), LoRA(r=2, target_modules=["head"]))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5)
    trained = trainable_parameters(model)
    keep_trainable(optimizer, trained, {})
    ids, goal = torch.arange(6).view(2, 3), torch.randn(2, 3, 2)
    frozen = model.head.weight.clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(ids) - goal).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    for _ in range(5):
        last = optimizer.step(closure).item()
    assert last < 0.9 * first
    assert torch.equal(model.head.weight, frozen)
    assert sum(p.numel() for p in optimizer._params) == 2 * 6 + 2 * 2


def test_lbfgs_refuses_a_ratio_before_training() -> None:
    A, B = pair()
    with pytest.raises(PEFTError, match="lora_plus"):
        keep_trainable(torch.optim.LBFGS([A, B]), {"A": A, "B": B}, {B: 16.0})


class Module(pl.LightningModule):
    """Trained for six steps, with a scheduler by step; notes the rates of A and B."""

    def __init__(self, schedule: Callable[[Optimizer], Any]) -> None:
        super().__init__()
        self.net = Net()
        self.schedule = schedule
        self.seen: list[tuple[float, float]] = []

    def training_step(self, batch: Tensor) -> Tensor:
        optimizer = self.trainer.optimizers[0]
        named = dict(self.named_parameters())
        head = "net.head.adapters.default.lora_"
        self.seen.append((rate(optimizer, named[head + "A"]), rate(optimizer, named[head + "B"])))
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.randint(0, 7, (6, 1, 3)), batch_size=None)


@pytest.mark.parametrize("name", ["LinearLR", "OneCycleLR", "SequentialLR"])
def test_ratio_reaches_training(name: str) -> None:
    module = Module(SCHEDULERS[name])
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[PEFT(LoRA(r=2, lora_plus=16.0, target_modules=["head"]))],
    )
    trainer.fit(module)
    plain = SGD([pair()[0]], lr=0.5, momentum=0.9)
    scheduler, expected = SCHEDULERS[name](plain), []
    for _ in range(6):
        expected.append(plain.param_groups[0]["lr"])
        step(plain, scheduler)
    assert module.seen == [(value, 16 * value) for value in expected]
