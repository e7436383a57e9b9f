"""QLoRA: a small decoder, in 4 bits, learns to answer an instruction.

    python examples/instruction_tuning.py    # 100 seconds of CPU time, no network; extra `examples`

small_decoder.py, beside this file, pretrains the decoder on docstrings and writes the instructions: from which of eight
libraries is a docstring? configs/qlora_offline.yaml is the same in YAML, configs/qlora_instruct.yaml the recipe for a
real model. In the end it prints how often the library is written out right, beside always naming the most frequent one.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import small_decoder

from lightning_peft import PEFT, LoRA
from lightning_peft.data import InstructionData
from lightning_peft.tasks import CausalLM
from lightning_peft.tracking import count

SHORT = ["--libraries", "sympy", "torch", "--rows-per-library", "160", "--steps", "40"]


def main(argv: list[str] | None = None) -> None:
    """Make the decoder, tune it, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="two libraries, and fewer steps")
    given = parser.parse_args(argv)
    folder = Path("runs/instruction_tuning")
    small_decoder.main(["--out", str(folder), *(SHORT if given.short else [])])

    L.seed_everything(0)
    rows, size = str(folder / "rows"), 8 if given.short else 16
    data = InstructionData(rows, template="{prompt}", max_length=128, drop_long=True, batch_size=size)
    written: dict[str, Any] = {"generation": {"max_new_tokens": 8}, "generation_metrics": ["exact_match"]}
    task = CausalLM(str(folder / "model"), learning_rate=3e-3, **written)
    peft = PEFT(LoRA(r=16, alpha=32, target_modules="all-linear"), quantization="nf4-dq")
    trainer = L.Trainer(max_epochs=3, callbacks=[peft], default_root_dir=folder, enable_progress_bar=False)
    trainer.fit(task, data)

    lines = (folder / "rows" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    answers = Counter(json.loads(line)["response"] for line in lines)
    baseline = answers.most_common(1)[0][1] / answers.total()
    result = trainer.callback_metrics["val_exact_match"].item()
    parts = count(task)
    print(f"baseline {baseline:.3f}, result {result:.3f}, ", end="")
    print(f"trained {parts.trainable:,} ({parts.trainable / parts.frozen:.1%} of {parts.frozen:,})")
    if result <= baseline:
        raise SystemExit(f"the exact match {result:.3f} is not above the baseline's {baseline:.3f}")


if __name__ == "__main__":
    main()
