"""The search: candidates of an engine go to workers, results to the log and back to the engine.

One worker is this process; several are processes under Dask. A failed trial is tried once more.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias
from uuid import uuid4

import torch

from intarsia.building.loaded_model import default_device
from intarsia.errors import UserError, missing_package
from intarsia.inspection.own_code import trust_remote_code, trusts
from intarsia.options import Runtime
from intarsia.progress import current
from intarsia.recipe.recipe import Recipe
from intarsia.recipe.schema import content_hash
from intarsia.registry import load_plugin
from intarsia.tailoring.candidate import Candidate
from intarsia.tailoring.engine import Ask, Engine, Task
from intarsia.tailoring.evaluator import Evaluator, Outcome
from intarsia.tailoring.family import open_family
from intarsia.tailoring.family_file import FamilyFile
from intarsia.tailoring.run import EARLIER, Front, History, Key, Trial, front_of, leading
from intarsia.tailoring.trial_run import TrialFailed

ATTEMPTS = 2
_LONGEST = 300  # characters of a reason
_DOOMED = 5  # a search stops when its first trials all fail
_REPEATS = 1000
_PATIENCE = 60  # seconds without a worker

Evaluate: TypeAlias = Callable[[Recipe, int], Outcome]
"""Returns the costs of a recipe at a budget, or raises TrialFailed."""


class Scorer(Protocol):
    """The evaluator of a worker, such as `Evaluator`."""

    def evaluate(self, recipe: Recipe, budget: int) -> Outcome:
        """Return the costs of a recipe at a budget, or raise TrialFailed."""

    def close(self) -> None:
        """Empty the caches."""


Opener: TypeAlias = Callable[[str], Scorer]
"""Opens a scorer in the worker process of that name; can be pickled."""


@dataclass(kw_only=True)
class Search:
    """A search and its state: which trials are asked for, running and done."""

    # A new engine for the task. A resumed search replays the log to it, with the trials of earlier searches, which
    # restores its state.
    engine: Engine
    task: Task
    history: History
    workers: Workers
    # Number of own trials that the log should have, and the engine's name in them.
    trials: int
    name: str
    recipe_of: Callable[[Candidate], Recipe]
    # Called with the Pareto front whenever a trial changes it.
    on_front: Callable[[Front], None] = lambda front: None
    # Called after every trial with the hashes of recipes that run or may be needed again.
    on_trial: Callable[[Set[str]], None] = lambda recipes: None
    # Running trials, each with the asks that it answers.
    _open: dict[Key, list[Ask]] = field(default_factory=dict, init=False)
    _stopped: str | None = field(default=None, init=False)
    # Numbers of the trials that the engine knows.
    _told: set[int] = field(default_factory=set, init=False)
    _repeats: int = field(default=0, init=False)

    def run(self) -> str | None:
        """Search until the log has the wanted number of trials; return None, or why the search stopped early."""
        if len(self.history.made) >= self.trials:
            return None
        self._tell(trial for trial in self.history if trial.engine == EARLIER)
        with current().task(f"{self.trials} trials", self.trials) as bar:
            bar.advance(len(self.history.made))
            bar.note(words(self.history.trials, self._front()))
            self._stop_if_doomed()
            self._fill()
            while self._open:
                trial = self._collect(self.workers.next())
                front = self._front()
                bar.note(words(self.history.trials, front))
                bar.advance()
                if front is not None and any(point is trial for point in front.points):
                    self.on_front(front)
                self.on_trial(leading(self.history) | {recipe for recipe, _ in self._open})
                self._stop_if_doomed()
                self._fill()
        return self._stopped

    def _fill(self) -> None:
        """Start a trial on each free worker."""
        while self._stopped is None and (free := self._free()) > 0:
            asks = self.engine.ask(free)
            if not asks:
                # A running trial may lead to new proposals.
                if not self._open:
                    self._stopped = "the engine found nothing new to try"
                return
            for ask in asks:
                self._take(ask)

    def _free(self) -> int:
        left = self.trials - len(self.history.made) - len(self._open)
        return min(self.workers.count - len(self._open), left)

    def _tell(self, trials: Iterable[Trial]) -> None:
        """Tell the engine the trials that it does not know yet."""
        for trial in trials:
            if trial.number not in self._told:
                self._told.add(trial.number)
                self.engine.tell(trial.candidate, trial.budget, trial.costs)

    def _take(self, ask: Ask) -> None:
        """Answer from the log, or start a trial."""
        recipe = self.recipe_of(ask.candidate)
        key = (content_hash(recipe), ask.budget)
        known = self.history.find(key)
        if known is not None:
            self._repeats += known.number in self._told
            self._told.add(known.number)
            self.engine.tell(ask.candidate, ask.budget, known.costs)
            if self._repeats >= _REPEATS:
                self._stopped = f"the engine proposed known candidates {_REPEATS} times"
        elif key in self._open:
            self._open[key].append(ask)
        else:
            # With several workers, the results in the log may be in another order than the engine asks now.
            self._tell(self.history)
            self._repeats = 0
            self._open[key] = [ask]
            self.workers.submit(key, recipe, ask.budget)

    def _collect(self, done: Done) -> Trial:
        """Take a finished trial: log it, then tell the engine."""
        asks, (recipe, budget) = self._open.pop(done.key), done.key
        found: dict[str, Any] = {"reason": done.reason}
        if done.outcome is not None:
            found = {name: getattr(done.outcome, name) for name in ("costs", "examples", "layer_forwards", "seconds")}
        trial = Trial(
            number=len(self.history),
            engine=self.name,
            origin=asks[0].origin,
            candidate=asks[0].candidate,
            recipe=recipe,
            budget=budget,
            seed=self.task.seed,
            status="failed" if done.outcome is None else "ok",
            worker=done.worker,
            attempts=done.attempts,
            **found,
        )
        self.history.append(trial)
        self._told.add(trial.number)
        for ask in asks:
            self.engine.tell(ask.candidate, budget, trial.costs)
        return trial

    def _front(self) -> Front | None:
        return front_of(self.history, self.task.objectives, max_budget=self.task.budgets[-1])

    def _stop_if_doomed(self) -> None:
        """Stop if all of the first trials failed.

        Raises:
            UserError: with the reasons why the trials failed.
        """
        trials = self.history.made
        if len(trials) < min(_DOOMED, self.trials) or any(trial.status == "ok" for trial in trials):
            return
        reasons = list(dict.fromkeys(str(trial.reason) for trial in trials))
        raise UserError(
            f"The first {len(trials)} trials in {self.history.path} all failed: {'; '.join(reasons)}.",
            "Remove the cause and search into another folder: with --dtype float32 where numbers overflow, with fewer "
            "--workers or a smaller max_budget where memory is short.",
        )


def words(trials: Sequence[Trial], front: Front | None) -> str:
    """The progress of a search in words: the best of each objective at the greatest budget so far, and the front."""
    if front is None:
        return "no score yet"
    costs = zip(*(point.costs or () for point in front.points), strict=True)
    best = ", ".join(f"{name} {min(column):.4g}" for name, column in zip(front.objectives, costs, strict=True))
    failed = sum(trial.status == "failed" for trial in trials)
    return f"best {best}; front {len(front.points)} at budget {front.budget}" + (f"; {failed} failed" * (failed > 0))


# Workers


@dataclass(frozen=True, kw_only=True)
class Done:
    """A finished trial: its outcome, or why it failed."""

    key: Key
    outcome: Outcome | None
    reason: str | None
    attempts: int
    worker: str


def scored(evaluate: Evaluate, key: Key, recipe: Recipe, budget: int, *, worker: str) -> Done:
    """Run a trial, twice if it fails; return its outcome, or why it failed.

    Raises:
        UserError: for a problem that all trials share.
    """
    reason = ""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return Done(key=key, outcome=evaluate(recipe, budget), reason=None, attempts=attempt, worker=worker)
        except TrialFailed as failure:
            reason = failure.reason
        except UserError:
            raise
        except Exception as error:
            # A candidate may cause any error in a library: the search continues, and stops if all of the first trials
            # fail.
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Done(key=key, outcome=None, reason=reason[:_LONGEST], attempts=ATTEMPTS, worker=worker)


class InProcess:
    """One worker, this process: `submit` keeps a trial, and `next` runs it."""

    count = 1

    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate
        self._waiting: list[tuple[Key, Recipe, int]] = []

    def submit(self, key: Key, recipe: Recipe, budget: int) -> None:
        """Keep a trial."""
        self._waiting.append((key, recipe, budget))

    def next(self) -> Done:
        """Run it."""
        return scored(self._evaluate, *self._waiting.pop(0), worker="0")


class OnDask:
    """Workers of a Dask client."""

    def __init__(self, client: Any, opener: Opener, count: int) -> None:
        self.count = count
        self._client, self._opener, self._search = client, opener, uuid4().hex
        self._open: dict[Any, Key] = {}

    def submit(self, key: Key, recipe: Recipe, budget: int) -> None:
        """Submit a trial to Dask."""
        work = (_score_here, self._search, self._opener, key, recipe, budget)
        self._open[self._client.submit(*work, pure=False)] = key

    def next(self) -> Done:
        """Wait for a finished trial; of several, take the one submitted first.

        Raises:
            UserError: there was no worker for a minute.
        """
        from distributed import KilledWorker, wait
        from distributed import TimeoutError as NotYet

        idle = 0
        while not (finished := [future for future in self._open if future.done()]):
            try:
                wait(list(self._open), timeout=1, return_when="FIRST_COMPLETED")
            except NotYet as error:
                idle = 0 if self._client.nthreads() else idle + 1
                if idle >= _PATIENCE:
                    raise UserError(
                        f"There was no worker for {_PATIENCE} seconds.",
                        "Start workers (dask worker ADDRESS); the same command resumes.",
                    ) from error
        future = finished[0]
        key = self._open.pop(future)
        try:
            done: Done = future.result()
        except KilledWorker:
            reason = "every worker that tried it died"
            return Done(key=key, outcome=None, reason=reason, attempts=ATTEMPTS, worker="lost")
        return done

    def cancel(self) -> None:
        """Cancel running trials."""
        self._client.cancel(list(self._open))


Workers: TypeAlias = InProcess | OnDask
"""Workers that run at most `count` trials at once."""

_OPENED: dict[str, Scorer] = {}
"""The scorer of this worker process, for its last search."""


def _score_here(search: str, opener: Opener, key: Key, recipe: Recipe, budget: int) -> Done:
    """Score a trial in a worker process."""
    from distributed import get_worker

    worker = str(get_worker().name)
    if search not in _OPENED:
        for old in _OPENED.values():
            old.close()
        _OPENED.clear()
        _OPENED[search] = opener(worker)
    return scored(_OPENED[search].evaluate, key, recipe, budget, worker=worker)


@dataclass(frozen=True, kw_only=True)
class OpenScorer:
    """Opens the family in a worker process. Paths are absolute, because the worker may run in another folder."""

    file: FamilyFile
    runtime: Runtime
    # The folder of healed recipes.
    fits: Path | None = None
    # Files that register the user's merge operators.
    plugins: tuple[str, ...] = ()
    # Whether models' own code may run.
    trust_remote_code: bool = False
    # Whether worker N takes GPU N; an external scheduler may have assigned GPUs already.
    numbered: bool = False

    def __call__(self, worker: str) -> Evaluator:
        """A scorer, on its own GPU if there are several and workers are numbered."""
        for plugin in self.plugins:
            load_plugin(plugin)
        if self.trust_remote_code and not trusts():
            trust_remote_code().__enter__()  # for as long as the process lives
        runtime = self.runtime
        device = default_device() if runtime.device is None else torch.device(runtime.device)
        if device.type == "cuda" and ":" not in str(device) and self.numbered:
            runtime = replace(runtime, device=f"cuda:{int(worker) % torch.cuda.device_count()}")
        return Evaluator(open_family(self.file.members), self.file, runtime, probe=False, fits=self.fits)


@contextmanager
def open_workers(
    opener: OpenScorer, evaluator: Evaluator, *, scheduler: str | None, count: int | None
) -> Iterator[Workers]:
    """The only worker is this process; for several, close the evaluator, and let each worker open its own."""
    if scheduler is None and (count or 1) == 1:
        yield InProcess(evaluator.evaluate)
        return
    evaluator.close()
    opener, memory = replace(opener, numbered=scheduler is None), opener.runtime.memory_bytes
    if scheduler is None and count is not None and memory is not None:
        opener = replace(opener, runtime=replace(opener.runtime, memory=str(memory // count)))
    with dask_workers(opener, scheduler=scheduler, count=count) as workers:
        yield workers


@contextmanager
def dask_workers(opener: Opener, *, scheduler: str | None, count: int | None) -> Iterator[OnDask]:
    """Workers of an existing scheduler (`tcp://host:8786`), or `count` new processes on this machine."""
    with _own_workers(count or 1) if scheduler is None else _connected(scheduler) as client:
        if scheduler is not None:
            there = max(sum(client.nthreads().values()), 1)
            count = min(count or there, there)
        workers = OnDask(client, opener, count or 1)
        try:
            yield workers
        finally:
            workers.cancel()


def check_scheduler(scheduler: str) -> None:
    """Check that there is a scheduler with workers."""
    with _connected(scheduler):
        pass


@contextmanager
def _connected(scheduler: str) -> Iterator[Any]:
    """A client of the scheduler at an address, once it has workers."""
    distributed = _distributed("--scheduler")
    try:
        client = distributed.Client(scheduler, timeout="20s")
    except (OSError, ValueError) as error:
        raise UserError(
            f"--scheduler {scheduler} is not a reachable Dask scheduler (such as tcp://host:8786): {error}.",
            "Start one with `dask scheduler`, and workers with `dask worker ADDRESS`.",
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=30)
        except distributed.TimeoutError as error:
            raise UserError(
                f"The scheduler at {scheduler} has no worker within 30 seconds.",
                f"Start workers: dask worker {scheduler}",
            ) from error
        yield client


@contextmanager
def _own_workers(count: int) -> Iterator[Any]:
    """A client of `count` processes on this machine, each with its share of this process's cores."""
    distributed = _distributed("--workers")
    import dask

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    settings = {
        # Workers that a task may kill before it fails.
        "distributed.scheduler.allowed-failures": ATTEMPTS - 1,
        # Set before torch is loaded.
        "distributed.nanny.pre-spawn-environ": dict.fromkeys(names, str(max(cores // count, 1))),
    }
    # No memory limit: Dask would count the weights mapped from files against it.
    cluster = {"n_workers": count, "threads_per_worker": 1, "dashboard_address": None, "memory_limit": 0}
    with (
        dask.config.set(settings),
        distributed.LocalCluster(**cluster, silence_logs=logging.CRITICAL) as own,
        distributed.Client(own) as client,
    ):
        yield client


def _distributed(option: str) -> Any:
    try:
        import distributed
    except ImportError as error:
        instead = f"leave {option} out"
        raise missing_package(
            "dask[distributed]", where=option, extra="search", instead=instead, error=error
        ) from error
    return distributed
