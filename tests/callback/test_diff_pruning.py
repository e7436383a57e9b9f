"""Diff pruning through the Trainer: when and what is cut, exact resumes, small files that give the model to the bit."""

from __future__ import annotations

import math
import textwrap
from collections import OrderedDict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_peft import PEFT, DiffPruning, PEFTError, load_from_checkpoint, trainable_parameters
from lightning_peft.injection import method_adapters
from lightning_peft.methods._diff_layers import Diff, all_diffs
from lightning_peft.state import adapter_tensors
from tests.callback.toys import Manual, Toy, data, tensors, trainer
from tests.processes import run_ranks

TARGETS = ["body.0", "body.1", "body.4"]
ENTRIES = (8 * 16 + 16) + 2 * 16 + (16 * 16 + 16)


def pruning(**fields: Any) -> DiffPruning:
    return DiffPruning(**{"target": 0.05, "prune_at": 0.7, "target_modules": TARGETS, **fields})


def diffs(module: L.LightningModule) -> list[Diff]:
    return all_diffs(method_adapters(module, "default"))


class Changed(Callback):
    """How many entries differ from the base after each batch, as evaluation would see them."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: L.LightningModule, *_: Any) -> None:
        pl_module.eval()
        modules = [pl_module.get_submodule(path) for path in TARGETS]
        own = [(module, name) for module in modules for name in ("weight", "bias")]
        self.seen.append(sum(int((getattr(module, name) != module._parameters[name]).sum()) for module, name in own))
        pl_module.train()


@pytest.mark.parametrize(
    ("module_class", "options"),
    [(Toy, {}), (Manual, {}), (Toy, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1})],
)
def test_after_the_share_of_steps_exactly_the_target_is_left(
    module_class: type[Toy], options: dict[str, Any], tmp_path: Path
) -> None:
    changed = Changed()
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, changed, method=pruning(), logger=logger, log_every_n_steps=1, **options)
    module = module_class(lr=1e-3)
    base = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    L.seed_everything(1, verbose=False)
    run.fit(module, data())
    batches_per_step = options.get("accumulate_grad_batches", 1)
    steps = changed.seen[batches_per_step - 1 :: batches_per_step]
    # Lightning's total counts the steps of both optimizers of Manual, but a step of its adapters is one batch
    total = 16 // batches_per_step
    before = math.ceil(0.7 * total) - 1
    kept = round(0.05 * ENTRIES)
    assert (len(steps), kept) == (total, 22)
    assert kept not in steps[:before]
    # at Manual's rate all gates are shut by then, and what is kept starts from zero
    assert steps[before] in (0, kept)
    assert steps[before + 1 :] == [kept] * (total - before - 1)
    assert sum(int(diff.mask.sum()) for diff in diffs(module)) == kept
    assert float(run.callback_metrics["kept_share"]) == pytest.approx(kept / ENTRIES)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in base.items())


def test_gates_learn_a_hundred_times_faster(tmp_path: Path) -> None:
    module = Toy()
    run = trainer(tmp_path, method=pruning(), max_epochs=1)
    run.fit(module, data())
    (optimizer,) = run.optimizers
    by_name = {id(parameter): name for name, parameter in module.named_parameters()}
    rates = {
        by_name[id(p)].rpartition(".")[2]: group["lr"] for group in optimizer.param_groups for p in group["params"]
    }
    assert rates["alpha"] == rates["group_alpha"] == pytest.approx(100 * rates["w"])


@pytest.mark.parametrize("epoch", [0, 1], ids=["with gates", "pruned"])
@pytest.mark.parametrize(
    ("module_class", "options", "fields"),
    [
        (Toy, {}, {}),
        (Toy, {"gradient_clip_val": 0.05}, {"structured": False}),
        (Manual, {}, {"total_steps": 24}),
    ],
)
def test_resume_is_exact(
    module_class: type[Toy], options: dict[str, Any], fields: dict[str, Any], epoch: int, tmp_path: Path
) -> None:
    rows = data().dataset

    def run(seed: int, path: Path | None = None) -> tuple[dict[str, Tensor], L.Trainer]:
        L.seed_everything(seed, verbose=False)
        module = module_class()
        every = ModelCheckpoint(tmp_path / str(seed), "{epoch}", save_top_k=-1)
        fit = trainer(tmp_path, every, method=pruning(prune_at=0.5, **fields), max_epochs=3, **options)
        fit.fit(module, DataLoader(rows, 8, shuffle=True), ckpt_path=path)
        assert all(diff.is_pruned for diff in diffs(module))
        return module.state_dict(), fit

    whole, whole_run = run(5)
    path = tmp_path / "5" / f"epoch={epoch}.ckpt"
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert any(key.endswith(".values") for key in saved) == (epoch == 1)
    assert any(key.endswith(".alpha") for key in saved) == (epoch == 0)
    resumed, resumed_run = run(6, path)
    assert list(resumed) == list(whole)
    assert [key for key in whole if not torch.equal(resumed[key], whole[key])] == []
    for ours, theirs in zip(whole_run.optimizers, resumed_run.optimizers, strict=True):
        pairs = zip(tensors(ours.state_dict()), tensors(theirs.state_dict()), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_two_epochs_and_a_third_are_three(tmp_path: Path) -> None:
    def run(epochs: int, seed: int, path: str | None = None) -> tuple[dict[str, Tensor], str]:
        L.seed_everything(seed, verbose=False)
        module = Toy()
        fit = trainer(tmp_path / f"{epochs}-{seed}", method=pruning(total_steps=24, prune_at=0.6), max_epochs=epochs)
        fit.fit(module, DataLoader(data().dataset, 8, shuffle=True), ckpt_path=path)
        return module.state_dict(), fit.checkpoint_callback.best_model_path  # type: ignore[union-attr]

    whole, _ = run(3, 5)
    _, path = run(2, 5)
    resumed, _ = run(3, 6, path)
    assert [key for key in whole if not torch.equal(resumed[key], whole[key])] == []


class Wide(Toy):
    """Some hundred thousand entries."""

    def build(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Linear(a, b) for a, b in ((8, 200), (200, 200), (200, 200), (200, 100))]
            self.body = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))
            self.head = nn.Linear(100, 3)


def apply_by_hand(base: dict[str, Tensor], saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is saved of each Linear, indices of its weight and its bias behind it, added to a bare model's state."""
    result = {name: tensor.clone() for name, tensor in base.items()}
    for key, indices in saved.items():
        if key.endswith(".adapters.default.indices"):
            path = key.removesuffix(".adapters.default.indices")
            names = [f"{path}.weight", f"{path}.bias"]
            flat = torch.cat([base[name].flatten() for name in names])
            flat[indices.long()] += saved[key.replace("indices", "values")]
            parts = flat.split([base[name].numel() for name in names])
            result |= {name: part.view(base[name].shape) for name, part in zip(names, parts, strict=True)}
    return result


@pytest.mark.parametrize("target", [0.05, 0.2])
def test_a_file_of_weights_is_as_large_as_what_is_kept_and_gives_the_model_bit_for_bit(
    target: float, tmp_path: Path
) -> None:
    bare, module = Wide(), Wide()
    run = trainer(tmp_path, peft=PEFT(DiffPruning(target=target)), max_epochs=1, enable_checkpointing=False)
    run.fit(module, data())
    path = tmp_path / "weights.ckpt"
    run.save_checkpoint(path, weights_only=True)
    saved = torch.load(path, weights_only=True)["state_dict"]
    entries = sum(tensor.numel() for tensor in bare.state_dict().values())
    assert entries == 102_603
    kept = round(target * entries)
    assert sum(tensor.numel() for key, tensor in saved.items() if key.endswith("values")) == kept
    assert {tensor.dtype for key, tensor in saved.items() if "adapters" in key} == {torch.int32, torch.float32}
    modules = 5
    assert kept >= 2_500 + 400 * modules
    assert 1 <= path.stat().st_size / (kept * (4 + 4)) < 1.2
    x = next(iter(data()))[0]
    applied = apply_by_hand(bare.state_dict(), saved)
    assert any(not torch.equal(applied[name], tensor) for name, tensor in bare.state_dict().items())
    bare.load_state_dict(applied)
    assert torch.equal(bare(x), module.eval()(x))
    loaded = load_from_checkpoint(Wide, path).eval()
    assert torch.equal(loaded(x), module(x))
    assert sum(parameter.numel() for parameter in trainable_parameters(loaded).values()) == kept
    (result,) = trainer(tmp_path, peft=PEFT(DiffPruning(target=target))).test(Wide(), data(), path, verbose=False)
    assert result == trainer(tmp_path, peft=PEFT(DiffPruning(target=target))).test(module, data(), verbose=False)[0]


@pytest.mark.parametrize("modules", [5, 20, 60])
def test_beside_the_kept_entries_a_file_has_a_fixed_part_and_one_for_each_module(modules: int, tmp_path: Path) -> None:
    class Deep(Toy):
        def build(self) -> None:
            layers = [nn.Linear(8, 120), *(nn.Linear(120, 120) for _ in range(modules - 2))]
            self.body = nn.Sequential(OrderedDict((f"layer{place:040}", layer) for place, layer in enumerate(layers)))
            self.head = nn.Linear(120, 3)

    path = tmp_path / "weights.ckpt"
    entries, enough = sum(parameter.numel() for parameter in Deep().parameters()), 2_500 + 400 * modules
    for kept in (50, enough):
        run = trainer(tmp_path, peft=PEFT(DiffPruning(target=kept / entries)), max_epochs=1, enable_checkpointing=False)
        run.fit(Deep(), data(8))
        run.save_checkpoint(path, weights_only=True)
        assert 0 < path.stat().st_size - kept * (4 + 4) <= 4_000 + 640 * modules
    assert path.stat().st_size <= 1.2 * enough * (4 + 4)


def test_a_loaded_diff_can_be_trained_on_and_keeps_its_places(tmp_path: Path) -> None:
    run = trainer(tmp_path, method=pruning(), max_epochs=1)
    run.fit(Toy(), data())
    path = run.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    before = {name: tensor.clone() for name, tensor in torch.load(path, weights_only=True)["state_dict"].items()}
    loaded = load_from_checkpoint(Toy, path)
    trainer(tmp_path, method=pruning(), max_epochs=1).fit(loaded, data())
    after = adapter_tensors(loaded, "default")
    indices = [key for key in after if key.endswith("indices")]
    assert all(torch.equal(before[key], after[key]) for key in indices)
    assert sum(map(len, (after[key] for key in indices))) == 22
    moved = [before[key] != after[key] for key in after if key.endswith("values")]
    assert sum(int(change.sum()) for change in moved) == 22


@pytest.mark.parametrize("held_by_an_optimizer", [False, True])
def test_of_a_wrong_file_nothing_is_loaded(held_by_an_optimizer: bool, tmp_path: Path) -> None:
    run = trainer(tmp_path, method=pruning(target=0.5), max_epochs=1)
    run.fit(Toy(), data())
    good = torch.load(run.checkpoint_callback.best_model_path, weights_only=True)  # type: ignore[union-attr]
    key = "body.4.adapters.default"
    several = good["state_dict"][f"{key}.indices"]
    assert len(several) > 2
    wrong = {
        f"checkpoint: {key}.indices is no ascending list of places among 272 entries": {
            f"{key}.indices": several + 271
        },
        f"checkpoint: 1 missing from the checkpoint: {key}.values": {f"{key}.values": None},
        f"checkpoint: {key}.values is (1,); it must have a value for each of the {len(several)} indices": {
            f"{key}.values": torch.ones(1)
        },
        f"checkpoint: 1 no tensor: {key}.values holds a str": {f"{key}.values": "text"},
    }
    for message, change in wrong.items():
        state = {name: tensor for name, tensor in {**good["state_dict"], **change}.items() if tensor is not None}
        torch.save({**good, "state_dict": state}, tmp_path / "wrong.ckpt")
        module = Toy()
        if held_by_an_optimizer:
            trainer(tmp_path, method=pruning(target=0.5), max_epochs=1).fit(module, data())
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        with pytest.raises(PEFTError) as error:
            trainer(tmp_path, method=pruning(target=0.5), max_epochs=1).fit(
                module, data(), ckpt_path=tmp_path / "wrong.ckpt"
            )
        assert error.value.faults[0].startswith(message)
        after = module.state_dict()
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        shapes = {diff.trained.shape for diff in diffs(module)}
        assert shapes == {torch.Size(shape) for shape in ((16, 8), (16,), (16, 16))}


def test_a_training_without_an_end_is_refused_and_a_short_one_is_warned_of(tmp_path: Path) -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from data().dataset

    stream = DataLoader(Endless(), 8)
    with pytest.raises(PEFTError) as error:
        trainer(tmp_path, method=pruning(), max_epochs=1).fit(Toy(), stream)
    assert error.value.faults == (
        "DiffPruning.total_steps: nothing says how many steps prune_at is a share of; give total_steps, or the Trainer "
        "max_epochs or max_steps",
    )
    module = Toy()
    trainer(tmp_path, method=pruning(total_steps=8), max_epochs=1).fit(module, stream)
    assert all(diff.is_pruned for diff in diffs(module))
    with pytest.warns(
        UserWarning, match="this training ends after step 8, and it is pruned after step 70 of total_steps"
    ):
        trainer(tmp_path, method=pruning(total_steps=100), max_epochs=1).fit(Toy(), data())


@pytest.mark.slow
def test_data_parallel_training_goes_on_after_pruning(tmp_path: Path) -> None:
    # in a process of its own, for the group of processes that it opens; gates get no gradient once it is pruned
    script = f"""
        from tests.callback.test_diff_pruning import Toy, data, diffs, pruning, trainer
        module = Toy()
        trainer({str(tmp_path)!r}, method=pruning(), max_epochs=2, strategy="ddp", devices=1).fit(module, data())
        print(sum(int(diff.mask.sum()) for diff in diffs(module)))
    """
    assert run_ranks(tmp_path, ["-c", textwrap.dedent(script)], count=1).split()[-1] == "22"
