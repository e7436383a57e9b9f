"""The strategies on one GPU with nccl, and meanwhile the tests of two and four processes on its CPU.

Run as `python -m tests.strategies.on_gpu`; a line for each check, and exit code 1 where one fails.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from lightning_peft import PEFT, LoRA, PEFTDDPStrategy, PEFTFSDPStrategy, load_from_checkpoint
from lightning_peft.methods._sharded import is_sharded
from lightning_peft.state import read_checkpoint
from tests.callback.toys import trainer
from tests.processes import ROOT
from tests.strategies.language import Language, text, trained
from tests.strategies.sharded import WIDE, Chunked

TESTS = ("test_folders.py", "test_split.py", "test_fsdp.py")
LIMIT = 170
"""Seconds for the tests on the CPU."""
Options = dict[str, Any]


def run(folder: Path, strategy: Any, peft: Options, **options: Any) -> L.Trainer:
    defaults = {"devices": 1, "accelerator": "cuda", "max_epochs": 1, "enable_checkpointing": False}
    made = PEFT(LoRA(r=4), **{"modules_to_save": ["lm_head"], **peft})
    return trainer(folder, peft=made, strategy=strategy, **{**defaults, **options})


def module(kind: type[Language] = Language) -> Language:
    return kind(lr=1e-3, **WIDE)


def largest(ours: list[float], theirs: list[float]) -> float:
    assert len(ours) == len(theirs) > 0
    return max(abs(one - other) for one, other in zip(ours, theirs, strict=True))


def as_one_device(make: Callable[[], Any], within: float, peft: Options, **options: Any) -> Callable[[Path], str]:
    """Fit, test and resume as with no strategy at all."""

    def check(folder: Path) -> str:
        whole = module()
        run(folder, "auto", peft, max_epochs=2, **options).fit(whole, text())
        first = module()
        fitting = run(folder, make(), peft, **options)
        fitting.fit(first, text(), text())
        assert dist.get_backend() == "nccl", dist.get_backend()
        assert not isinstance(fitting.strategy, PEFTFSDPStrategy) or any(
            isinstance(part, FSDPModule) for part in first.modules()
        )
        path = folder / "first.ckpt"
        fitting.save_checkpoint(path)
        (tested,) = fitting.test(first, text(), ckpt_path=path, verbose=False)
        second = module()
        torch.cuda.reset_peak_memory_stats()
        run(folder, make(), peft, max_epochs=2, **options).fit(second, text(), ckpt_path=path)
        peak = torch.cuda.max_memory_allocated() / 1e6
        assert second.device.type == "cuda"
        shards = {parameter.to_local().device.type for parameter in second.parameters() if is_sharded(parameter)}
        offloads = getattr(second.trainer.strategy, "cpu_offload", False)
        assert shards <= {"cpu" if offloads else "cuda"}, shards
        difference = largest(first.losses + second.losses, whole.losses)
        assert difference <= within, f"losses differ by {difference:.1e}"
        alone = module()
        (other,) = run(folder, "auto", peft, **options).test(alone, text(), ckpt_path=path, verbose=False)
        assert abs(tested["val_loss"] - other["val_loss"]) <= within
        assert not [key for key in read_checkpoint(path)["state_dict"] if "adapters" not in key and "peft" not in key]
        return f"losses {whole.losses[0]:.4f} … {whole.losses[-1]:.4f}, differ by {difference:.1e}; peak {peak:.0f} MB"

    return check


def chunked(folder: Path) -> str:
    one, other = module(), module(Chunked)
    run(folder, "auto", {}).fit(one, text())
    run(folder, PEFTFSDPStrategy(), {}).fit(other, text())
    assert other.refused is None, other.refused  # type: ignore[attr-defined]
    difference = largest(other.losses, one.losses)
    assert difference <= 1e-4, difference
    return f"losses differ by {difference:.1e}"


def shares(folder: Path) -> str:
    first, path = module(), folder / "shares.ckpt"
    fitting = run(folder, PEFTFSDPStrategy(save_distributed_checkpoint=True), {})
    fitting.fit(first, text())
    fitting.save_checkpoint(path)
    loaded = trained(load_from_checkpoint(Language, path, map_location="cuda"))
    for name, tensor in trained(first).items():
        assert torch.equal(tensor, loaded[name]), name
    return ", ".join(sorted(file.name for file in path.iterdir()))


NF4 = {"quantization": "nf4-dq"}
CHECKS: dict[str, Callable[[Path], str]] = {
    "peft_ddp": as_one_device(PEFTDDPStrategy, 1e-4, {}),
    "peft_ddp nf4-dq bf16-mixed": as_one_device(PEFTDDPStrategy, 2e-2, NF4, precision="bf16-mixed"),
    "peft_fsdp": as_one_device(PEFTFSDPStrategy, 1e-4, {}),
    "peft_fsdp bf16-mixed": as_one_device(PEFTFSDPStrategy, 2e-2, {}, precision="bf16-mixed"),
    "peft_fsdp bfloat16 base": as_one_device(
        PEFTFSDPStrategy, 2e-2, {"base_dtype": "bfloat16"}, precision="bf16-mixed"
    ),
    "peft_fsdp nf4-dq": as_one_device(PEFTFSDPStrategy, 1e-3, NF4),
    "peft_fsdp nf4-dq bf16-mixed": as_one_device(PEFTFSDPStrategy, 2e-2, NF4, precision="bf16-mixed"),
    "peft_fsdp cpu_offload": as_one_device(lambda: PEFTFSDPStrategy(cpu_offload=True), 1e-4, {}),
    "peft_fsdp cpu_offload nf4-dq bf16-mixed": as_one_device(
        lambda: PEFTFSDPStrategy(cpu_offload=True), 2e-2, NF4, precision="bf16-mixed"
    ),
    "peft_fsdp chunked loss": chunked,
    "peft_fsdp save_distributed_checkpoint": shares,
}


def tell(is_good: bool, name: str, what: str, start: float) -> bool:
    print(f"{'ok  ' if is_good else 'FAIL'} {name} ({time.monotonic() - start:.1f} s): {what}", flush=True)
    return is_good


def tests(folder: Path) -> subprocess.Popen[str] | None:
    """The tests on the CPU, under way; None where pytest is not there."""
    if importlib.util.find_spec("pytest") is None:
        return None
    plugins = [name for name in ("xdist", "pytest_timeout") if importlib.util.find_spec(name) is None]
    # options of plugins that are not there would be errors
    alone = ["-o", "addopts=", "-o", "timeout=", "-W", "ignore::pytest.PytestConfigWarning"] if plugins else ["-n", "0"]
    words = [sys.executable, "-m", "pytest", *(f"tests/strategies/{name}" for name in TESTS), *alone, "-q"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "tests.log").open("w") as log:
        return subprocess.Popen(
            [*words, "--basetemp", str(folder / "tests")],
            cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


def main() -> int:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    start = time.monotonic()
    good = []
    print(torch.__version__, torch.cuda.get_device_name(), "nccl", torch.cuda.nccl.version(), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        running = tests(folder)
        for check, do in CHECKS.items():
            began = time.monotonic()
            own = folder / check.replace(" ", "-")
            own.mkdir()
            if "nf4" in check and importlib.util.find_spec("bitsandbytes") is None:
                print(f"skip {check}: bitsandbytes is not there")
                continue
            try:
                good.append(tell(True, check, do(own), began))
            except Exception as error:
                good.append(tell(False, check, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", began))
                traceback.print_exc()
        if running is None:
            print("skip tests on the CPU: pytest is not there")
        else:
            try:
                code = running.wait(max(1.0, LIMIT - (time.monotonic() - start)))
            except subprocess.TimeoutExpired:
                running.kill()
                code = -1
            printed = (folder / "tests.log").read_text(errors="replace").splitlines()
            good.append(tell(code == 0, " ".join(TESTS), printed[-1] if printed else "printed nothing", start))
            if code:
                print("\n".join(line for line in printed if line.startswith(("E  ", "FAILED", "ERROR")))[-6000:])
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
