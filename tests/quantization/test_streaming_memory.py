"""What a process holds while it streams a model of 1.2 GB, seen from outside of it."""

from __future__ import annotations

import json
import os
import select
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_peft.quantization.shards import INDEX

STATUS = Path("/proc/self/status")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not STATUS.is_file(), reason="the system doesn't tell a process's anonymous memory"),
]
MB = 2**20
LLAMA = {
    "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": True,
}  # fmt: skip
CHILD = """
import json, sys
import torch, transformers
from lightning_peft.quantization import load_base, quantize
import lightning_peft.quantization.layers, lightning_peft.quantization.streaming
quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)), "nf4-dq")
sizes, folder, quantization = json.loads(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
print("ready", flush=True)
input()
load_base(model, folder, quantization=quantization)
tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
print(sum(tensors.values()), flush=True)
input()
"""


def llama_shapes() -> dict[str, tuple[int, ...]]:
    import transformers

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three shards of random bf16 weights, the same million over and over."""
    place = tmp_path_factory.mktemp("llama")
    noise = (0.02 * torch.randn(2**20)).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    shapes = llama_shapes()
    files = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(shapes)}
    for file in set(files.values()):
        header, start = {}, 0
        for name, shape in shapes.items():
            if files[name] == file:
                size = 2 * torch.Size(shape).numel()
                header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, start + size]}
                start += size
        packed = json.dumps(header).encode()
        with (place / file).open("wb") as out:
            out.write(struct.pack("<Q", len(packed)) + packed)
            while start:
                start -= out.write(noise[: min(start, len(noise))])
    (place / INDEX).write_text(json.dumps({"weight_map": files}))
    yield place
    shutil.rmtree(place)


def anonymous(pid: int) -> int:
    """Bytes that the process has beside the files that it maps."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.parametrize("quantization", [None, "nf4-dq"])
def test_the_peak_is_what_stays_and_one_tensor(quantization: str | None, folder: Path) -> None:
    arguments = [json.dumps(LLAMA), str(folder), json.dumps(quantization)]
    words, environment = [sys.executable, "-c", CHILD, *arguments], {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdin is not None
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == "ready\n"
        before = anonymous(child.pid)
        # it waits, so that nothing is read before the first look at it
        child.stdin.write("\n")
        child.stdin.flush()
        peak, ready = before, False
        while not ready:
            ready = bool(select.select([child.stdout], [], [], 0.002)[0])
            peak = max(peak, anonymous(child.pid))
        resident, after = int(child.stdout.readline()), anonymous(child.pid)
        child.stdin.write("\n")
    stored = sum(2 * torch.Size(shape).numel() for shape in llama_shapes().values())
    largest = max(2 * torch.Size(shape).numel() for shape in llama_shapes().values())
    print(  # with -s: what the documentation says
        f"{quantization}: file {stored / MB:.0f} MB, resident {resident / MB:.0f}, largest {largest / MB:.0f}, "
        f"peak {(peak - before) / MB:.0f}, after {(after - before) / MB:.0f}"
    )
    assert 1.1e9 < stored < 1.3e9
    assert peak - before >= resident * 0.95  # the measure sees the weights
    assert peak - before <= resident + 1.25 * largest + 300 * MB
