"""What four ranks do under `peft_fsdp`: two and two compute a batch together (tensor parallelism), or hold a copy.

Run as `python -m tests.strategies.split FOLDER`; see ranks.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler

from lightning_peft import METHODS, PEFT, LoRA, PEFTFSDPStrategy
from lightning_peft.tracking import PredictionFile
from tests.strategies.language import ROWS, Language, run, text, trained
from tests.strategies.ranks import ACCELERATOR, RANK, WORLD, main, refused
from tests.strategies.sharded import Started, base_bytes, everything, hybrid

SPLIT = 2
METHODS_TRIED = ("LoRA", "DoRA", "IA3", "BitFit", "ParallelAdapter", "PromptTuning")
STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


class Split(Language):
    """Splits its blocks' layers by transformers' plan for them."""

    is_split = False

    def configure_model(self) -> None:
        if not self.is_split:
            self.is_split = True
            self.split(self.device_mesh["tensor_parallel"])

    def split(self, mesh: Any) -> None:
        plan = {name: STYLES[style]() for name, style in self.model.config.base_model_tp_plan.items()}
        parallelize_module(self.model.model, mesh, plan)


def rows(count: int = ROWS) -> DataLoader[Any]:
    """The batches of `text`, of which each tensor-parallel group has its share."""
    dataset, groups = text(rows=count).dataset, WORLD // SPLIT
    return DataLoader(dataset, 8 // groups, sampler=DistributedSampler(dataset, groups, RANK // SPLIT, shuffle=False))


def made(name: str) -> Any:
    return METHODS[name](**({"r": 4} if name in ("LoRA", "DoRA") else {}))


def strategy(**options: Any) -> PEFTFSDPStrategy:
    return PEFTFSDPStrategy(tensor_parallel_size=SPLIT, **options)


def methods(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in METHODS_TRIED:
        module = Split()
        run(folder, strategy(), peft=PEFT(made(name))).fit(module, rows(16))
        found[name] = trained(module)
        found[f"{name} losses"] = module.losses
        found[f"{name} bytes"] = base_bytes(module)
    return found


def stages(folder: Path) -> dict[str, Any]:
    """A run that goes on from one device, is checkpointed, tested and resumed."""
    found: dict[str, Any] = {}
    peft, started = {"peft": PEFT(LoRA(r=4))}, Started()
    module = Split(lr=1e-3)
    fitting = run(
        folder, strategy(), started, PredictionFile(), max_epochs=2, enable_checkpointing=True, **peft
    )  # fmt: skip
    fitting.fit(module, rows(), rows(), ckpt_path=folder / "single.ckpt")
    path = fitting.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    found |= {"started": started.tensors, "saved": everything(module, fitting), "losses": module.losses, "path": path}
    (found["tested"],) = fitting.test(module, rows(), ckpt_path=path, verbose=False)
    fitting.predict(module, DataLoader(text(rows=5).dataset, 2), return_predictions=False)
    module, started = Split(lr=1e-3), Started()
    again = run(folder, strategy(), started, max_epochs=3, peft=PEFT(LoRA(r=4)))
    again.fit(module, rows(), ckpt_path=path)
    return {**found, "resumed": started.tensors, "resumed losses": module.losses}


def dropout(folder: Path) -> dict[str, Any]:
    """Each rank draws other numbers, until those of a group are given the same ones."""
    module = Split(lr=1e-3)
    torch.manual_seed(RANK)
    run(folder, strategy(), peft=PEFT(LoRA(r=4, dropout=0.5))).fit(module, rows(16))
    return {"state": trained(module), "losses": module.losses, "numbers": torch.rand(3)}


class Heads(Split):
    """With a layer that is not split, for the heads of which each rank has some."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.model.model.layers:
            layer.self_attn.v_proj = nn.Sequential(layer.self_attn.v_proj, PerHead())

    def split(self, mesh: Any) -> None:
        plan = {f"layers.*.self_attn.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj.0")}
        parallelize_module(self.model.model, mesh, {**plan, "layers.*.self_attn.o_proj": RowwiseParallel()})


class PerHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.mix = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.unflatten(-1, (-1, 16))).flatten(-2)


def faults(folder: Path) -> dict[str, Any]:
    class Own(Split):
        """Split over a mesh of its own."""

        def split(self, mesh: Any) -> None:
            super().split(init_device_mesh(ACCELERATOR, (2, 2), mesh_dim_names=("data", "tensor"))["tensor"])

    class Whole(Split):
        def split(self, mesh: Any) -> None:
            pass

    def told(module: L.LightningModule, method: str = "LoRA", **options: Any) -> str:
        peft = PEFT(made(method), **options)
        return refused(lambda: run(folder, strategy(), peft=peft).fit(module, rows(16)))

    found = {
        "quantized": told(Split(), quantization="nf4"),
        "own": told(Own()),
        "whole": told(Whole()),
        "saved": told(Split(), modules_to_save=["o_proj"]),
        "prefix": told(Split(), "PrefixTuning"),
        "unipelt": told(Split(), "UniPELT"),
        "heads": refused(
            lambda: run(folder, strategy(), peft=PEFT(LoRA(r=4, target_modules=["mix"]))).fit(Heads(), rows(16))
        ),
        # the first rank of a group gives the others their parts
        "other base": told(Split(seed=RANK // SPLIT)),
        "size": refused(
            lambda: run(folder, PEFTFSDPStrategy(tensor_parallel_size=3), peft=PEFT(LoRA())).fit(Split(), rows(16))
        ),
        "stock": refused(
            lambda: run(folder, PEFTFSDPStrategy(), peft=PEFT(LoRA())).fit(Split(), rows(16))
        ),
    }  # fmt: skip
    module = Split(seed=RANK // SPLIT)
    run(folder, strategy(sync_base=True), peft=PEFT(LoRA(r=4))).fit(module, rows(16))
    return {**found, "synced": module.losses}


THINGS = (hybrid, methods, stages, dropout, faults)

if __name__ == "__main__":
    main(Path(sys.argv[1]), THINGS)
