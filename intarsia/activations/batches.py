"""Batches of a text, several side by side on the CPU.

Layers of small models are too small to split a matrix product over cores: two threads that each run half of a batch
take half the time of two threads on each product (width 576), and no more time for wide layers (width 2048). The
results are bit-identical.
"""

from __future__ import annotations

import gc
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from intarsia.data.corpus import Corpus
from intarsia.errors import UserError
from intarsia.progress import current

Item = TypeVar("Item")
Result = TypeVar("Result")


def workers_for(device: torch.device, at_most: int) -> int:
    """Number of threads to work side by side: torch's on a CPU; one on any other device or with gradients."""
    if device.type != "cpu" or torch.is_grad_enabled():
        return 1
    return max(1, min(torch.get_num_threads(), at_most))


def side_by_side(items: Iterable[Item], work: Callable[[Item], Result], workers: int) -> Iterator[tuple[Item, Result]]:
    """Yield each item with the result of `work`, in order.

    At most `workers` items run at once. Items are made, and results yielded, in the calling thread.
    """
    if workers == 1:
        for item in items:
            yield item, work(item)
        return
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def alone(item: Item) -> Result:
        torch.set_num_threads(threads // workers)
        with torch.inference_mode(inference), torch.no_grad():
            return work(item)

    waiting: deque[tuple[Item, Future[Result]]] = deque()
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


_CPU_BATCH_TOKENS = 2048
_CUDA_BATCH_TOKENS = 32768

Batch: TypeAlias = "tuple[slice, Tensor, Tensor | None]"
"""The slice of sequences, their tokens `[B, T]`, and the mask of real ones (None: all), on the device."""


class Batches:
    """The batches of a text.

    Attributes:
        size: sequences of a batch.
    """

    def __init__(
        self,
        corpus: Corpus,
        device: torch.device,
        *,
        batch_tokens: int | None = None,
    ) -> None:
        self.corpus = corpus
        self.device = device
        sensible = _CUDA_BATCH_TOKENS if device.type == "cuda" else _CPU_BATCH_TOKENS
        self.size = max(1, (batch_tokens or sensible) // corpus.seq_len)

    def over(self, sequences: slice = slice(None), size: int | None = None) -> Iterator[Batch]:
        """The batches of some sequences (default: all), with at most `size` sequences each."""
        start, stop, _ = sequences.indices(len(self.corpus))
        while start < stop:
            part = slice(start, min(start + (size or self.size), stop))
            yield self._batch(part)
            start = part.stop

    def each(self, work: Callable[[slice, Tensor, Tensor | None], None], sequences: slice = slice(None)) -> None:
        """Call `work` with every batch, halving batches that are too large for the device's memory.

        Args:
            work: is called again with part of the same sequences if it runs out of memory, so it must have no side
                effects before its last allocation.

        Raises:
            UserError: memory is too small for one sequence.
        """
        start, stop, _ = sequences.indices(len(self.corpus))
        while start < stop:
            part = slice(start, min(start + self.size, stop))
            try:
                work(*self._batch(part))
            except torch.OutOfMemoryError as error:
                rows = part.stop - part.start
                error.__traceback__ = None  # it holds the tensors that did not fit
                self._halve(rows)
                continue
            start = part.stop

    def side_by_side(
        self,
        prepare: Callable[[slice, Tensor, Tensor | None], Item],
        work: Callable[[Item], Result],
        finish: Callable[[Batch, Item, Result], None],
        sequences: slice = slice(None),
    ) -> None:
        """Process every batch: on the CPU its parts in several threads, else as in `each`.

        Args:
            prepare, finish: run in this thread, batch by batch; only `finish` may have side effects.
            work: runs in any thread.
        """

        def all_of_it(rows: slice, ids: Tensor, mask: Tensor | None) -> None:
            given = prepare(rows, ids, mask)
            finish((rows, ids, mask), given, work(given))

        if workers_for(self.device, self.size) == 1:
            self.each(all_of_it, sequences)
            return
        for batch, given, found in self.results(prepare, work, sequences):
            finish(batch, given, found)

    def results(
        self,
        prepare: Callable[[slice, Tensor, Tensor | None], Item],
        work: Callable[[Item], Result],
        sequences: slice = slice(None),
    ) -> Iterator[tuple[Batch, Item, Result]]:
        """Yield batches with the results of `prepare` and `work`, in order; batches are not halved."""
        workers = workers_for(self.device, self.size)
        parts = ((batch, prepare(*batch)) for batch in self.over(sequences, math.ceil(self.size / workers)))
        for (batch, given), found in side_by_side(parts, lambda part: work(part[1]), workers):
            yield batch, given, found

    def whole(self, work: Callable[[], Result]) -> Result:
        """Call `work`, which goes through the batches itself; call it again, with half the size, if memory runs out.

        Raises:
            UserError: memory is too small for one sequence.
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                error.__traceback__ = None
                self._halve(min(self.size, len(self.corpus)))

    def _batch(self, part: slice) -> Batch:
        mask = self.corpus.mask
        ids = self.corpus.input_ids[part].to(self.device)
        return part, ids, None if mask is None else mask[part].to(self.device)

    def _halve(self, rows: int) -> None:
        if rows == 1:
            raise UserError(
                f"{self.device} has too little memory for one sequence of {self.corpus.seq_len} tokens in one layer.",
                "Use shorter sequences (--seq-len), --stream, --dtype bfloat16, or a device with more memory.",
            ) from None
        self.size = (rows + 1) // 2
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        current().say(f"{self.device} is out of memory: continuing with {self.size} sequences at a time, not {rows}")
