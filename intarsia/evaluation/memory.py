"""How much memory this process has needed, and how much a piece of work needs while it runs."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from intarsia.architecture.spec import Architecture
from intarsia.heap import give_back

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_SAMPLE_S = 0.005


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


class Growth:
    """What `growth` found: `bytes` are valid behind its block."""

    bytes: int = 0


@contextmanager
def growth(device: torch.device) -> Iterator[Growth]:
    """How far memory rises above where it was, at most, while the block runs.

    On CUDA that is what tensors take. On the CPU it is the resident memory of this process, from which memory that
    was free but not given back is taken out first; other threads of the process count too.
    """
    found = Growth()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        torch.cuda.synchronize(device)
        found.bytes = int(torch.cuda.max_memory_allocated(device) - before)
        return
    gc.collect()
    give_back()  # it would hide what is taken anew
    before = psutil.Process().memory_info().rss
    if reset_peak():
        yield found
        found.bytes = max(0, peak_since_reset() - before)
        return
    with _sampled() as highest:
        yield found
    found.bytes = max(0, highest[0] - before)


def kv_cache_bytes(architecture: Architecture, *, batch: int, tokens: int, itemsize: int) -> int:
    """What keys and values of `tokens` tokens take, as the config says; a sliding layer holds its window less one."""
    window = architecture.config.get("sliding_window")
    kinds = architecture.layer_types
    if kinds is None:  # one kind for all: a window that the config does not switch off
        slides = window is not None and architecture.config.get("use_sliding_window", True)
        kinds = ("sliding_attention" if slides else "full_attention",) * architecture.n_layers
    held = [min(tokens, int(window or 0) - 1) if kind.startswith("sliding_attention") else tokens for kind in kinds]
    heads = architecture.n_query_heads if architecture.family.caches_query_heads else architecture.n_kv_heads
    return 2 * batch * heads * architecture.head_dim * itemsize * sum(held)


def cache_bytes(cache: Any) -> int:
    """What the keys and values in a cache of `transformers` take."""
    return sum(
        tensor.nbytes
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
        if isinstance(tensor, torch.Tensor)
    )


def reset_peak() -> bool:
    """Let Linux count the largest resident memory from now on; False where that cannot be done."""
    try:
        _RESET.write_text("5", encoding="ascii")
        peak_since_reset()
    except (OSError, ValueError, StopIteration):
        return False
    return True


def peak_since_reset() -> int:
    """The largest resident memory since `reset_peak`, in bytes; on Linux alone."""
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


@contextmanager
def _sampled() -> Iterator[list[int]]:
    """The largest resident memory seen by looking every few milliseconds."""
    process, done = psutil.Process(), threading.Event()
    highest = [process.memory_info().rss]

    def watch() -> None:
        while not done.wait(_SAMPLE_S):
            highest[0] = max(highest[0], process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield highest
    finally:
        highest[0] = max(highest[0], process.memory_info().rss)
        done.set()
        thread.join()
