"""Time and memory of QLoRA on an 8B-shaped Llama, beside transformers + HF peft + bitsandbytes, on one GPU.

    python examples/qlora_benchmark.py                # needs a GPU of 40 GB, 17 GB of disk, and [peft,quantization]
    python examples/qlora_benchmark.py --layers 4     # a smaller shape, for a first look

The weights are random and written once, as shards, to --model. Both sides load them in nf4 with double quantization,
put LoRA (r 16) on all linear layers, and train with activation checkpointing in bf16 on the same rows. After they have
loaded one after the other, their steps are taken in turn in one process; the median of each side's is reported.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from lightning_peft import PEFT, LoRA
from lightning_peft.tasks import CausalLM

RANK, ALPHA, RATE = 16, 32, 2e-4
SHARD = 4 * 2**30
"""Bytes in a file of weights, about."""


class Rows(Dataset[dict[str, torch.Tensor]]):
    """The same random tokens for both sides."""

    def __init__(self, count: int, length: int, vocabulary: int) -> None:
        self.ids = torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def write_model(folder: Path, layers: int) -> None:
    """A Llama of the 8B shape with random weights in bf16, shard by shard."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    where: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for number, (name, shape) in enumerate(shapes.items(), 1):
        new = torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02
        shard[name] = (torch.ones_like(new) if name.endswith("norm.weight") else new).cpu()
        if number == len(shapes) or sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            file = f"model-{len(set(where.values())):05d}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            where |= dict.fromkeys(shard, file)
            shard = {}
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)  # last: a folder that has it is whole


class Ours:
    """`Trainer.fit` with the callback; a step is what Lightning does between the start and the end of a batch."""

    name = "lightning_peft"

    def __init__(self, model: str, loader: DataLoader[Any]) -> None:
        method = LoRA(r=RANK, alpha=ALPHA, target_modules="all-linear")
        self.peft = PEFT(method, quantization="nf4-dq", base_dtype="bfloat16", gradient_checkpointing=True)
        self.module = CausalLM(model, learning_rate=RATE)
        self.loader = loader

    def fit(self, steps: int, *callbacks: L.Callback) -> None:
        """Train; the model is loaded when it begins."""
        trainer = L.Trainer(
            accelerator="gpu",
            devices=1,
            max_steps=steps,
            precision="bf16-mixed",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[self.peft, *callbacks],
        )
        trainer.fit(self.module, self.loader)


class Theirs:
    """A plain loop around what HF's QLoRA recipe makes; no Trainer of its own slows it."""

    name = "transformers + peft"

    def __init__(self, model: str, loader: DataLoader[Any]) -> None:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        base = AutoModelForCausalLM.from_pretrained(
            model, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": 0}
        )
        base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(base, config).train()
        self.model.config.use_cache = False
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=RATE)
        self.batches = iter(loader)

    def step(self) -> None:
        """Forward, backward and AdamW."""
        batch = {name: value.cuda(non_blocking=True) for name, value in next(self.batches).items()}
        with torch.autocast("cuda", torch.bfloat16):
            loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def states(self) -> int:
        """Bytes of AdamW's moments."""
        held = self.optimizer.state.values()
        return sum(value.nbytes for state in held for value in state.values() if isinstance(value, torch.Tensor))


class Measure(L.Callback):
    """Times the steps of the fit that it is in, and after each of them lets the other side take one.

    Args:
        warm_up: steps that don't count.
        other: takes a step of the other side.
        others: the bytes that the other side holds between its steps.
    """

    def __init__(self, warm_up: int, other: Callable[[], None], others: Callable[[], int]) -> None:
        self.warm_up, self.other, self.others = warm_up, other, others
        self.times: dict[str, list[float]] = {"ours": [], "theirs": []}
        self.peaks: dict[str, int] = {}

    def on_train_batch_start(self, *_: Any) -> None:
        """The clock starts."""
        self.begin()

    def on_train_batch_end(self, *_: Any) -> None:
        """It stops; and the other side's step."""
        self.end("ours")
        self.begin()
        self.other()
        self.end("theirs")

    def begin(self) -> None:
        """Wait for the GPU, and start."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.allocated, self.start = torch.cuda.memory_allocated(), time.perf_counter()

    def end(self, side: str) -> None:
        """Note the time of the step, and its peak without what the other side holds."""
        torch.cuda.synchronize()
        self.times[side].append(time.perf_counter() - self.start)
        theirs = self.others()
        self.peaks[side] = torch.cuda.max_memory_allocated() - (theirs if side == "ours" else self.allocated - theirs)

    def median(self, side: str) -> float:
        """Seconds, without the first steps."""
        return statistics.median(self.times[side][self.warm_up :])


class Loading(L.Callback):
    """Notes when the model has been loaded, and what it takes."""

    def on_fit_start(self, *_: Any) -> None:
        """Everything stands on the device now."""
        gc.collect()
        torch.cuda.synchronize()
        self.end, self.peak = time.perf_counter(), torch.cuda.max_memory_allocated()
        self.resident = torch.cuda.memory_allocated()


def main() -> None:
    """Write the weights if they are not there, load both sides, and take steps in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/qlora_benchmark/model"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/qlora_benchmark/result.json"))
    given = parser.parse_args()

    if not (given.model / "config.json").exists():
        write_model(given.model, given.layers)
    vocabulary = json.loads((given.model / "config.json").read_text())["vocab_size"]
    rows = Rows(given.batch * (given.steps + 1), given.length, vocabulary)
    loader: DataLoader[Any] = DataLoader(rows, given.batch)
    for file in given.model.glob("*.safetensors"):  # so that neither side reads from a cold disk
        with file.open("rb") as opened:
            while opened.read(2**26):
                pass

    torch.zeros(1, device="cuda")
    start = time.perf_counter()
    theirs = Theirs(str(given.model), loader)
    torch.cuda.synchronize()
    loaded = {"theirs": (time.perf_counter() - start, torch.cuda.max_memory_allocated())}
    resident = {"theirs": torch.cuda.memory_allocated()}

    measure = Measure(given.warm_up, theirs.step, lambda: resident["theirs"] + theirs.states())
    ours, loading = Ours(str(given.model), loader), Loading()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    ours.fit(given.steps, loading, measure)
    loaded["ours"] = (loading.end - start, loading.peak - resident["theirs"])
    resident["ours"] = loading.resident - resident["theirs"]

    result = {
        side: {
            "load_s": loaded[side][0],
            "load_peak_gb": loaded[side][1] / 1e9,
            "resident_gb": resident[side] / 1e9,
            "step_s": measure.median(side),
            "step_peak_gb": measure.peaks[side] / 1e9,
        }
        for side in ("ours", "theirs")
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name()
    given.out.write_text(json.dumps({"gpu": gpu, "torch": torch.__version__, **result}, indent=1))
    table = Table(title=f"QLoRA, {given.batch} x {given.length} tokens, {gpu}", title_justify="left")
    for header in ("", "load, s", "peak of it, GB", "resident, GB", "step, s", "peak of it, GB"):
        table.add_column(header, justify="right" if header else "left")
    for side, name in (("theirs", Theirs.name), ("ours", Ours.name)):
        table.add_row(name, *(f"{value:.2f}" for value in result[side].values()))
    Console().print(table)
    print(f"step, ours / theirs: {result['ours']['step_s'] / result['theirs']['step_s']:.3f}")


if __name__ == "__main__":
    main()
