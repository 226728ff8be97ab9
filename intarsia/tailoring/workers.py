"""Workers of a search: this process, or processes under Dask. A trial that fails is tried once more."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias
from uuid import uuid4

import torch

from intarsia.building.loaded_model import default_device
from intarsia.errors import UserError, missing_package
from intarsia.inspection.own_code import trust_remote_code, trusts
from intarsia.options import Runtime
from intarsia.recipe.recipe import Recipe
from intarsia.registry import load_plugin
from intarsia.tailoring.evaluator import Evaluator, KeptFits, open_evaluator
from intarsia.tailoring.family import open_family
from intarsia.tailoring.family_file import FamilyFile
from intarsia.tailoring.history import Outcome, TrialFailed

ATTEMPTS = 2
_LONGEST = 300  # characters of a reason
_PATIENCE_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a scorer works: worker `index` of `count` on this machine, with `threads` (None: torch's default)."""

    index: int = 0
    count: int = 1
    threads: int | None = None


class Scorer(Protocol):
    """Scores recipes."""

    def evaluate(self, recipe: Recipe, budget: int) -> Outcome:
        """The costs of a recipe on `budget` examples.

        Raises:
            TrialFailed: it has no cost.
        """

    def close(self) -> None:
        """Release what is cached."""


Opener: TypeAlias = Callable[[Place], Scorer]
"""Opens a scorer in a worker's process; can be pickled."""


@dataclass(frozen=True, kw_only=True)
class OpenScorer:
    """Opens the family in a worker's process. Paths are absolute: the worker may run in another folder."""

    file: FamilyFile
    runtime: Runtime
    # The folder of healed recipes.
    fits: Path | None = None
    # Files that register the user's merge operators.
    plugins: tuple[str, ...] = ()
    # Whether models' own code may run.
    trust_remote_code: bool = False

    def __call__(self, place: Place) -> Evaluator:
        """A scorer with its worker's share of the memory, on a GPU of its own where there are several."""
        for plugin in self.plugins:
            load_plugin(plugin)
        if self.trust_remote_code and not trusts():
            trust_remote_code().__enter__()  # for as long as the process lives
        if place.threads is not None:
            torch.set_num_threads(place.threads)
        runtime = self.runtime
        device = default_device() if runtime.device is None else torch.device(runtime.device)
        if place.count > 1 and device.type == "cuda" and ":" not in str(device):
            runtime = replace(runtime, device=f"cuda:{place.index % torch.cuda.device_count()}")
        if runtime.memory_bytes is not None:
            runtime = replace(runtime, memory=str(runtime.memory_bytes // place.count))
        fits = None if self.fits is None else KeptFits(self.fits)
        return open_evaluator(open_family(self.file.members), self.file, runtime, probe=False, fits=fits)


@dataclass(frozen=True, kw_only=True)
class Done:
    """A finished trial: its outcome, or the reason why there is none."""

    number: int
    outcome: Outcome | None
    reason: str | None
    attempts: int
    worker: str


class Workers(Protocol):
    """Run trials."""

    @property
    def count(self) -> int:
        """How many trials run at once."""

    def submit(self, number: int, recipe: Recipe, budget: int) -> None:
        """Start a trial; at most `count` are running."""

    def next(self) -> Done:
        """Wait for one."""


@contextmanager
def open_workers(
    opener: OpenScorer, evaluator: Evaluator, *, scheduler: str | None, count: int | None
) -> Iterator[Workers]:
    """One worker is this process with its evaluator; else the evaluator is closed, for each worker opens another."""
    if scheduler is None and (count or 1) == 1:
        yield InProcess(evaluator)
        return
    evaluator.close()
    with dask_workers(opener, scheduler=scheduler, count=count) as workers:
        yield workers


class InProcess:
    """One worker, this process."""

    count = 1

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._next: tuple[int, Recipe, int] | None = None

    def submit(self, number: int, recipe: Recipe, budget: int) -> None:
        """Keep it until `next`, which runs it."""
        assert self._next is None
        self._next = (number, recipe, budget)

    def next(self) -> Done:
        """Run it."""
        assert self._next is not None
        trial, self._next = self._next, None
        return scored(self._scorer, *trial, worker="0")


def scored(scorer: Scorer, number: int, recipe: Recipe, budget: int, *, worker: str) -> Done:
    """A trial: its outcome, or why there is none though it was tried again.

    Raises:
        UserError: something that every trial would meet.
    """
    reason = ""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            outcome = scorer.evaluate(recipe, budget)
            return Done(number=number, outcome=outcome, reason=None, attempts=attempt, worker=worker)
        except TrialFailed as failure:
            reason = failure.reason
        except UserError:
            raise
        except Exception as error:
            # Whatever error a candidate causes in a library, the search continues; it stops if the first trials fail.
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Done(number=number, outcome=None, reason=reason[:_LONGEST], attempts=ATTEMPTS, worker=worker)


class OnDask:
    """Workers of a Dask client."""

    def __init__(self, client: Any, opener: Opener, *, count: int, threads: int | None) -> None:
        self.count = count
        self._client, self._opener, self._threads = client, opener, threads
        self._key = uuid4().hex
        # The numbers of running trials.
        self._open: dict[Any, int] = {}

    def submit(self, number: int, recipe: Recipe, budget: int) -> None:
        """Submit it to Dask."""
        place = Place(count=self.count if self._threads is not None else 1, threads=self._threads)
        work = (_score_here, self._key, self._opener, place, number, recipe, budget)
        # A unique key: Dask must not take two tasks for the same because their arguments look alike.
        self._open[self._client.submit(*work, key=f"intarsia-{uuid4().hex}", pure=False, retries=0)] = number

    def next(self) -> Done:
        """Of the finished trials, the one that was submitted first."""
        from distributed import KilledWorker

        future = self._first_done()
        number = self._open.pop(future)
        try:
            done: Done = future.result()
        except KilledWorker:
            reason = "every worker that tried it died"
            return Done(number=number, outcome=None, reason=reason, attempts=ATTEMPTS, worker="lost")
        return done

    def _first_done(self) -> Any:
        from distributed import TimeoutError as NotYet
        from distributed import wait

        patience = _PATIENCE_SECONDS
        while not (done := [future for future in self._open if future.done()]):
            try:
                wait(list(self._open), timeout=1, return_when="FIRST_COMPLETED")
            except NotYet:
                patience = _PATIENCE_SECONDS if self._client.nthreads() else patience - 1
            if patience <= 0:
                raise UserError(
                    f"There was no worker for {_PATIENCE_SECONDS} seconds.",
                    "Start workers (dask worker ADDRESS); the same command resumes.",
                )
        return min(done, key=lambda future: self._open[future])

    def cancel(self) -> None:
        """Cancel what is running."""
        self._client.cancel(list(self._open))


@contextmanager
def dask_workers(opener: Opener, *, scheduler: str | None, count: int | None) -> Iterator[OnDask]:
    """Workers of an existing scheduler (`tcp://host:8786`), or `count` processes of our own on this machine."""
    with ExitStack() as stack:
        if scheduler is None:
            count = count or 1
            threads = threads_each(count)
            client = stack.enter_context(_own_workers(count))
        else:
            client, threads = stack.enter_context(_connected(scheduler)), None
            there = sum(client.nthreads().values())
            count = min(count or there, there)
        workers = OnDask(client, opener, count=count, threads=threads)
        try:
            yield workers
        finally:
            workers.cancel()


def check_scheduler(scheduler: str) -> None:
    """Check that there is a scheduler with workers."""
    with _connected(scheduler):
        pass


def threads_each(count: int) -> int:
    """The share of one of `count` processes in the cores that this one may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // count, 1)


_SCORERS: dict[str, Scorer] = {}
"""The scorer of this worker process, by search."""


def _score_here(key: str, opener: Opener, place: Place, number: int, recipe: Recipe, budget: int) -> Done:
    """Runs in a worker."""
    from distributed import get_worker

    name = str(get_worker().name)
    if key not in _SCORERS:
        for old in _SCORERS.values():
            old.close()
        _SCORERS.clear()
        _SCORERS[key] = opener(replace(place, index=int(name) if name.isdecimal() else 0))
    return scored(_SCORERS[key], number, recipe, budget, worker=name)


@contextmanager
def _connected(scheduler: str) -> Iterator[Any]:
    """A client of the scheduler at an address, which has workers."""
    try:
        from distributed import Client
        from distributed import TimeoutError as NotYet
    except ImportError as error:
        raise _no_dask(error, "--scheduler") from error
    try:
        client = Client(scheduler, timeout="20s")
    except (OSError, ValueError) as error:
        raise UserError(
            f"--scheduler {scheduler} is no Dask scheduler that can be reached (such as tcp://host:8786): {error}.",
            "Start one with `dask scheduler`, and workers with `dask worker ADDRESS`.",
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=30)
        except NotYet as error:
            raise UserError(
                f"The scheduler at {scheduler} has no worker within 30 seconds.",
                f"Start workers: dask worker {scheduler}",
            ) from error
        yield client


@contextmanager
def _own_workers(count: int) -> Iterator[Any]:
    """A client of `count` processes on this machine, each with its share of the cores."""
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise _no_dask(error, "--workers") from error
    threads = str(threads_each(count))
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    settings = {
        # A task that kills this many workers fails.
        "distributed.scheduler.allowed-failures": ATTEMPTS - 1,
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
        yield client


def _no_dask(error: ImportError, option: str) -> UserError:
    instead = f"leave {option} out"
    return missing_package("dask[distributed]", where=option, extra="search", instead=instead, error=error)
