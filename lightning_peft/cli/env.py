"""What the machine and the environment are: for a bug report, and before a run."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lightning_peft.methods.errors import PEFTError
from lightning_peft.state.versions import installed
from lightning_peft.tracking.tables import format_bytes

PACKAGES = (
    "lightning-peft", "torch", "lightning", "transformers", "jsonargparse", "torchmetrics",
    "datasets", "peft", "bitsandbytes", "wandb", "numpy",
)  # fmt: skip


def show_environment(words: Sequence[str]) -> int:
    """Print versions, devices, cores and memory.

    Raises:
        PEFTError: `env` takes no arguments.
    """
    if words:
        raise PEFTError(f"env takes no arguments, not {' '.join(words)!r}")
    import torch

    rows = {"python": platform.python_version(), "platform": platform.platform()}
    rows |= {package: installed(package) for package in PACKAGES}
    rows["cores"] = f"{_cores()} usable of {os.cpu_count()}, torch uses {torch.get_num_threads()} threads"
    rows["memory"] = _memory()
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"{device.major}.{device.minor}"
        rows[f"cuda:{index}"] = f"{device.name}, {format_bytes(device.total_memory)}, compute capability {capability}"
    if torch.cuda.is_available():
        rows["bfloat16"] = "supported" if torch.cuda.is_bf16_supported() else "not supported"
    elif torch.backends.mps.is_available():
        rows["mps"] = "available"
    else:
        rows["accelerator"] = "none; the CPU is used"
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table, markup=False)
    return 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return "unknown"
    return format_bytes(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
