"""The one run folder: pinned settings, logs, artifacts, the lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from intarsia.errors import UserError
from intarsia.options import TextSpec
from intarsia.run_dir import Log, RunDir

SETTINGS = {"model": "demo", "text": TextSpec(tokens=65_536, seed=3), "method": {"name": "come", "merge": 2}}


def said(error: UserError) -> list[str]:
    return [problem.message for problem in error.problems]


def test_a_job_is_started_and_resumed(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a" / "run")
    run.check(SETTINGS)
    assert not run.path.exists() and not run.exists()
    with run.opened(SETTINGS):
        run.log().append({"step": 1})
        run.pin("text", {"sha256": "abc"})
    with RunDir(run.path).opened(SETTINGS) as again:
        again.pin("text", {"sha256": "abc"})
        again.log().append({"step": 2})
    assert run.log().entries() == [{"step": 1}, {"step": 2}]
    assert run.pinned() == {
        "model": "demo",
        "text": {"sources": ["self"], "tokens": 65536, "seq_len": 512, "seed": 3},
        "method": {"name": "come", "merge": 2},
    }
    assert RunDir.existing(run.path).pinned("text") == {"sha256": "abc"}


def test_every_other_setting_is_reported(tmp_path: Path) -> None:
    run = RunDir(tmp_path, option="-o")
    with run.opened(SETTINGS):
        pass
    others = {"model": "demo", "text": TextSpec(seed=4, tokens=100, seq_len=10), "method": {"name": "come"}, "new": [1]}
    with pytest.raises(UserError) as caught, run.opened(others):
        raise AssertionError
    assert said(caught.value) == [
        "This run was started with method.merge 2, not unset.",
        "This run was started with new unset, not [1].",
        "This run was started with text.seed 3, not 4.",
        "This run was started with text.seq_len 512, not 10.",
        "This run was started with text.tokens 65536, not 100.",
    ]
    assert caught.value.problems[0].hint == "Use the same settings to resume it, or another -o for a new run."
    run.check({**SETTINGS, "model": ...})  # not known yet
    with run.opened(SETTINGS), pytest.raises(UserError, match="sha256"):
        run.pin("facts", {"sha256": "a"})
        run.pin("facts", {"sha256": "b"})


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not a run folder"), RunDir(tmp_path).opened(SETTINGS):
        raise AssertionError
    assert os.listdir(tmp_path) == ["letter.txt"]
    with pytest.raises(UserError, match="is not a run folder"):
        RunDir(tmp_path / "letter.txt").check(SETTINGS)
    with pytest.raises(UserError, match="Make one with `intarsia plan"):
        RunDir.existing(tmp_path)


def test_what_a_kill_at_the_start_leaves_is_no_hindrance(tmp_path: Path) -> None:
    for name in (".lock", ".settings.json.123-abcd"):
        (tmp_path / name).write_text("")
    (tmp_path / "scratch").mkdir()
    with RunDir(tmp_path).opened(SETTINGS):
        pass


def test_a_torn_line_does_not_count(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl")
    assert log.entries() == []
    log.append({"a": 1})
    with log.path.open("a") as file:
        file.write('{"a": 2, "b')
    assert log.entries() == [{"a": 1}]
    again = Log(log.path)
    again.append({"a": 3})
    again.append({"a": 4})
    assert log.path.read_text() == '{"a": 1}\n{"a": 3}\n{"a": 4}\n'
    log.path.write_text('{"a": 1}\nnonsense\n{"a": 3}\n')
    with pytest.raises(UserError, match=r"log\.jsonl, line 2: expected a JSON object"):
        log.entries()
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.append({"loss": float("nan")})


HOLDER = """
import sys, time
from intarsia.run_dir import RunDir
with RunDir(sys.argv[1]).opened({"model": "demo"}) as run:
    (run.scratch / "states").write_text("x")
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_exclusive_and_dies_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="Another process works in the run folder"), RunDir(path).opened():
            raise AssertionError
        assert (path / "scratch" / "states").exists()  # not ours to clear
        holder.send_signal(signal.SIGKILL)
    with RunDir(path).opened({"model": "demo"}) as run:
        assert os.listdir(run.scratch) == []
        with pytest.raises(UserError, match="Another process"), RunDir(path).opened():
            raise AssertionError
        (run.scratch / "states").write_text("x")
    assert not (path / "scratch").exists()


def test_artifacts_are_whole_and_a_failure_names_the_folder(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(RuntimeError) as caught, run.opened(SETTINGS):
        run.write_json("front.json", {"trials": (1, 2), "where": Path("a")})
        run.artifact("ladder", "layers-003.yaml").write_text("x")
        raise RuntimeError("broken")
    assert caught.value.__notes__ == [f"run folder: {run.path} (the same command resumes)"]
    assert run.read_json("front.json") == {"trials": [1, 2], "where": "a"}
    (run.path / "front.json").write_text("{")
    with pytest.raises(UserError, match="delete it and start again"):
        run.read_json("front.json")
