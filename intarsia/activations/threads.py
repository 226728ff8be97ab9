"""Work on several batches side by side, on the CPU.

Layers of small models are too small for one matrix product to be split over cores: two threads that each run half of
a batch took half the time of two threads on one product after the other (width 576), and no more of it for wide
layers (width 2048). The results are the same to the bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Found = TypeVar("Found")


def workers_for(device: torch.device, at_most: int) -> int:
    """How many threads work side by side: those torch may use on a CPU; one on any other device or with gradients."""
    if device.type != "cpu" or torch.is_grad_enabled():
        return 1
    return max(1, min(torch.get_num_threads(), at_most))


def side_by_side(items: Iterable[Item], work: Callable[[Item], Found], workers: int) -> Iterator[tuple[Item, Found]]:
    """Each item with what `work` gives for it, in order.

    No more than `workers` items are under way. Items are made, and results taken, in the calling thread.
    """
    if workers == 1:
        for item in items:
            yield item, work(item)
        return
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def alone(item: Item) -> Found:
        torch.set_num_threads(threads // workers)
        with torch.inference_mode(inference), torch.no_grad():
            return work(item)

    waiting: deque[tuple[Item, Future[Found]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="intarsia-run")
    try:
        for item in items:
            if len(waiting) == workers:
                first, future = waiting.popleft()
                yield first, future.result()
            waiting.append((item, pool.submit(alone, item)))
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
