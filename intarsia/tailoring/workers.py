"""What a worker of a search is, and the one that is this process. A trial that fails is tried once more."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4

from intarsia.errors import UserError, missing_package
from intarsia.recipe.recipe import Recipe
from intarsia.tailoring.history import Outcome, TrialFailed

ATTEMPTS = 2
_LONGEST = 300  # Characters of a reason.


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a scorer works: worker `index` of `count` on this machine, on so many threads (None: as torch likes)."""

    index: int = 0
    count: int = 1
    threads: int | None = None


class Scorer(Protocol):
    """Scores recipes."""

    def evaluate(self, recipe: Recipe, budget: int) -> Outcome:
        """What a recipe costs on so many examples.

        Raises:
            TrialFailed: it has no cost.
        """

    def close(self) -> None:
        """Let go of everything."""


class Opener(Protocol):
    """Opens a scorer in the process in which it works; can be sent there."""

    def __call__(self, place: Place) -> Scorer:
        """The scorer."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """A trial that came back: an outcome, or the reason why there is none."""

    number: int
    outcome: Outcome | None
    reason: str | None
    attempts: int
    worker: str


class Workers(Protocol):
    """Takes trials and gives back what came of them."""

    @property
    def count(self) -> int:
        """How many trials run at once."""

    def submit(self, number: int, recipe: Recipe, budget: int) -> None:
        """Start a trial. Not more than `count` are under way."""

    def next(self) -> Done:
        """Wait for one."""


class InProcess:
    """One worker, this process."""

    count = 1

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._next: tuple[int, Recipe, int] | None = None

    def submit(self, number: int, recipe: Recipe, budget: int) -> None:
        """It runs when it is waited for."""
        assert self._next is None
        self._next = (number, recipe, budget)

    def next(self) -> Done:
        """Run it."""
        assert self._next is not None
        number, recipe, budget = self._next
        self._next = None
        attempt = 1
        outcome, reason = scored(self._scorer, recipe, budget)
        while outcome is None and attempt < ATTEMPTS:
            attempt += 1
            outcome, reason = scored(self._scorer, recipe, budget)
        return Done(number=number, outcome=outcome, reason=reason, attempts=attempt, worker="0")


def scored(scorer: Scorer, recipe: Recipe, budget: int) -> tuple[Outcome | None, str | None]:
    """An outcome, or why there is none.

    Raises:
        UserError: something that every trial would meet.
    """
    try:
        return scorer.evaluate(recipe, budget), None
    except TrialFailed as failure:
        return None, failure.reason[:_LONGEST]
    except UserError:
        raise
    except Exception as error:
        # Whatever a candidate makes a library do, the search continues; where the first five trials fail so, it ends.
        words = " ".join(str(error).split())
        return None, f"{type(error).__name__}: {words}"[:_LONGEST]


_PATIENCE_SECONDS = 60


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
def open_workers(
    opener: OpenScorer, evaluator: Evaluator, *, scheduler: str | None, count: int | None
) -> Iterator[Workers]:
    """One worker is this process with its evaluator; otherwise the evaluator is closed, for each worker has its own.

    Raises:
        UserError: see `dask_workers`.
    """
    if scheduler is None and (count or 1) == 1:
        yield InProcess(TrialScorer(evaluator, opener.file))
        return
    evaluator.close()
    with dask_workers(opener, scheduler=scheduler, count=count) as workers:
        yield workers


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


class Cluster:
    """What is needed of a `distributed.Client`."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        """Start a task; gives its future."""
        # A key of its own: Dask must not take two tasks for the same because their arguments look alike.
        return self.client.submit(function, *args, key=f"intarsia-{uuid4().hex}", pure=False, retries=0)

    def wait_for_one(self, futures: Sequence[Any]) -> None:
        """Until one of them is done.

        Raises:
            UserError: there was no worker for a minute.
        """
        from distributed import TimeoutError as NotYet
        from distributed import wait

        patience = _PATIENCE_SECONDS
        while not any(future.done() for future in futures):
            try:
                wait(list(futures), timeout=1, return_when="FIRST_COMPLETED")
            except NotYet:
                patience = _PATIENCE_SECONDS if self.client.nthreads() else patience - 1
            if patience <= 0:
                raise UserError.of(
                    where="workers",
                    expected="at least one worker",
                    found=f"none for {_PATIENCE_SECONDS} seconds",
                    remedy="Start workers (dask worker ADDRESS); the same command continues.",
                )

    def cancel(self, futures: Sequence[Any]) -> None:
        """Give up what is not done."""
        if futures:
            self.client.cancel(futures)


@contextmanager
def connect(scheduler: str) -> Iterator[Cluster]:
    """A connection to the scheduler at an address (`tcp://host:8786`).

    Raises:
        UserError: dask is not installed, or there is no scheduler.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise _no_dask(error, "--scheduler") from error
    try:
        client = Client(scheduler, timeout="20s")
    except (OSError, ValueError) as error:
        raise UserError.of(
            where="--scheduler",
            expected="the address of a Dask scheduler, such as tcp://host:8786",
            found=f"{scheduler!r}: {error}",
            remedy="Start one with `dask scheduler`, and workers with `dask worker ADDRESS`.",
        ) from error
    with client:
        yield Cluster(client)


@contextmanager
def own_workers(count: int, *, deaths: int) -> Iterator[Cluster]:
    """So many processes on this machine, each with its share of the cores.

    Args:
        deaths: of so many workers a task is given up that kills them.

    Raises:
        UserError: dask is not installed.
    """
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise _no_dask(error, "--workers") from error
    threads = str(threads_each(count))
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    settings = {
        "distributed.scheduler.allowed-failures": deaths - 1,
        "distributed.nanny.pre-spawn-environ": environment,
    }
    with (
        dask.config.set(settings),
        # No memory limit of Dask's: the weights are mapped from files, and it would count them against a worker.
        LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            dashboard_address=None,
            memory_limit=0,
            silence_logs=logging.CRITICAL,
        ) as own,
        Client(own) as client,
    ):
        yield Cluster(client)


def _no_dask(error: ImportError, option: str) -> UserError:
    instead = f"leave {option} out"
    return missing_package("dask[distributed]", where=option, extra="search", instead=instead, error=error)


def running(cluster: Cluster, scheduler: str) -> dict[str, int]:
    """The workers of a scheduler, by address: how many tasks each takes at once.

    Raises:
        UserError: there are none.
    """
    from distributed import TimeoutError as NotYet

    try:
        cluster.client.wait_for_workers(1, timeout=30)
    except NotYet as error:
        raise UserError.of(
            where="--scheduler",
            expected="a scheduler with at least one worker",
            found=f"none at {scheduler} within 30 seconds",
            remedy=f"Start workers: dask worker {scheduler}",
        ) from error
    return {str(address): int(number) for address, number in cluster.client.nthreads().items()}


def threads_each(count: int) -> int:
    """The share of one of `count` processes in the cores that this one may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // count, 1)


def check_scheduler(scheduler: str) -> None:
    """See that a scheduler is there, and has workers.

    Raises:
        UserError: dask is not installed, the scheduler cannot be reached, or it has no workers.
    """
    with connect(scheduler) as cluster:
        running(cluster, scheduler)
