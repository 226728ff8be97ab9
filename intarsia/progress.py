"""How long work says where it is, whoever is listening.

    with progress.current().task("Score layers", total=30) as task:
        task.advance()

Tasks nest, and an inner task moves the outer one on by parts of a unit, so that one bar shows the whole job with the
part that is under way and a smoothed time left. A library call is silent; the command line shows a bar on a
terminal, and a line now and then elsewhere.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Protocol, TextIO

LINE_EVERY_SECONDS = 30.0


class Task(Protocol):
    """One piece of long work that is under way."""

    def advance(self, n: float = 1.0) -> None:
        """`n` more of the task's total is done."""

    def note(self, text: str) -> None:
        """A few words on what is happening now, shown beside the bar; they replace the words before."""


class Progress(Protocol):
    """Where long work reports to."""

    def task(self, title: str, total: float) -> AbstractContextManager[Task]:
        """Start a task of `total` units; leaving the context ends it. Tasks may nest."""

    def say(self, text: str) -> None:
        """A line for the user that stays."""


class SilentTask:
    """A task that nobody watches."""

    def advance(self, n: float = 1.0) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


class Silent:
    """Progress that nobody watches: the default of every library call."""

    def task(self, title: str, total: float) -> AbstractContextManager[Task]:
        """A task that shows nothing."""
        return nullcontext(SilentTask())

    def say(self, text: str) -> None:
        """Nothing."""


_CURRENT: ContextVar[Progress] = ContextVar("progress", default=Silent())  # noqa: B039  (it has no state)


def current() -> Progress:
    """Where the work of this context reports to."""
    return _CURRENT.get()


@contextmanager
def reporting_to(progress: Progress) -> Iterator[Progress]:
    """Let the work inside report to `progress`."""
    token = _CURRENT.set(progress)
    try:
        yield progress
    finally:
        _CURRENT.reset(token)


def shown(*, quiet: bool = False, stream: TextIO | None = None) -> AbstractContextManager[Progress]:
    """Show the work inside as suits where stderr goes; not at all if `quiet`."""
    return reporting_to(Silent() if quiet else Job(stream or sys.stderr))


class Pace:
    """How fast a task goes, so how long it still takes.

    The rate is that of the last two minutes, or of the last eight advances where those took longer: work that was
    taken over from an earlier run, or a stage of another speed, then does not mislead for long.
    """

    WINDOW_SECONDS = 120.0
    WINDOW_ADVANCES = 8

    def __init__(self, total: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self.done = 0.0
        self._clock = clock
        self.started = clock()
        self._marks: deque[tuple[float, float]] = deque([(self.started, 0.0)])

    def reach(self, done: float) -> None:
        """So much is done; never less than before."""
        now = self._clock()
        self.done = max(self.done, done)
        self._marks.append((now, self.done))
        while len(self._marks) > self.WINDOW_ADVANCES and now - self._marks[0][0] > self.WINDOW_SECONDS:
            self._marks.popleft()

    @property
    def elapsed(self) -> float:
        """Seconds since the task started."""
        return self._clock() - self.started

    @property
    def share(self) -> float:
        """The part that is done, 0 to 1."""
        return min(1.0, self.done / self.total) if self.total > 0 else 1.0

    @property
    def left(self) -> float | None:
        """Seconds that the rest takes; None where nothing is known yet."""
        then, done_then = self._marks[0]
        seconds, done = self._clock() - then, self.done - done_then
        if done <= 0 or seconds <= 0:
            return None
        return max(0.0, self.total - self.done) * seconds / done


def duration(seconds: float) -> str:
    """Seconds as a person says them: `8 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class _Part:
    """A task of a job; while one inside it runs, that one's share counts as a part of one unit."""

    def __init__(self, job: Job, title: str, total: float) -> None:
        self.title, self.total, self.words = title, total, ""
        self.done = 0.0
        self._job = job

    def advance(self, n: float = 1.0) -> None:
        self.done += n
        self._job.moved()

    def note(self, text: str) -> None:
        self.words = text
        self._job.moved()


class Job:
    """One bar for all tasks on a terminal; elsewhere at most a line every half minute, with no control characters."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console

        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._stream, self._clock = stream, clock
        self._parts: list[_Part] = []
        self._pace = Pace(0.0, clock)
        self._written = clock()
        self._bar = _Bar(self._console) if self._console.is_terminal and not self._console.is_dumb_terminal else None

    @contextmanager
    def task(self, title: str, total: float) -> Iterator[_Part]:
        """A task; see `Progress`."""
        part = _Part(self, title, total)
        if not self._parts:
            self._pace, self._written = Pace(total, self._clock), self._clock()
        self._parts.append(part)
        self.moved()
        try:
            yield part
        finally:
            self._parts.remove(part)
            if not self._parts and self._bar is not None:
                self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._console.print(text, markup=False)
        else:
            print(text, file=self._stream, flush=True)

    def moved(self) -> None:
        """Show where the job is now."""
        if not self._parts:
            return
        share = 0.0
        for part in reversed(self._parts):
            share = min(1.0, (part.done + share) / part.total) if part.total > 0 else 0.0
        self._pace.reach(share * self._pace.total)
        if self._bar is not None:
            self._bar.update(self._pace.share, self._words(), self._rest())
        elif self._clock() - self._written >= LINE_EVERY_SECONDS:
            self._written = self._clock()
            self.say(f"{self._words()}: {self._rest()}")

    def _words(self) -> str:
        titles = [part.title for part in self._parts]
        note = next((part.words for part in reversed(self._parts) if part.words), "")
        names = titles[0] if len(titles) == 1 else f"{titles[0]}, {titles[-1]}"
        return f"{names} ({note})" if note else names

    def _rest(self) -> str:
        left = self._pace.left
        rest = "" if left is None or self._pace.share >= 1 else f", {duration(left)} left"
        return f"{self._pace.share:.0%} after {duration(self._pace.elapsed)}{rest}"


class _Bar:
    """One line of a terminal."""

    def __init__(self, console: object) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(24), TextColumn("{task.fields[rest]}"))
        self._bars = Progress(*columns, console=console, redirect_stdout=False, transient=True)  # type: ignore[arg-type]
        self._id = self._bars.add_task("", total=1.0, rest="")

    def update(self, share: float, words: str, rest: str) -> None:
        """Show this share, started if it is not."""
        if not self._bars.live.is_started:
            self._bars.start()
        self._bars.update(self._id, completed=share, description=words, rest=rest)

    def stop(self) -> None:
        """Put the bar away."""
        self._bars.stop()
