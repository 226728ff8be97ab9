"""Trials in the worker processes of a Dask cluster: our own on this machine, or those of an existing scheduler.

A worker opens the family once and keeps it. What it runs on is its own: with our local cluster each worker has its
device and its share of the cores. A worker that dies takes its trial with it, which Dask gives to another worker; of
our own workers no more than two are given a trial that kills them, which is then a failed one.

Processes are started afresh, so a script that searches with several workers needs `if __name__ == "__main__":`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from intarsia.healing.cluster import Cluster, connect, own_workers, running, threads_each
from intarsia.recipe.recipe import Recipe
from intarsia.tailoring.outcome import Outcome
from intarsia.tailoring.workers import ATTEMPTS, Done, Opener, Place, Scorer, scored


class OnDask:
    """Several workers."""

    def __init__(self, cluster: Cluster, opener: Opener, *, count: int, threads: int | None) -> None:
        self.count = count
        self._cluster, self._opener, self._threads = cluster, opener, threads
        self._key = uuid4().hex
        self._open: dict[Any, tuple[int, Recipe, int, int]] = {}

    def submit(self, number: int, recipe: Recipe, budget: int) -> None:
        """Give it to Dask."""
        self._submit(number, recipe, budget, attempt=1)

    def _submit(self, number: int, recipe: Recipe, budget: int, attempt: int) -> None:
        work = (self._key, self._opener, self.count, self._threads, recipe, budget)
        self._open[self._cluster.submit(_score_here, *work)] = (number, recipe, budget, attempt)

    def next(self) -> Done:
        """Of those that are done the one that was submitted first."""
        from distributed import KilledWorker

        while True:
            future = self._first_done()
            number, recipe, budget, attempt = self._open.pop(future)
            try:
                outcome, reason, worker = future.result()
            except KilledWorker:
                reason = "every worker that tried it died"
                return Done(number=number, outcome=None, reason=reason, attempts=ATTEMPTS, worker="lost")
            if outcome is not None or attempt >= ATTEMPTS:
                return Done(number=number, outcome=outcome, reason=reason, attempts=attempt, worker=worker)
            self._submit(number, recipe, budget, attempt + 1)

    def _first_done(self) -> Any:
        while True:
            done = sorted((future for future in self._open if future.done()), key=lambda f: self._open[f][0])
            if done:
                return done[0]
            self._cluster.wait_for_one(list(self._open))

    def cancel(self) -> None:
        """Give up what is under way."""
        self._cluster.cancel(list(self._open))
        self._open.clear()


@contextmanager
def dask_workers(opener: Opener, *, scheduler: str | None, count: int | None) -> Iterator[OnDask]:
    """Workers of an existing scheduler (`tcp://host:8786`), or `count` processes of our own on this machine.

    Raises:
        UserError: dask is not installed, the scheduler cannot be reached, or it has no workers.
    """
    if scheduler is not None:
        with connect(scheduler) as cluster:
            found = sum(running(cluster, scheduler).values())
            yield from _used(OnDask(cluster, opener, count=min(count or found, found), threads=None))
        return
    count = count or 1
    with own_workers(count, deaths=ATTEMPTS) as cluster:
        yield from _used(OnDask(cluster, opener, count=count, threads=threads_each(count)))


def _used(workers: OnDask) -> Iterator[OnDask]:
    try:
        yield workers
    finally:
        workers.cancel()


_SCORERS: dict[str, Scorer] = {}
"""The scorer of this worker process, by search."""


def _score_here(
    key: str, opener: Opener, count: int, threads: int | None, recipe: Recipe, budget: int
) -> tuple[Outcome | None, str | None, str]:
    """Runs in a worker."""
    from distributed import get_worker

    name = str(get_worker().name)
    if key not in _SCORERS:
        for old in _SCORERS.values():
            old.close()
        _SCORERS.clear()
        index = int(name) if name.isdecimal() else 0
        _SCORERS[key] = opener(Place(index=index, count=count if threads is not None else 1, threads=threads))
    outcome, reason = scored(_SCORERS[key], recipe, budget)
    return outcome, reason, name
