"""Progress display and log lines of long work.

    with progress.current().task("Score layers", total=30) as task:
        task.advance()

Tasks nest: an inner task advances the outer one by a part of a unit, so that one bar shows the whole job. A command
with parts of different cost is a job:

    with progress.job({"text": 3, "planning": 12, "evaluation": 5}) as job:
        with job.part("planning"):
            ...

Library calls are silent; the command line shows a bar on a terminal, and a line every half minute elsewhere.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, TextIO

LINE_EVERY_SECONDS = 30.0


class Task:
    """A running task; this base class shows nothing."""

    def advance(self, n: float = 1.0) -> None:
        """Count `n` more units as done."""

    def note(self, text: str) -> None:
        """Show a few words on the current step beside the bar, replacing the last ones."""


class Progress:
    """Receives the reports of long work; this base class shows nothing, and is the default of library calls."""

    def task(self, title: str, total: float, *, units: float | None = None) -> AbstractContextManager[Task]:
        """Start a task of `total` units; leaving the context ends it.

        Args:
            units: what it counts of the enclosing task, by which that advances at the end. None: it is a part of the
                enclosing task's next unit, whose end that task reports itself.
        """
        return nullcontext(Task())

    def say(self, text: str) -> None:
        """Write a log line."""


_CURRENT: ContextVar[Progress] = ContextVar("progress", default=Progress())  # noqa: B039  (it has no state)


def current() -> Progress:
    """The progress of the current context."""
    return _CURRENT.get()


@contextmanager
def reporting_to(progress: Progress) -> Iterator[Progress]:
    """Report the work inside to `progress`."""
    token = _CURRENT.set(progress)
    try:
        yield progress
    finally:
        _CURRENT.reset(token)


def shown(*, quiet: bool = False, stream: TextIO | None = None) -> AbstractContextManager[Progress]:
    """Show the work inside in a form that suits stderr; nothing if `quiet`."""
    return reporting_to(Progress() if quiet else Display(stream or sys.stderr))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence bars and warnings of transformers, which ours replace."""
    from transformers.utils import logging as module

    logging: Any = module  # it has no annotations
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def without_bars(module: str) -> Iterator[None]:
    """Hide the tqdm bars of another package's module that has no switch for them."""
    imported: Any = importlib.import_module(module)
    bar = getattr(imported, "tqdm", None)
    imported.tqdm = bar and partial(bar, disable=True)
    try:
        yield
    finally:
        imported.tqdm = bar


class Job:
    """A job of named parts in a fixed order; a part may be skipped or entered again."""

    def __init__(self, weights: Mapping[str, float], task: Task, clock: Callable[[], float] = time.monotonic) -> None:
        # Estimated cost of each part, in passes over the text.
        self.weights = dict(weights)
        # Seconds of each part, in the order of first entry.
        self.seconds: dict[str, float] = {}
        self._task, self._clock = task, clock
        self._left = dict(weights)

    @contextmanager
    def part(self, name: str, total: float = 1.0) -> Iterator[Task]:
        """Work on a part of `total` tasks; skipped parts before it count as done."""
        for earlier in list(self.weights)[: list(self.weights).index(name)]:
            self._task.advance(self._left.pop(earlier, 0.0))
        units, started = self._left.pop(name, 0.0), self._clock()
        try:
            with current().task(name, total, units=units) as task:
                yield task
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - started


@contextmanager
def job(weights: Mapping[str, float]) -> Iterator[Job]:
    """One job with one bar: its parts in order, with the estimated passes of each."""
    with current().task("", sum(weights.values())) as task:
        yield Job(weights, task)


class Pace:
    """The rate of a task, and the estimated time left.

    The rate is that of the last two minutes, or of the last third of the task if that is longer. Work of an earlier
    run takes no time, and does not count. The time left is shown only after three seconds, and moves toward a new
    estimate by at most a factor of two in half a minute.
    """

    WINDOW_SECONDS, WINDOW_SHARE = 120.0, 1 / 3
    MARKS, MARK_SECONDS = 3, 1.0
    RESUMED = 4.0  # a step this many times faster than the median was done before
    HALVES_IN_SECONDS = 30.0

    def __init__(self, total: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done, self._clock = total, 0.0, clock
        self.started = clock()
        # Seconds and units between advances, in pieces of at least a second.
        self._marks: deque[tuple[float, float]] = deque()
        self._last = (self.started, 0.0)
        # When the time left was last shown, and its value.
        self._shown: tuple[float, float] | None = None

    def reach(self, done: float) -> None:
        """Record that `done` units are done; it never falls."""
        now, (then, done_then) = self._clock(), self._last
        self.done = max(self.done, done)
        if self.done > done_then and now - then >= self.MARK_SECONDS:
            self._marks.append((now - then, self.done - done_then))
            self._last = (now, self.done)
        window = max(self.WINDOW_SECONDS, self.WINDOW_SHARE * (now - self.started))
        while len(self._marks) > self.MARKS and sum(seconds for seconds, _ in self._marks) > window:
            self._marks.popleft()

    @property
    def elapsed(self) -> float:
        """Seconds since the task started."""
        return self._clock() - self.started

    @property
    def share(self) -> float:
        """The finished share, from 0 to 1."""
        return min(1.0, self.done / self.total) if self.total > 0 else 1.0

    def left(self) -> float | None:
        """Seconds left, as shown; None if too little is known yet."""
        if len(self._marks) < self.MARKS:
            return None
        now = self._clock()
        usual = statistics.median(done / seconds for seconds, done in self._marks)
        marks = [(seconds, done) for seconds, done in self._marks if done <= self.RESUMED * usual * seconds]
        # A step that takes longer than any before lowers the rate.
        waited = now - self._last[0]
        seconds, done = sum(mark[0] for mark in marks), sum(mark[1] for mark in marks)
        late = max(0.0, waited - max(mark[0] for mark in marks))
        left = max(0.0, self.total - self.done) * (seconds + late) / done
        if self._shown is not None:
            then, before = self._shown
            most = 2 ** ((now - then) / self.HALVES_IN_SECONDS)
            left = min(max(left, (before - (now - then)) / most), max(1.0, before) * most)
        self._shown = (now, left)
        return left


def duration(seconds: float) -> str:
    """Seconds in words: `8 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class _Shown(Task):
    """A task on the display; its whole counts as `units` of the enclosing task."""

    def __init__(self, display: Display, title: str, total: float, units: float) -> None:
        self.title, self.total, self.units, self.words = title, total, units, ""
        self.done = 0.0
        self._display = display

    def advance(self, n: float = 1.0) -> None:
        self.done += n
        self._display.moved()

    def note(self, text: str) -> None:
        self.words = text
        self._display.moved()


class Display(Progress):
    """One bar for all tasks on a terminal; elsewhere at most a line every half minute, without control characters."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._stream, self._clock = stream, clock
        self._tasks: list[_Shown] = []
        self._last = ""  # the last title
        self._pace = Pace(0.0, clock)
        self._written = clock()
        self._bar: Bars | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(24), TextColumn("{task.fields[rest]}"))
            self._bar = Bars(*columns, console=self._console, redirect_stdout=False, transient=True)
            self._line = self._bar.add_task("", total=1.0, rest="")

    @contextmanager
    def task(self, title: str, total: float, *, units: float | None = None) -> Iterator[_Shown]:
        task = _Shown(self, title, total, 1.0 if units is None else units)
        self._last = title or self._last
        if not self._tasks:
            self._pace, self._written = Pace(total, self._clock), self._clock()
        self._tasks.append(task)
        self.moved()
        try:
            yield task
        finally:
            self._tasks.remove(task)
            if self._tasks and units is not None:
                self._tasks[-1].advance(units)
            elif not self._tasks and self._bar is not None:
                self._bar.stop()

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._console.print(text, markup=False)
        else:
            print(text, file=self._stream, flush=True)

    def moved(self) -> None:
        """Show the current state of the job."""
        if not self._tasks:
            return
        inner = 0.0  # finished units of the inner task
        for task in reversed(self._tasks):
            share = min(1.0, (task.done + inner) / task.total) if task.total > 0 else 0.0
            inner = share * task.units
        self._pace.reach(share * self._pace.total)
        if self._bar is not None:
            self._bar.start()
            self._bar.update(self._line, completed=self._pace.share, description=self._words(), rest=self._rest())
        elif self._clock() - self._written >= LINE_EVERY_SECONDS:
            self._written = self._clock()
            self.say(f"{self._words()}: {self._rest()}")

    def _words(self) -> str:
        titles = [task.title for task in self._tasks if task.title] or [self._last]
        note = next((task.words for task in reversed(self._tasks) if task.words), "")
        names = ", ".join(dict.fromkeys([*titles[:1], *titles[-1:]]))
        return f"{names} ({note})" if note else names

    def _rest(self) -> str:
        left = self._pace.left()
        rest = "" if left is None or self._pace.share >= 1 else f", {duration(left)} left"
        return f"{self._pace.share:.0%} after {duration(self._pace.elapsed)}{rest}"
