"""Progress as a person sees it."""

from __future__ import annotations

import io

import pytest

from intarsia import progress
from intarsia.progress import Job, Pace, Silent, duration


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
    assert pace.left is None
    for done in range(1, 5):
        clock.now += 5
        pace.reach(done)
    assert (pace.elapsed, pace.share) == (20, 0.4)
    assert pace.left == pytest.approx(30)
    pace.reach(2)
    assert pace.share == 0.4  # never back


def test_pace_forgets_what_was_taken_over_from_an_earlier_run() -> None:
    clock = Clock()
    pace = Pace(120, clock)
    clock.now += 0.1
    pace.reach(100)
    for done in range(101, 111):
        clock.now += 60
        pace.reach(done)
    assert pace.left == pytest.approx(10 * 60)


def test_pace_of_work_that_stalls_grows() -> None:
    clock = Clock()
    pace = Pace(2, clock)
    clock.now += 10
    pace.reach(1)
    assert pace.left == pytest.approx(10)
    clock.now += 10
    assert pace.left == pytest.approx(20)


def test_pace_of_nothing_to_do() -> None:
    assert Pace(0).share == 1.0


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")]
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_job_in_a_pipe_says_a_line_every_half_minute() -> None:
    clock, out = Clock(), io.StringIO()
    job = Job(out, clock)
    with job.task("Plan", 4) as plan:
        plan.advance()
        assert out.getvalue() == ""
        with job.task("Score layers", 10) as inner:
            for _ in range(5):
                clock.now += 10
                inner.advance()
            inner.note("layer 5")
        job.say("a line")
    # 1 of 4 steps and 3 tenths of the second: 32.5 % after 30 s.
    assert out.getvalue().splitlines() == ["Plan, Score layers: 32% after 30 s, 1 min 2 s left", "a line"]


def test_a_short_job_in_a_pipe_says_nothing() -> None:
    out = io.StringIO()
    with Job(out).task("Plan", 1) as task:
        task.advance()
    assert out.getvalue() == ""


def test_one_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    job = Job(out)
    with job.task("Plan", 2) as plan, job.task("Score [layers]", 4) as inner:
        inner.advance(2)
        inner.note("layer 2")
        assert job._bar is not None
        job._bar._bars.refresh()
        plan.advance()
    text = out.getvalue()
    assert "Plan, Score [layers] (layer 2)" in text and "25% after" in text


def test_the_bar_is_put_away_when_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    job = Job(Terminal())
    with pytest.raises(RuntimeError), job.task("Plan", 1):
        raise RuntimeError
    assert job._bar is not None and not job._bar._bars.live.is_started


def test_the_context_says_where_progress_goes() -> None:
    assert isinstance(progress.current(), Silent)
    with progress.shown(stream=io.StringIO()) as job:
        assert progress.current() is job and isinstance(job, Job)
        with progress.shown(quiet=True):
            assert isinstance(progress.current(), Silent)
    assert isinstance(progress.current(), Silent)


def test_silent_accepts_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with Silent().task("Plan", 3) as task:
        task.advance()
        task.note("words")
    Silent().say("words")
    assert capsys.readouterr() == ("", "")
