"""Dask workers that train layers: an existing scheduler, or workers of our own on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from intarsia.errors import UserError

LOCAL = "local"


class Cluster:
    """What is needed of a `distributed.Client`."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        """Start a task; gives its future."""
        # A key of its own: Dask must not take two trainings for the same because their arguments look alike. A task
        # keeps state, so the worker that is lost may be replaced, but a task that fails is not tried again.
        return self.client.submit(function, *args, key=f"intarsia-{uuid4().hex}", pure=False, retries=0)

    def as_completed(self, futures: Sequence[Any]) -> Iterable[Any]:
        """The futures, each when it is done."""
        from distributed import as_completed

        return as_completed(futures)

    def result(self, future: Any, where: str) -> Any:
        """What a task gave.

        Raises:
            UserError: the task met one, or its workers were lost.
        """
        from distributed import KilledWorker

        try:
            return future.result()
        except KilledWorker as error:
            raise UserError.of(
                where=where,
                expected="workers that stay",
                found=str(error).splitlines()[0],
                remedy="Give the workers more memory, or train without --scheduler; the same command continues.",
            ) from error

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
        raise UserError.of(
            where="--scheduler",
            expected="the package dask[distributed]",
            found="it is not installed",
            remedy="Install it (pip install 'intarsia[search]'), or leave --scheduler out.",
        ) from error
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
