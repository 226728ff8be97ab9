"""How much memory this process has needed."""

from __future__ import annotations

import sys

import psutil
import torch


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes() -> int | None:
    """The most memory that tensors have taken on the CUDA device so far; None without one."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None
