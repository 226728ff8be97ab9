"""Progress as a person sees it."""

from __future__ import annotations

import io
import itertools

import pytest

from intarsia import progress
from intarsia.progress import Display, Pace, Progress, duration


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_pace_of_steady_work() -> None:
    clock = Clock()
    pace = Pace(10, clock)
    assert pace.left() is None
    for done in range(1, 5):
        clock.now += 5
        pace.reach(done)
    assert (pace.elapsed, pace.share) == (20, 0.4)
    assert pace.left() == pytest.approx(30)
    pace.reach(2)
    assert pace.share == 0.4  # never back


def test_pace_does_not_count_what_was_taken_over_from_an_earlier_run() -> None:
    clock = Clock()
    pace = Pace(120, clock)
    clock.now += 1.5
    pace.reach(100)
    for done in range(101, 111):
        clock.now += 60
        pace.reach(done)
    assert pace.left() == pytest.approx(10 * 60)


def test_pace_of_work_that_stalls_grows() -> None:
    clock = Clock()
    pace = Pace(6, clock)
    for done in range(1, 4):
        clock.now += 10
        pace.reach(done)
    assert pace.left() == pytest.approx(30)
    clock.now += 40  # half a minute late
    assert pace.left() == pytest.approx(60)


@pytest.mark.parametrize("slower", [0.2, 1.0, 5.0])
def test_the_time_left_of_a_job_does_not_jump(slower: float) -> None:
    """Neither where the weights of the parts are wrong, nor where a step stalls."""
    clock = Clock()
    pace, shown = Pace(60, clock), []
    for unit in range(600):
        clock.now += (1 if unit < 200 else slower) * (30 if unit % 97 == 0 else 1)
        pace.reach((unit + 1) / 10)
        shown.append((clock.now, pace.left()))
    lines = [(now, left) for now, left in shown if left is not None]
    for (then, before), (now, after) in itertools.pairwise(lines):
        assert (before - (now - then)) / 3 < after < 3 * max(30, before)


def test_pace_of_nothing_to_do() -> None:
    assert Pace(0).share == 1.0


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")]
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_job_in_a_pipe_says_a_line_every_half_minute() -> None:
    clock, out = Clock(), io.StringIO()
    job = Display(out, clock)
    with job.task("Plan", 4) as plan:
        plan.advance()
        assert out.getvalue() == ""
        with job.task("Score layers", 10) as inner:
            for _ in range(5):
                clock.now += 10
                inner.advance()
            inner.note("layer 5")
        job.say("a line")
    # 1 of 4 steps, which took no time, and 3 tenths of the second.
    assert out.getvalue().splitlines() == ["Plan, Score layers: 32% after 30 s, 4 min 30 s left", "a line"]


def test_between_two_tasks_the_last_one_is_named() -> None:
    clock, out = Clock(), io.StringIO()
    job = Display(out, clock)
    with job.task("", 4) as whole:
        with job.task("embedding", 1) as inner:
            inner.advance()
        clock.now += 30
        whole.advance()
    assert out.getvalue().splitlines() == ["embedding: 25% after 30 s"]


def test_a_task_with_units_counts_when_it_has_ended() -> None:
    clock, out = Clock(), io.StringIO()
    job = Display(out, clock)
    with job.task("whole", 4):
        for title in ("first", "second"):
            with job.task(title, 2, units=1) as inner:
                clock.now += 31
                inner.advance()
        with job.task("third", 2) as inner:  # a part of the next unit
            inner.advance(2)
        with job.task("fourth", 2) as inner:
            clock.now += 31
            inner.advance(2)
    assert [line.split(" after")[0] for line in out.getvalue().splitlines()] == [
        "whole, first: 12%",
        "whole, second: 38%",
        "whole, fourth: 75%",
    ]


def test_a_job_has_parts_with_weights() -> None:
    clock, out = Clock(), io.StringIO()
    with progress.reporting_to(Display(out, clock)), progress.job({"text": 2, "planning": 6, "build": 2}) as job:
        job._clock = clock
        with job.part("planning", total=2) as part:  # the text was kept from an earlier run
            for _ in range(2):
                with progress.current().task("layers", 10) as task:
                    for _ in range(10):
                        clock.now += 3
                        task.advance()
                part.advance()
        with job.part("build"), progress.current().task("files", 4) as task:
            clock.now += 31
            task.advance()
    assert out.getvalue().splitlines() == [
        "planning, layers: 50% after 30 s, 50 s left",
        "planning, layers: 80% after 1 min 0 s, 20 s left",
        "build, files: 85% after 1 min 31 s, 21 s left",
    ]
    assert job.seconds == {"planning": 60, "build": 31}


def test_a_job_of_nobody_still_measures_its_parts() -> None:
    with progress.job({"text": 2, "planning": 6}) as job:
        with job.part("planning"), progress.current().task("layers", 3) as task:
            task.advance()
        with job.part("text"), job.part("text"):  # again, and one inside the other
            pass
        with pytest.raises(ValueError, match="healing"), job.part("healing"):
            pass
    assert list(job.seconds) == ["planning", "text"]


def test_a_short_job_in_a_pipe_says_nothing() -> None:
    out = io.StringIO()
    with Display(out).task("Plan", 1) as task:
        task.advance()
    assert out.getvalue() == ""


def test_one_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    job = Display(out)
    with job.task("Plan", 2) as plan, job.task("Score [layers]", 4) as inner:
        inner.advance(2)
        inner.note("layer 2")
        assert job._bar is not None
        job._bar.refresh()
        plan.advance()
    text = out.getvalue()
    assert "Plan, Score [layers] (layer 2)" in text and "25% after" in text


def test_the_bar_is_put_away_when_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    job = Display(Terminal())
    with pytest.raises(RuntimeError), job.task("Plan", 1):
        raise RuntimeError
    assert job._bar is not None and not job._bar.live.is_started


def test_the_context_says_where_progress_goes() -> None:
    assert type(progress.current()) is Progress
    with progress.shown(stream=io.StringIO()) as job:
        assert progress.current() is job and isinstance(job, Display)
        with progress.shown(quiet=True):
            assert type(progress.current()) is Progress
    assert type(progress.current()) is Progress


def test_silent_accepts_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress().task("Plan", 3) as task:
        task.advance()
        task.note("words")
    Progress().say("words")
    assert capsys.readouterr() == ("", "")
