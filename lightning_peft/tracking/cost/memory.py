"""How much memory a run has taken at most."""

from __future__ import annotations

import sys

import torch


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak so far.

    On a GPU those of tensors, by torch's allocator, since the process started or the statistics were reset. Elsewhere
    the peak resident set of the whole process, libraries included, which never falls. None on Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:
        return None
    # in kilobytes, but for macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
