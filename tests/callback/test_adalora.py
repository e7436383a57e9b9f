"""AdaLoRA through the Trainer: the budget, the penalty, exact resumes, and every way of stepping."""

from __future__ import annotations

import textwrap
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_peft import PEFT, AdaLoRA, PEFTError, load_from_checkpoint
from lightning_peft.injection import adapters
from lightning_peft.methods._adalora_layers import SVD
from tests.callback.toys import BuiltInConfigureModel, Manual, Toy, data, tensors, trainer
from tests.processes import run_ranks

TARGETS = ["body.0", "body.4"]


def adalora(**fields: Any) -> AdaLoRA:
    return AdaLoRA(**{"init_r": 6, "target_r": 2, "target_modules": TARGETS, "dropout": 0.1, **fields})


def parts(module: L.LightningModule) -> list[SVD]:
    found = list(adapters(module, "default").values())
    return [part for part in found if isinstance(part, SVD)]


class Ranks(Callback):
    """How many singular values are not zero after each batch, and what is averaged."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: L.LightningModule, *_: Any) -> None:
        self.seen.append(sum(int((part.lora_E != 0).sum()) for part in parts(pl_module)))


def expected_ranks(total: int, tinit: int, tfinal: int) -> list[int]:
    """By hand, for two matrices from rank 6 to 2."""
    last = total - tfinal
    left = [1 - (min(step, last) - tinit) / (last - tinit) for step in range(1, total + 1)]
    return [12 if step <= tinit else int(8 * part**3 + 4) for step, part in enumerate(left, 1)]


def test_the_budget_falls_over_the_trainer_s_steps_and_is_logged(tmp_path: Path) -> None:
    ranks = Ranks()
    run = trainer(tmp_path, ranks, method=adalora(), max_epochs=3, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    module = Toy()
    run.fit(module, data())
    # a tenth of 24 steps before, three tenths after
    assert ranks.seen == expected_ranks(24, tinit=2, tfinal=7)
    assert ranks.seen[16:] == [4] * 8
    assert float(run.callback_metrics["mean_rank"]) == 2.0


def test_accumulated_batches_count_as_one_step(tmp_path: Path) -> None:
    ranks = Ranks()
    run = trainer(tmp_path, ranks, method=adalora(), max_epochs=5, accumulate_grad_batches=2, gradient_clip_val=0.1)
    run.fit(Toy(), data())
    steps = expected_ranks(20, tinit=2, tfinal=6)
    assert ranks.seen[1::2] == steps
    # before the first step Λ is zero
    assert ranks.seen[::2] == [0, *steps[:-1]]


def test_manual_optimization_prunes_by_the_steps_of_the_adapters_optimizer(tmp_path: Path) -> None:
    ranks = Ranks()
    module = Manual()
    trainer(tmp_path, ranks, method=adalora(), max_epochs=3).fit(module, data())
    assert ranks.seen == expected_ranks(24, tinit=2, tfinal=7)


def test_total_steps_stand_for_the_trainer_s(tmp_path: Path) -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from data().dataset

    stream = DataLoader(Endless(), 8)
    ranks = Ranks()
    for epochs in (-1, 2):
        with pytest.raises(PEFTError, match=r"AdaLoRA.total_steps: nothing says how many steps the budget has to fall"):
            trainer(tmp_path, method=adalora(), max_epochs=epochs).fit(Toy(), stream)
    run = trainer(tmp_path, ranks, method=adalora(total_steps=8, tinit=1, tfinal=2), max_epochs=2)
    run.fit(Toy(), stream)
    assert ranks.seen == [*expected_ranks(8, tinit=1, tfinal=2), *[4] * 8]


def test_a_schedule_that_does_not_fit_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(PEFTError) as caught:
        trainer(tmp_path, method=adalora(tinit=10, tfinal=6), max_epochs=2).fit(Toy(), data())
    assert caught.value.faults == (
        "AdaLoRA.tinit: 10 steps before pruning and 6 after it (tfinal) leave none for it in 16 steps; tinit + tfinal "
        "must be below 16",
    )


def test_the_penalty_makes_the_factors_orthonormal(tmp_path: Path) -> None:
    def distance(weight: float) -> float:
        L.seed_everything(1, verbose=False)
        module = Toy()
        method = adalora(orth_reg_weight=weight)
        trainer(tmp_path, method=method, max_epochs=10).fit(module, data())
        return sum(part.orthogonality().item() for part in parts(module))

    assert distance(1.0) < 0.5
    assert distance(0.0) > 5


def run_for(
    folder: Path, epochs: int, seed: int, module: Toy, path: str | None = None, stop: bool = False, **options: Any
) -> tuple[dict[str, Tensor], L.Trainer, list[str]]:
    """Train over shuffled batches, keeping the checkpoint of every epoch; `stop` ends after the first two."""
    L.seed_everything(seed, verbose=False)
    every = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)

    class Stop(Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            trainer.should_stop = stop and trainer.current_epoch == 1

    fit = trainer(folder, every, Stop(), method=adalora(**options), max_epochs=epochs)
    fit.fit(module, DataLoader(data().dataset, 8, shuffle=True), ckpt_path=path)
    return module.state_dict(), fit, sorted(map(str, folder.glob("*.ckpt")))


@pytest.mark.parametrize("module_class", [Toy, BuiltInConfigureModel, Manual])
@pytest.mark.parametrize("options", [{}, {"delta_t": 3, "tfinal": 2}, {"total_steps": 24}])
def test_a_resume_in_the_middle_of_pruning_is_exact(
    module_class: type[Toy], options: dict[str, Any], tmp_path: Path
) -> None:
    whole, whole_run, _ = run_for(tmp_path / "whole", 3, 5, module_class(), **options)
    # with a total of their own, two epochs are as good as three that were stopped
    epochs = 2 if "total_steps" in options else 3
    stopped = module_class()
    with pytest.warns(UserWarning, match="training ends after step 16") if epochs == 2 else nullcontext():
        _, _, (_, path) = run_for(tmp_path / "two", epochs, 5, stopped, stop=True, **options)
    kept = sum(int(part.mask.sum()) for part in parts(stopped))
    assert 4 <= kept < 12
    resumed, resumed_run, _ = run_for(tmp_path / "resumed", 3, 6, module_class(), path, **options)
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key
    for ours, theirs in zip(whole_run.optimizers, resumed_run.optimizers, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(tensors(ours.state_dict()), tensors(theirs.state_dict()), strict=True)
        )
    assert sum(int((value != 0).sum()) for key, value in resumed.items() if key.endswith(".lora_E")) == 4
    assert all(value.any() for key, value in resumed.items() if "exp_avg" in key)


def test_a_checkpoint_loads_without_a_trainer_and_computes_the_same(tmp_path: Path) -> None:
    module = Toy()
    _, _, paths = run_for(tmp_path, 2, 5, module)
    x = next(iter(data()))[0]
    loaded = load_from_checkpoint(Toy, paths[-1]).eval()
    assert torch.equal(loaded(x), module.eval()(x))
    assert [part.mask.tolist() for part in parts(loaded)] == [part.mask.tolist() for part in parts(module)]
    held = torch.load(paths[-1], weights_only=True)["state_dict"]
    # parameters, two averages of each, and the mask of every matrix; the head
    assert sum("lora" in key for key in held) == 2 * 9
    assert sum(key.endswith(".mask") for key in held) == 2


class Exploding(Toy):
    """Whose loss overflows in one batch."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor | None:
        loss = super().training_step(batch, index)
        assert loss is not None
        return loss * float("inf") if index == 3 else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def test_under_16_bit_scaling_a_skipped_step_is_none_and_gradients_are_unscaled(tmp_path: Path) -> None:
    def run(scale: float, kind: type[Toy]) -> tuple[list[SVD], list[int]]:
        L.seed_everything(2, verbose=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        ranks, module = Ranks(), kind()
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        method = adalora(dropout=0.0, tinit=2, tfinal=3)
        trainer(tmp_path, ranks, method=method, max_epochs=2, plugins=[plugin]).fit(module, data())
        return parts(module), ranks.seen

    seen = run(16.0, Exploding)[1]
    whole = expected_ranks(16, tinit=2, tfinal=3)
    # in both epochs the fourth batch takes no step, and so the last phase begins two batches later
    assert seen == [*whole[:3], whole[2], *whole[3:10], whole[9], *whole[10:14]]
    assert seen[-1] == 4
    found, other = run(16.0, Toy)[0], run(4096.0, Toy)[0]
    for one, two in zip(found, other, strict=True):
        for name in ("exp_avg_ipt_lora_A", "exp_avg_ipt_lora_E", "exp_avg_unc_lora_B"):
            a, b = one.get_buffer(name), two.get_buffer(name)
            assert torch.isfinite(a).all()
            assert a.norm().item() == pytest.approx(b.norm().item(), rel=0.2), name


def test_the_learning_rate_finder_leaves_no_trace_in_the_schedule(tmp_path: Path) -> None:
    ranks = Ranks()
    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    run = trainer(tmp_path, finder, ranks, method=adalora(), max_epochs=3)
    module = Toy()
    module.lr = 0.05
    run.fit(module, data())
    assert ranks.seen[-24:] == expected_ranks(24, tinit=2, tfinal=7)


SCRIPT = """
import sys
import lightning as L, torch
from lightning.pytorch.strategies import DDPStrategy
from lightning_peft import PEFT
from tests.callback.test_adalora import Ranks, adalora, parts
from tests.callback.toys import Toy, data

L.seed_everything(3, verbose=False)
module, ranks = Toy(), Ranks()
trainer = L.Trainer(
    accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo"), max_epochs=4, logger=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[1],
    callbacks=[PEFT(adalora(), modules_to_save=["head"]), ranks],
)
trainer.fit(module, data())
state = {key: value for key, value in module.state_dict().items() if ".adapters." in key}
torch.save({"ranks": ranks.seen, "state": state}, f"{sys.argv[1]}/{trainer.global_rank}.pt")
"""


@pytest.mark.xdist_group("devices")
@pytest.mark.slow
def test_two_processes_keep_the_same_ranks(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    run_ranks(tmp_path, [script, tmp_path])
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["ranks"] == two["ranks"] == expected_ranks(16, tinit=1, tfinal=4)
    assert one["state"].keys() == two["state"].keys()
    for key, value in one["state"].items():
        assert torch.equal(two["state"][key], value), key


def test_what_is_pruned_stays_pruned_while_the_optimizer_goes_on(tmp_path: Path) -> None:
    class Watch(Ranks):
        masks: list[list[list[bool]]]

        def on_train_batch_end(self, trainer: Any, pl_module: L.LightningModule, *_: Any) -> None:
            super().on_train_batch_end(trainer, pl_module)
            self.masks = [*getattr(self, "masks", []), [part.mask.tolist() for part in parts(pl_module)]]

    watch = Watch()
    module = Toy()
    peft = PEFT(adalora(tinit=0, tfinal=10, total_steps=16), modules_to_save=["head"])
    trainer(tmp_path, watch, peft=peft, max_epochs=4).fit(module, data())
    assert watch.seen[5:] == [4] * 27
    assert all(masks == watch.masks[5] for masks in watch.masks[5:])
