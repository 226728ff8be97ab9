"""The command line: what it prints where, and how it ends."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from intarsia.cli import main
from intarsia.errors import Problem, UserError
from intarsia.options import NewModel
from tests.command import Done, invoke

ROOT = Path(__file__).resolve().parents[1]
VERBS = [["eval"], ["anatomy"], *(name.split() for name in main.VERBS)]


@dataclass(frozen=True)
class Answer:
    """A verb's result."""

    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return self.data


@dataclass
class Stage:
    """Stands in for a verb: keeps what it was called with, then acts."""

    action: Callable[[], Any] = lambda: Answer({"layers": 25})
    args: dict[str, Any] | None = None

    def stand_in(self, verb: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(verb)
        def called(**given: Any) -> Any:
            self.args = given
            return self.action()

        return called


@pytest.fixture(autouse=True)
def logs_stay_here(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Logs of defects go where pytest clears up."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("logs")))


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Every verb replaced by one."""
    stage, function = Stage(), main.function
    monkeypatch.setattr(main, "function", lambda name: stage.stand_in(function(name)))
    return stage


def failing(error: BaseException) -> Callable[[], Any]:
    def action() -> Any:
        raise error

    return action


def intarsia(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "intarsia", *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("verb", [[], *VERBS], ids=" ".join)
def test_help_of_every_verb(verb: list[str]) -> None:
    result = invoke(*verb, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_version() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("intarsia")


@pytest.mark.parametrize(
    "words",
    [
        ["compress", "demo"],
        ["compress", "-o", "out"],
        ["compress", "demo", "-o", "out", "--layers", "many"],
        ["plan", "demo"],
        ["build", "run"],
        ["build", "run", "-o", "out", "--layers", "many"],
        ["export", "demo", "-o", "out", "--gguf", "Q1"],
        ["inspect"],
        ["no-such-verb"],
        ["inspect", "demo", "--no-such-flag"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(words: list[str], stage: Stage) -> None:
    result = invoke(*words)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert stage.args is None


def test_build_passes_its_flags_on(stage: Stage) -> None:
    words = "build run -o out --layers 5 --max-shard-size 500MB --overwrite --push-to-hub a/b --private".split()
    assert invoke(*words).exit_code == 0
    out = NewModel(path=Path("out"), shard_size="500MB", overwrite=True, push_to="a/b", private=True)
    assert stage.args == {"source": Path("run"), "out": out, "layers": 5}
    assert out.shard_bytes == 500_000_000


@pytest.mark.parametrize("text", ["", "GB", "-1", "5 parsecs", "nan", "inf", "1e400"])
@pytest.mark.parametrize("verb", [["build", "run", "-o", "out"], ["verify", "/"]], ids=" ".join)
def test_a_size_that_is_none(text: str, verb: list[str]) -> None:
    result = invoke(*verb, "--max-shard-size", text)
    assert result.exit_code == 2
    assert "--max-shard-size" in result.stderr


def test_every_problem_is_reported_at_once(stage: Stage) -> None:
    problems = [Problem(f"layers[{n}] is {30 + n}.", f"Mend the {n}th.") for n in (1, 2)]
    stage.action = failing(UserError(problems))
    result = invoke("build", "recipe.yaml", "-o", "out")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    printed = " ".join(result.stderr.split())
    for problem in problems:
        assert f"error: {problem.message} hint: {problem.hint}" in printed


def test_a_long_problem_is_not_broken_into_lines(stage: Stage) -> None:
    path = "/very" * 60 + "/long.txt"
    stage.action = failing(UserError(f"There is nothing in {path}.", "Write some."))
    assert path in invoke("inspect", "x").stderr


def test_a_defect_of_ours_ends_with_1_and_a_log(stage: Stage) -> None:
    error = RuntimeError("a dimension is wrong\nsomewhere")
    error.__notes__ = ["run folder: elsewhere"]  # type: ignore[attr-defined]
    stage.action = failing(error)
    result = invoke("inspect", "demo")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "internal error" in result.stderr
    assert "RuntimeError: a dimension is wrong somewhere" in result.stderr
    assert "run folder: elsewhere" in result.stderr
    log = re.search(r"traceback: (\S+\.log)", result.stderr)
    assert log
    text = Path(log[1]).read_text(encoding="utf-8")
    assert "Traceback" in text
    assert "RuntimeError: a dimension is wrong" in text


def test_debugging_shows_the_traceback(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTARSIA_DEBUG", "1")
    stage.action = failing(RuntimeError("wrong"))
    result = invoke("inspect", "demo")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_out_of_memory_says_what_to_do(stage: Stage) -> None:
    stage.action = failing(MemoryError("could not allocate"))
    result = invoke("inspect", "demo")
    assert result.exit_code == 1
    assert "--batch-tokens" in result.stderr


def test_what_the_machine_refuses_is_the_users_to_correct(stage: Stage) -> None:
    stage.action = failing(PermissionError(errno.EACCES, "Permission denied", "/root/out"))
    result = invoke("build", "run", "-o", "out")
    assert result.exit_code == 2
    assert "/root/out" in result.stderr
    assert "Permission denied" in result.stderr


@pytest.mark.parametrize(("notes", "then"), [(["run folder: run"], "resumes"), ([], "starts it again")])
def test_interrupted(notes: list[str], then: str, stage: Stage) -> None:
    stop = KeyboardInterrupt()
    stop.__notes__ = notes  # type: ignore[attr-defined]
    stage.action = failing(stop)
    result = invoke("build", "run", "-o", "out")
    assert result.exit_code == 130
    assert f"The same command {then}" in result.stderr


def test_json_is_one_object_alone_on_stdout(stage: Stage) -> None:
    data = {"before": {"layers": 30}, "after": {"layers": 25}, "text": "ä [bold] ☃", "none": None}

    def noisy() -> Answer:
        print("a library greets")
        return Answer(data)

    stage.action = noisy
    result = invoke("build", "run", "-o", "out", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == data
    assert "a library greets" in result.stderr


def test_json_and_quiet_show_no_progress(stage: Stage) -> None:
    from intarsia import progress

    seen: list[progress.Progress] = []

    def look() -> Answer:
        seen.append(progress.current())
        return Answer({})

    stage.action = look
    for words in (["--json"], ["--quiet"], []):
        invoke("inspect", "demo", *words)
    assert [type(each) is progress.Progress for each in seen] == [True, True, False]


def test_a_plain_dataclass_is_a_result_too(stage: Stage) -> None:
    @dataclass(frozen=True)
    class Score:
        value: float
        windows: int

    stage.action = lambda: Score(28.2, 64)
    assert json.loads(invoke("inspect", "demo", "--json").stdout) == {"value": 28.2, "windows": 64}


def test_no_control_characters_in_a_pipe() -> None:
    done = intarsia("compress")
    assert done.returncode == 2
    for said in (done.stdout + done.stderr, invoke("--help").output, invoke("inspect", "/no/such/model").output):
        assert said and "\x1b" not in said and "Traceback" not in said


def test_a_reader_that_goes_away_is_no_defect() -> None:
    done = subprocess.run(
        f"'{sys.executable}' -m intarsia --help | true",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["compress", "/no/such/model", "--layers", "3", "-o", "{tmp}/out"],
        ["plan", "/no/such/model", "--layers", "3", "--run", "{tmp}/run"],
        ["build", "/no/such/recipe.yaml", "-o", "{tmp}/out"],
        ["inspect", "/no/such/model"],
        ["report", "/no/such/run", "-o", "{tmp}/out.html"],
        ["verify", "/no/such/model"],
        ["export", "/no/such/model", "-o", "{tmp}/out.gguf"],
        ["push", "/no/such/model", "name"],
        ["anatomy", "check", "/no/such/model"],
        ["eval", "perplexity", "/no/such/model", "--text", "/no/such/text.txt"],
    ],
    ids=lambda words: words[0],
)
def test_a_place_that_is_not_there(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done: Done = invoke(*(word.format(tmp=tmp_path) for word in words))
    assert done.exit_code == 2, done.stderr
    assert "/no/such/" in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir()), "nothing half-written"
