"""Dask workers, for whatever is given to several processes: an existing scheduler's, or our own on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from uuid import uuid4

from intarsia.errors import UserError, missing_package

LOCAL = "local"
_PATIENCE_SECONDS = 60


class Cluster:
    """What is needed of a `distributed.Client`."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def submit(self, function: Callable[..., Any], *args: Any, worker: str | None = None) -> Any:
        """Start a task; gives its future.

        Args:
            worker: the address of the one that should have it, as long as it is there.
        """
        where = {} if worker is None else {"workers": [worker], "allow_other_workers": True}
        # A key of its own: Dask must not take two trainings for the same because their arguments look alike. A task
        # keeps state, so the worker that is lost may be replaced, but a task that fails is not tried again.
        return self.client.submit(function, *args, key=f"intarsia-{uuid4().hex}", pure=False, retries=0, **where)

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

    def as_completed(self, futures: Sequence[Any]) -> Iterable[Any]:
        """The futures, each when it is done."""
        from distributed import as_completed

        return as_completed(futures)

    def result(self, future: Any, where: str, *, patience: float | None = None) -> Any:
        """What a task gave.

        Args:
            patience: seconds to wait for it. What a task gave may be lost with the worker that has it.

        Raises:
            UserError: the task met one, or its workers were lost.
            TimeoutError: it is not there by then.
        """
        from distributed import KilledWorker
        from distributed import TimeoutError as NotYet

        try:
            return future.result(timeout=patience)
        except NotYet as error:  # of Python 3.10 it is not the built-in one
            raise TimeoutError(where) from error
        except KilledWorker as error:
            raise UserError.of(
                where=where,
                expected="workers that stay",
                found=str(error).splitlines()[0],
                remedy="Give the workers more memory, or do without them; the same command continues.",
            ) from error

    def everywhere(self, function: Callable[..., Any], *args: Any) -> None:
        """Call a function in every worker that is there; of those that are not nothing is asked."""
        with suppress(Exception):
            self.client.run(function, *args)

    def cancel(self, futures: Sequence[Any]) -> None:
        """Give up what is not done."""
        if futures:
            self.client.cancel(futures)


@contextmanager
def connect(scheduler: str) -> Iterator[Cluster]:
    """A connection to the scheduler at an address (`tcp://host:8786`), or workers of our own (`local`, `local:4`).

    Raises:
        UserError: dask is not installed, or there is no scheduler.
    """
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise _no_dask(error, "--scheduler") from error
    name, _, count = scheduler.partition(":")
    if name == LOCAL and (not count or count.isdecimal()):
        with (
            LocalCluster(n_workers=int(count) if count else None, threads_per_worker=1, dashboard_address=None) as own,
            Client(own) as client,
        ):
            yield Cluster(client)
        return
    try:
        client = Client(scheduler, timeout="20s")
    except (OSError, ValueError) as error:
        raise UserError.of(
            where="--scheduler",
            expected="the address of a Dask scheduler, such as tcp://host:8786, or `local`",
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
