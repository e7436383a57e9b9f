"""Adapters whole on every rank with one all-reduce, or sharded with their block: what a step sends, and its time.

OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m tests.strategies.whole_or_sharded
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import LoRA, inject, trainable_parameters
from lightning_peft.strategies.gradients import average_gradients, make_equal
from lightning_peft.strategies.sharding import Sharding, begin_together
from lightning_peft.strategies.units import find_units
from tests.strategies.counting import Collectives

VOCABULARY, TOKENS, STEPS = 2000, 32, 12


def adapted(r: int, whole: bool, mesh: DeviceMesh) -> nn.Module:
    """A Llama of eight blocks, whose base is sharded."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=8, tie_word_embeddings=False, **sizes)
    model = inject(nn.ModuleDict({"model": LlamaForCausalLM(config)}), LoRA(r=r)).train()
    for unit in find_units(model):
        if whole:
            Sharding(mesh).shard(unit)
        else:
            fully_shard(unit.module, mesh=mesh, reshard_after_forward=True)
    if whole:
        make_equal(trainable_parameters(model).values())
        begin_together(model)
    return model


def measure(r: int, whole: bool, mesh: DeviceMesh) -> str:
    """What a step sends, and the median of its times."""
    model = adapted(r, whole, mesh)
    parameters = list(trainable_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters)
    ids = torch.randint(VOCABULARY, (1, TOKENS))

    def step() -> None:
        model["model"](input_ids=ids, labels=ids).loss.backward()
        if whole:
            average_gradients(parameters)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    with Collectives() as sent:
        step()
    times = []
    for _ in range(STEPS):
        dist.barrier()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return f"{sent.total / 1e6:.1f} MB in {dict(sent.calls)}, {1e3 * statistics.median(times):.0f} ms"


def main() -> None:
    """Print a row for each rank of the adapters and each way, twice, in turn."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for r, whole in [(r, whole) for r in (16, 64) for whole in (True, False) * 2]:
        row = measure(r, whole, mesh)
        if dist.get_rank() == 0:
            print(f"r={r} {'whole' if whole else 'sharded'}: {row}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
