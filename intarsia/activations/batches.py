"""Work on several batches side by side, on the CPU.

Layers of small models are too small for one matrix product to be split over cores: two threads that each run half of
a batch took half the time of two threads on one product after the other (width 576), and no more of it for wide
layers (width 2048). The results are the same to the bit.
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
    """How many threads work side by side: those torch may use on a CPU; one on any other device or with gradients."""
    if device.type != "cpu" or torch.is_grad_enabled():
        return 1
    return max(1, min(torch.get_num_threads(), at_most))


def side_by_side(items: Iterable[Item], work: Callable[[Item], Result], workers: int) -> Iterator[tuple[Item, Result]]:
    """Each item with what `work` gives for it, in order.

    No more than `workers` items are under way. Items are made, and results taken, in the calling thread.
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
"""Which sequences, their tokens `[B, T]`, and where these are real (None: all), on the device."""


class Batches:
    """Goes through a text batch by batch.

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
        """Do something with every batch; with halves of it where it is too much for the device's memory.

        Args:
            work: is called again with part of the same sequences when it ran out of memory, so it must change nothing
                before it has everything that it needs.

        Raises:
            UserError: memory does not suffice for one sequence.
        """
        start, stop, _ = sequences.indices(len(self.corpus))
        while start < stop:
            part = slice(start, min(start + self.size, stop))
            try:
                work(*self._batch(part))
            except torch.OutOfMemoryError as error:
                rows = part.stop - part.start
                error.__traceback__ = None  # it holds the tensors that there was no room for
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
        """Do something with every batch: on the CPU with parts of it in several threads, else as `each` does.

        Args:
            prepare, finish: run in this thread, batch after batch; `finish` alone may change anything.
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
        """Batches with what `prepare` and `work` give, in order; batches are not halved where memory runs out."""
        workers = workers_for(self.device, self.size)
        parts = ((batch, prepare(*batch)) for batch in self.over(sequences, math.ceil(self.size / workers)))
        for (batch, given), found in side_by_side(parts, lambda part: work(part[1]), workers):
            yield batch, given, found

    def whole(self, work: Callable[[], Result]) -> Result:
        """Do something that goes through the batches itself; all of it again, with halves, where memory runs out.

        Raises:
            UserError: memory does not suffice for one sequence.
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
                f"{self.device} has no memory for one sequence of {self.corpus.seq_len} tokens in one layer.",
                "Use shorter sequences (--seq-len), --stream, --dtype bfloat16, or a device with more memory.",
            ) from None
        self.size = (rows + 1) // 2
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        current().say(f"{self.device} is out of memory: {self.size} sequences at a time from now on, not {rows}")
