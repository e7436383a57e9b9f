"""What CostMeter times under one strategy; run as `python -m tests.tracking.cost_ranks FOLDER STRATEGY`.

Each rank leaves `FOLDER/<rank>.pt`: the overheads, what was recorded, and how often the module ran in eval mode.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor

from lightning_peft import CostMeter
from tests.callback.toys import Toy, data, lora, trainer

RANK, WORLD = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])


class Uneven(Toy):
    """In eval mode, one of two ranks is slow when the other one is not."""

    inferences = 0

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        if not self.training:
            # by the second call's time a rank tells how many shall follow
            is_slow = WORLD > 1 and (self.inferences + RANK) % 2
            time.sleep(0.03 if is_slow else 0.005)
            self.inferences += 1
        return output


def main(folder: Path, strategy: str) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    module, meter = Uneven(), CostMeter()
    fitting = trainer(
        folder, meter, method=lora(dropout=0.0, target_modules=["body.0", "body.4"]), strategy=strategy, devices=WORLD,
        max_epochs=1, limit_train_batches=2, enable_checkpointing=False,
    )  # fmt: skip
    fitting.fit(module, data())
    cost = meter.cost(fitting, module)
    recorded = [(type(called).__name__, args[0].shape) for called, args, _ in meter._run.recording.calls]
    found = {
        "unmerged": cost.overhead_unmerged,
        "merged": cost.overhead_merged,
        "recorded": recorded,
        "inferences": module.inferences,
    }
    torch.save(found, folder / f"{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
