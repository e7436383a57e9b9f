"""The plan's peaks beside measured ones, on a CUDA GPU: `python tests/planning/on_gpu.py`, two minutes on an H100.

Each case trains a randomly initialized model for three steps by the Trainer and the callback, and compares
`torch.cuda.max_memory_allocated` of the last two with `lightning_peft.planning`. A row is out of order where the ratio
is off by more than a tenth; the exit code tells.
"""

from __future__ import annotations

import argparse
import gc
import io
import logging
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lightning_peft import PEFT, LoRA
from lightning_peft.callback.base import Base
from lightning_peft.methods import METHODS
from lightning_peft.methods.base import Method
from lightning_peft.planning.building import Setting
from lightning_peft.planning.choosing import base_of
from lightning_peft.planning.estimates import Planner
from lightning_peft.tasks import CausalLM, ImageClassification, SequenceClassification

TOLERANCE = 0.1
GB = 1e9


@dataclass(frozen=True)
class Case:
    """One run."""

    model: str
    method: Callable[[], Method] | None
    base: str = "none"
    checkpointing: bool = False
    rows: int = 2
    length: int = 1024
    precision: str = "bf16-mixed"
    save: tuple[str, ...] = ()
    offload: bool = False

    @property
    def label(self) -> str:
        """Its name in the table."""
        name = "full" if self.method is None else type(self.method()).__name__
        more = " +checkpointing" if self.checkpointing else ""
        more += " +offload" if self.offload else ""
        return f"{self.model} {name}{more} over {self.base}, {self.rows} x {self.length}, {self.precision}"


def lora() -> Method:
    """On every linear layer."""
    return LoRA(r=16, target_modules="all-linear")


def llama(hidden: int, inner: int, layers: int, heads: int, keys: int, vocabulary: int) -> Any:
    """A decoder with random weights, in bf16 as they come from a hub."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def bert() -> Any:
    """BERT-base."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig())


def vit() -> Any:
    """ViT-base."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=10))


MODELS: dict[str, Callable[[], L.LightningModule]] = {
    "llama 0.4B": lambda: CausalLM(llama(1024, 4096, 16, 16, 4, 64000)),
    "llama 1.5B": lambda: CausalLM(llama(1536, 8960, 28, 12, 2, 151936)),
    "bert": lambda: SequenceClassification(bert(), num_labels=2),
    "vit": lambda: ImageClassification(vit(), num_labels=10),
}
CASES = [
    Case("llama 1.5B", lora, "bf16", True, 1, 2048),
    Case("llama 1.5B", lora, "nf4-dq", True, 1, 2048),
    Case("llama 1.5B", lora, "nf4-dq", False, 2, 1024),
    Case("llama 1.5B", METHODS["IA3"], "bf16", False, 2, 1024),
    Case("llama 0.4B", lora, "bf16", False, 4, 1024),
    Case("llama 0.4B", lora, "fp32", False, 2, 512, "32-true"),
    Case("llama 0.4B", lora, "fp32", False, 4, 1024),
    Case("llama 0.4B", lora, "int8", False, 4, 1024),
    Case("llama 0.4B", lora, "bf16", True, 4, 1024, offload=True),
    Case("llama 0.4B", METHODS["DoRA"], "bf16", False, 4, 1024),
    Case("llama 0.4B", None, "none", False, 4, 512, "bf16-true"),
    Case("llama 0.4B", None, "none", False, 4, 1024),
    Case("bert", lora, "none", False, 32, 256, save=("classifier",)),
    Case("bert", lora, "none", False, 32, 256, "32-true", save=("classifier",)),
    Case("bert", None, "none", False, 32, 256),
    Case("vit", lora, "none", False, 64, 224, save=("classifier",)),
]


class Peak(L.Callback):
    """The most that is allocated in a step after the first."""

    bytes = 0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Begin anew, once the optimizer has its states."""
        if trainer.global_step == 1:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def on_train_end(self, *_: Any) -> None:
        """Read it."""
        torch.cuda.synchronize()
        self.bytes = torch.cuda.max_memory_allocated()


def measured(case: Case, batch: dict[str, torch.Tensor]) -> int:
    """The peak of a run, without what was there before it."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    base, peak = base_of(case.base, Base()), Peak()
    callbacks: list[L.Callback] = [peak]
    if case.method is not None:
        callbacks.insert(
            0,
            PEFT(
                case.method(),
                modules_to_save=list(case.save),
                quantization=base.quantization,
                base_dtype=base.dtype,
                gradient_checkpointing=case.checkpointing,
                offload_activations=case.offload,
            ),
        )
    batch = {name: torch.zeros(each.shape) if each.is_meta else each for name, each in batch.items()}
    with torch.device("cuda"):
        module = MODELS[case.model]()
    trainer = L.Trainer(
        accelerator="gpu",
        devices=1,
        max_steps=3,
        precision=case.precision,  # type: ignore[arg-type]
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with redirect_stdout(io.StringIO()):
        trainer.fit(module, torch.utils.data.DataLoader([batch] * 3, batch_size=None))  # type: ignore[arg-type]
    return peak.bytes - before


def main() -> int:
    """Run the cases and print the table.

    Returns:
        0 where all are within the tolerance; 1 where not; 2 without a GPU.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the cases that have this in their label")
    parser.add_argument("--seconds", type=float, default=150, help="start no case after so many")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("on_gpu.py compares with a CUDA GPU, and torch finds none; tests/planning/test_peaks.py does it on a CPU")
        return 2
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # its workspace is kept, and belongs to no run
    torch.mm(*torch.ones(2, 64, 64, device="cuda", dtype=torch.bfloat16))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    rows, start, worst = [], time.monotonic(), 0.0
    for case in CASES:
        if given.only not in case.label or time.monotonic() - start > given.seconds:
            continue
        began = time.monotonic()
        try:
            line, ratio = _row(case, began)
        except Exception as error:  # the other cases are still worth to know
            line, ratio = f"{case.label}: {type(error).__name__}: {str(error)[:300]}", float("inf")
        worst = max(worst, abs(ratio - 1))
        rows.append(line)
        print(line, flush=True)
    print(f"{len(rows)} of {len(CASES)} cases, the worst is off by {worst:.1%}; {time.monotonic() - start:.0f} s")
    return 0 if worst <= TOLERANCE else 1


def _row(case: Case, began: float) -> tuple[str, float]:
    with torch.device("meta"):
        module = MODELS[case.model]()
    planner = Planner(module, precision=case.precision, rows=case.rows, length=case.length)
    method = None if case.method is None else case.method()
    setting = Setting(method, base_of(case.base, Base()), case.save, case.checkpointing, case.offload)
    plan = planner.estimate(setting)
    if plan.fault:
        raise RuntimeError(plan.fault)
    planned = time.monotonic() - began
    found = measured(case, planner.batch)
    parts = ", ".join(
        f"{name} {getattr(plan, name) / GB:.3f}" for name in ("weights", "gradients", "optimizer", "activations")
    )
    ratio = plan.peak / found
    seconds = f"{planned:.1f} s + {time.monotonic() - began - planned:.1f} s"
    line = f"{ratio:.3f}  plan {plan.peak / GB:.3f} GB, measured {found / GB:.3f} GB ({parts}; {seconds})  {case.label}"
    return line, ratio


if __name__ == "__main__":
    sys.exit(main())
