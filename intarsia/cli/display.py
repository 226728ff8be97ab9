"""Progress for a person: bars on a terminal, an occasional plain line elsewhere; always on stderr.

A bar shows how far the work is, the time it took so far, the time that is left and a note. Where stderr is no
terminal (a log file, a CI job) a task says that it starts, at most every half minute where it is, and that it is
done, with no control characters.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TaskID
from rich.progress import Progress as RichProgress
from rich.progress import Task as RichTask
from rich.text import Text

from intarsia.progress import Progress, Silent

LINE_EVERY_SECONDS = 30.0


def display(*, quiet: bool = False, stream: TextIO | None = None) -> Progress:
    """The progress display that suits where stderr goes; nothing at all when `quiet`."""
    stream = stream or sys.stderr
    if quiet:
        return Silent()
    console = Console(file=stream)
    return Bars(console) if console.is_terminal and not console.is_dumb_terminal else Lines(stream)


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

    def advance(self, n: float) -> None:
        """`n` more units are done."""
        now = self._clock()
        self.done += n
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


class _Times(ProgressColumn):
    """Per cent done, elapsed and left, from the task's own `Pace`."""

    def render(self, task: RichTask) -> Text:
        pace: Pace = task.fields["pace"]
        if task.finished or task.fields["ended"] is not None:
            elapsed = pace.elapsed if task.fields["ended"] is None else task.fields["ended"]
            return Text(f"{pace.share:4.0%}  {duration(elapsed)}", style="green")
        left = pace.left
        rest = "" if left is None else f", {duration(left)} left"
        return Text(f"{pace.share:4.0%}  {duration(pace.elapsed)}{rest}", style="cyan")


class _Words(ProgressColumn):
    """A text of the task; never read as markup."""

    def __init__(self, field: str, style: str) -> None:
        super().__init__()
        self._field, self._style = field, style

    def render(self, task: RichTask) -> Text:
        return Text(str(task.fields[self._field]), style=self._style, no_wrap=True, overflow="ellipsis")


class _BarTask:
    """A task shown as a bar."""

    def __init__(self, bars: RichProgress, title: str, total: float) -> None:
        self._bars = bars
        self._pace = Pace(total)
        self.id: TaskID = bars.add_task(
            "", total=total if total > 0 else None, title=title, words="", pace=self._pace, ended=None
        )

    def advance(self, n: float = 1.0) -> None:
        self._pace.advance(n)
        self._bars.update(self.id, advance=n)

    def note(self, text: str) -> None:
        self._bars.update(self.id, words=text)

    def end(self) -> None:
        """The clock stops."""
        self._bars.update(self.id, words="", ended=self._pace.elapsed)


class Bars:
    """Bars on a terminal. A task inside another has its bar below, and takes it away when it is done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: RichProgress | None = None

    @contextmanager
    def task(self, title: str, total: float) -> Iterator[_BarTask]:
        """A task with a bar; see `intarsia.progress.Progress`."""
        outermost = self._bars is None
        if self._bars is None:
            self._bars = RichProgress(
                _Words("title", "bold"),
                BarColumn(24),
                _Times(),
                _Words("words", "dim"),
                console=self._console,
                redirect_stdout=False,
            )
            self._bars.start()
        bars = self._bars
        task = _BarTask(bars, title, total)
        try:
            yield task
        finally:
            task.end()
            if outermost:
                bars.stop()
                self._bars = None
            else:
                bars.remove_task(task.id)

    def say(self, text: str) -> None:
        """A line above the bars."""
        self._console.print(Text(text))


class _LineTask:
    """A task told in plain lines."""

    def __init__(
        self, write: Callable[[str], None], title: str, total: float, clock: Callable[[], float], *, inner: bool
    ) -> None:
        self._write, self._title, self._clock = write, title, clock
        self._pace = Pace(total, clock)
        self._words = ""
        self._told = clock()
        # A task inside another speaks up only when it turns out to be long.
        self._spoke = not inner
        if self._spoke:
            write(f"{title} ...")

    def advance(self, n: float = 1.0) -> None:
        self._pace.advance(n)
        if self._clock() - self._told >= LINE_EVERY_SECONDS:
            self._told, self._spoke = self._clock(), True
            left = self._pace.left
            rest = "" if left is None else f", {duration(left)} left"
            words = f" ({self._words})" if self._words else ""
            self._write(f"{self._title}: {self._pace.share:.0%} after {duration(self._pace.elapsed)}{rest}{words}")

    def note(self, text: str) -> None:
        self._words = text

    def end(self, *, whole: bool) -> None:
        """The last line: done, or given up."""
        state = "done in" if whole else f"stopped at {self._pace.share:.0%} after"
        if self._spoke:
            self._write(f"{self._title}: {state} {duration(self._pace.elapsed)}")


class Lines:
    """Plain lines for logs: the start and the end of a task, and at most a line every half minute between."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._depth = 0

    @contextmanager
    def task(self, title: str, total: float) -> Iterator[_LineTask]:
        """A task told in lines; see `intarsia.progress.Progress`."""
        task = _LineTask(self.say, title, total, self._clock, inner=self._depth > 0)
        self._depth += 1
        whole = False
        try:
            yield task
            whole = True
        finally:
            self._depth -= 1
            task.end(whole=whole)

    def say(self, text: str) -> None:
        """One line, written at once."""
        print(text, file=self._stream, flush=True)
