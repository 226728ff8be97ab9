"""Dask workers that measure the calibration set together, each its share of the sequences.

With W workers share w has the sequences w, w + W, w + 2 W, ..., so that a race that looks at the first sequences alone
gives work to all of them. Sums are added up in the order of the shares, whichever worker is done first: the same
number of workers gives the same numbers, and another number of them the same within what float addition loses.

A worker that dies loses its share; Dask gives it to another one, which measures it anew.

Shape suffixes: `N` sequences, `T` tokens, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from uuid import uuid4

import torch
from torch import Tensor

from intarsia.calibration.stats import LayerMeasure
from intarsia.healing.cluster import Cluster
from intarsia.planning.candidates import Change
from intarsia.planning.share import Answer, Share, forget, work
from intarsia.recipe.ops import Op

_PATIENCE_SECONDS = 30.0  # for an answer that is there


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the whole calibration set shows: a measure for each layer, and each sequence's loss and predictions."""

    measures: list[LayerMeasure]
    losses_N: Tensor
    counts_N: Tensor


class Team:
    """Asks the workers, and puts together what they say.

    Attributes:
        size: how many shares there are.
        peak_memory_bytes: the most that a worker has needed so far.
    """

    def __init__(self, cluster: Cluster, whole: Share, *, workers: Sequence[str]) -> None:
        """
        Args:
            whole: a share with all sequences, to be divided.
            workers: their addresses; no more of them are used than there are sequences.
        """
        self.sequences = len(whole.ids_NT)
        self.size = min(len(workers), self.sequences)
        self.peak_memory_bytes = 0
        self._cluster = cluster
        self._key = uuid4().hex
        self._at: list[str] = list(workers[: self.size])
        self._spent = 0.0
        self._shares = [
            replace(
                whole,
                number=number,
                ids_NT=whole.ids_NT[number :: self.size].clone(),
                mask_NT=None if whole.mask_NT is None else whole.mask_NT[number :: self.size].clone(),
            )
            for number in range(self.size)
        ]

    def measured(self, ops: Sequence[Op], advance: Callable[[float], None] = lambda done: None) -> Measured:
        """The model with these layers; `advance` is told of the sequences that are done."""
        measures = [LayerMeasure() for _ in ops]
        losses_N = torch.zeros(self.sequences, dtype=torch.float64)
        counts_N = torch.zeros(self.sequences, dtype=torch.int64)
        for number, (found, sums_N, numbers_N) in self._asked(ops, "measured", lambda share: (), advance):
            for measure, its in zip(measures, found, strict=True):
                measure.include(its)
            losses_N[number :: self.size], counts_N[number :: self.size] = sums_N, numbers_N
        return Measured(measures=measures, losses_N=losses_N, counts_N=counts_N)

    def distance(
        self, ops: Sequence[Op], start: int, count: int, tokens: Literal["all-tokens", "last-token"]
    ) -> tuple[float, int]:
        """The summed distance between the ends of a span, and of how many tokens."""
        total, number = 0.0, 0
        for _, (its, its_number) in self._asked(ops, "distance", lambda share: (start, count, tokens)):
            total, number = total + its, number + its_number
        return total, number

    def tokens(self, ops: Sequence[Op], depth: int, keep_NT: Tensor) -> Tensor:
        """H^depth of the tokens where `keep_NT` is True, in order: float32 `[K, D]`."""
        numbers_N = keep_NT.sum(dim=1)
        by_sequence: list[Tensor] = [torch.empty(0)] * self.sequences
        for share, found in self._asked(ops, "tokens", lambda share: (depth, keep_NT[share :: self.size])):
            by_sequence[share :: self.size] = found.split(numbers_N[share :: self.size].tolist())
        return torch.cat(by_sequence)

    def losses(self, ops: Sequence[Op], changes: Sequence[Change], sequences: slice) -> list[Tensor]:
        """Summed loss of each sequence of the slice, for one change after the other: float64 `[N]`."""
        first, stop, _ = sequences.indices(self.sequences)
        found = [torch.zeros(stop - first, dtype=torch.float64) for _ in changes]
        for share, its in self._asked(ops, "losses", lambda share: self._given(share, sequences, changes)):
            for sums_N, its_N in zip(found, its, strict=True):
                sums_N[self._rows(share, first)] = its_N
        return found

    def normed(self, ops: Sequence[Op], change: Change, sequences: slice) -> Tensor:
        """H^L behind the final norm with a change, of the sequences of the slice: `[N, T, D]`."""
        first, stop, _ = sequences.indices(self.sequences)
        by_sequence: list[Tensor] = [torch.empty(0)] * (stop - first)
        for share, its in self._asked(ops, "normed", lambda share: self._given(share, sequences, change)):
            by_sequence[self._rows(share, first)] = its.unbind()
        return torch.stack(by_sequence)

    def spent(self) -> float:
        """Layer-forwards over the calibration set since this was last asked."""
        spent, self._spent = self._spent, 0.0
        return spent / self.sequences

    def close(self) -> None:
        """Have the workers let go of what they hold."""
        self._cluster.everywhere(forget, self._key)

    def _given(self, share: int, sequences: slice, what: Any) -> tuple[Any, slice] | None:
        """What to ask a share, and of which of its sequences; None if none of them is its."""
        first, stop, _ = sequences.indices(self.sequences)
        own = slice(-((share - first) // self.size), -((share - stop) // self.size))
        own = slice(max(own.start, 0), max(own.stop, 0))
        return (what, own) if own.start < own.stop else None

    def _rows(self, share: int, first: int) -> slice:
        """Where a share's sequences stand among those from `first` on."""
        return slice((share - first) % self.size, None, self.size)

    def _asked(
        self,
        ops: Sequence[Op],
        question: str,
        given: Callable[[int], Sequence[Any] | None],
        advance: Callable[[float], None] = lambda done: None,
    ) -> list[tuple[int, Any]]:
        """The answers, in the order of the shares; of those alone that are `given` something.

        Raises:
            UserError: a worker met one, a share has lost too many workers, or there is none any more.
        """
        asked = {share.number: given(share.number) for share in self._shares}

        def submitted(number: int) -> Any:
            share, what = self._shares[number], asked[number]
            return self._cluster.submit(work, self._key, share, list(ops), question, what, worker=self._at[number])

        futures = {number: submitted(number) for number, what in asked.items() if what is not None}
        answers: dict[int, Any] = {}
        try:
            while waiting := [number for number in futures if number not in answers]:
                self._cluster.wait_for_one([futures[number] for number in waiting])
                for number in [number for number in waiting if futures[number].done()]:
                    try:
                        answers[number] = self._taken(number, futures[number])
                    except TimeoutError:  # it was done, and is lost with its worker: asked anew
                        self._cluster.cancel([futures[number]])
                        futures[number] = submitted(number)
                        continue
                    advance(float(len(self._shares[number].ids_NT)))
        finally:
            self._cluster.cancel([futures[number] for number in futures if number not in answers])
        return [(number, answers[number]) for number in sorted(answers)]

    def _taken(self, number: int, future: Any) -> Any:
        answer: Answer = self._cluster.result(
            future, f"share {number + 1} of {self.size} of the calibration set", patience=_PATIENCE_SECONDS
        )
        self._at[number] = answer.worker
        self._spent += answer.spent
        self.peak_memory_bytes = max(self.peak_memory_bytes, answer.peak_memory_bytes)
        return answer.found
