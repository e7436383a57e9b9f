"""What two ranks log, one strategy after the other; run as `python -m tests.tracking.ranks FOLDER`.

Each leaves `FOLDER/<rank>.pt`: by strategy, the rows of its logger and the norms that `Oracle` saw there.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from lightning_peft import AdapterMonitor, CostMeter
from tests.callback.toys import Toy, data, lora, trainer
from tests.processes import accelerator
from tests.tracking.test_monitor import Memory, Oracle

RANK = int(os.environ.get("LOCAL_RANK", 0))


class Plain(Toy):
    """Without what makes a rank's batches differ from one batch of both."""

    def build(self) -> None:
        super().build()
        self.body[1], self.body[3] = torch.nn.Identity(), torch.nn.Identity()


class Sharded(Plain):
    """Trained as a whole, in parts."""

    def configure_model(self) -> None:
        if self.trainer.world_size > 1 and not hasattr(self, "sharded"):
            for part in (self.body[0], self.body[4], self.head):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])
            self.sharded = True


def run(folder: Path, module: L.LightningModule, strategy: Any, devices: int = 2) -> dict[str, Any]:
    """Train on eight rows of each rank's, which are sixteen together."""
    oracle, memory, meter = Oracle(), Memory(), CostMeter(overhead=False)
    L.seed_everything(1, verbose=False)
    fitting = trainer(
        folder, AdapterMonitor(), oracle, meter, strategy=strategy, devices=devices, logger=memory, log_every_n_steps=2,
        max_epochs=1, method=lora(dropout=0.0, target_modules=["body.0", "body.4"]), enable_checkpointing=False,
        accelerator=accelerator(),
    )  # fmt: skip
    if isinstance(module, Sharded):
        del fitting.callbacks[0]  # type: ignore[attr-defined]
    rows = data().dataset
    sampler = DistributedSampler(rows, devices, RANK, shuffle=False)
    fitting.fit(module, DataLoader(rows, 16 // devices, sampler=sampler))
    logged = [(step, row) for step, row in memory.rows if any(name.startswith("adapter/") for name in row)]
    gradients = {} if isinstance(module, Sharded) else oracle.gradient
    return {"rows": logged, "gradients": gradients, "trainable": meter.cost(fitting, module).trainable}


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found = {strategy: run(folder, Plain(), strategy) for strategy in ("peft_ddp", "peft_fsdp")}
    found["full"] = run(folder, Sharded(), ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))
    torch.save(found, folder / f"{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
