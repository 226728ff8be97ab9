"""Progress as a person sees it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from intarsia.cli.display import Bars, Lines, Pace, display, duration
from intarsia.progress import Silent


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_pace_of_steady_work() -> None:
    clock = Clock()
    pace = Pace(10, clock)
    assert pace.left is None
    for _ in range(4):
        clock.now += 5
        pace.advance(1)
    assert pace.elapsed == 20
    assert pace.share == 0.4
    assert pace.left == pytest.approx(30)


def test_pace_forgets_what_was_taken_over_from_an_earlier_run() -> None:
    clock = Clock()
    pace = Pace(120, clock)
    clock.now += 0.1
    pace.advance(100)
    for _ in range(10):
        clock.now += 60
        pace.advance(1)
    assert pace.left == pytest.approx(10 * 60)


def test_pace_of_work_that_stalls_grows() -> None:
    clock = Clock()
    pace = Pace(2, clock)
    clock.now += 10
    pace.advance(1)
    before = pace.left
    clock.now += 10
    assert before == pytest.approx(10)
    assert pace.left == pytest.approx(20)


def test_pace_of_nothing_to_do() -> None:
    pace = Pace(0)
    assert pace.share == 1.0
    assert pace.left is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.9, "1 h 0 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_lines_are_few_and_say_what_is_left() -> None:
    clock, stream = Clock(), io.StringIO()
    with Lines(stream, clock).task("planning", 100) as task:
        task.note("step 3 of 5")
        for _ in range(80):
            clock.now += 1
            task.advance(1)
    assert stream.getvalue().splitlines() == [
        "planning ...",
        "planning: 30% after 30 s, 1 min 10 s left (step 3 of 5)",
        "planning: 60% after 1 min 0 s, 40 s left (step 3 of 5)",
        "planning: done in 1 min 20 s",
    ]


def test_a_short_task_inside_another_says_nothing() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = Lines(stream, clock)
    with lines.task("outer", 1):
        with lines.task("inner", 1) as inner:
            inner.advance()
        with lines.task("long", 2) as inner:
            clock.now += 31
            inner.advance()
    assert stream.getvalue().splitlines() == [
        "outer ...",
        "long: 50% after 31 s, 31 s left",
        "long: done in 31 s",
        "outer: done in 31 s",
    ]


def test_a_task_that_fails_is_not_done() -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Lines(stream, Clock()).task("work", 4) as task:
        task.advance()
        raise RuntimeError
    assert stream.getvalue().splitlines()[-1] == "work: stopped at 25% after 0 s"


def test_bars_on_a_terminal() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, force_interactive=True)
    bars = Bars(console)
    with bars.task("planning [x]", 4) as outer:
        outer.note("step [1]")
        outer.advance(2)
        with bars.task("inner", 0) as inner:
            inner.advance()
        bars.say("a line [/] with brackets")
        outer.advance(2)
    shown = stream.getvalue()
    assert "planning [x]" in shown
    assert "100%" in shown
    assert "a line [/] with brackets" in shown
    with bars.task("again", 1) as task:
        task.advance()
    assert "again" in stream.getvalue()


def test_bars_are_put_away_when_work_fails() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    bars = Bars(console)
    with pytest.raises(RuntimeError), bars.task("a", 1), bars.task("b", 1):
        raise RuntimeError
    with bars.task("c", 1):
        pass


def test_display_suits_the_stream() -> None:
    assert isinstance(display(quiet=True), Silent)
    assert isinstance(display(stream=io.StringIO()), Lines)


def test_silent_accepts_everything(capsys: pytest.CaptureFixture[str]) -> None:
    silent = Silent()
    with silent.task("work", 3) as task:
        task.advance()
        task.note("words")
    silent.say("nothing")
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
