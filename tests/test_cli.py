"""The command line: what it passes on, what it prints where, and how it ends."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from intarsia.cli.app import app
from intarsia.errors import Problem, UserError
from intarsia.pruning.methods.come import ComeSettings
from intarsia.pruning.methods.come_p import ComePSettings
from intarsia.pruning.methods.laco import LacoSettings

ROOT = Path(__file__).resolve().parents[1]
VERBS = [
    ["compress"],
    ["plan"],
    ["build"],
    ["inspect"],
    ["eval"],
    ["eval", "perplexity"],
    ["eval", "tasks"],
    ["bench"],
    ["compare"],
    ["report"],
    ["tailor"],
    ["verify"],
    ["export"],
    ["push"],
    ["anatomy"],
    ["anatomy", "list"],
    ["anatomy", "check"],
]


@dataclass(frozen=True)
class Answer:
    """A stage's result."""

    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return self.data


@dataclass
class Stage:
    """Stands in for a stage: keeps what it was called with, then does as told."""

    action: Callable[[], Any] = lambda: Answer({"layers": 25})
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.args, self.kwargs = args, kwargs
        return self.action()


@pytest.fixture(autouse=True)
def logs_stay_here(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Logs of defects go where pytest clears up."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("logs")))


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Every stage replaced by one."""
    stage = Stage()
    for name, function in (
        ("compress", "compress"),
        ("plan", "plan"),
        ("build", "build"),
        ("inspect", "inspect"),
        ("evaluate", "evaluate_perplexity"),
    ):
        module = types.ModuleType(f"intarsia.stages.{name}")
        setattr(module, function, stage)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return stage


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


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
    result = run(*verb, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_help_waits_for_no_heavy_import() -> None:
    code = """if True:
        import sys
        from intarsia.cli.app import app
        sys.argv = ["intarsia", "compress", "--help"]
        try:
            app()
        except SystemExit as end:
            heavy = {"torch", "transformers", "numpy", "datasets", "pandas", "matplotlib"} & set(sys.modules)
            print("HEAVY", sorted(heavy), end.code)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "HEAVY [] 0", done.stderr


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("intarsia")


@pytest.mark.parametrize(
    "words",
    [
        ["compress", "demo"],
        ["compress", "-o", "out"],
        ["compress", "demo", "-o", "out", "--layers", "many"],
        ["compress", "demo", "-o", "out", "--norm", "fancy"],
        ["plan", "demo"],
        ["build", "run"],
        ["inspect"],
        ["eval", "perplexity", "demo"],
        ["no-such-verb"],
        ["inspect", "demo", "--no-such-flag"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(words: list[str], stage: Stage) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert stage.kwargs is None


def test_compress_passes_every_flag_on(stage: Stage, tmp_path: Path) -> None:

    words = (
        "--layers 25 --method come-p --calibration a.txt --calibration b.txt --tokens 4096 --seq-len 128 "
        "--heal none --eval-text c.txt --eval-windows 8 --revision main --span-choice sleb --merge 3 --sharpness 2 "
        "--dominance 0.5 --no-repeat --norm average --sensitivity l2 --distance last-token --granularity 10 --spans 2 "
        "--no-racing --reference --heal-in-loop --device cpu --dtype float32 --batch-tokens 512 --seed 7 "
        "--max-shard-size 2GB --overwrite --dry-run --quiet"
    ).split()
    result = run("compress", "demo", "-o", str(tmp_path / "out"), "--run", str(tmp_path / "run"), *words)
    assert result.exit_code == 0, result.output
    assert stage.args == ("demo", tmp_path / "out")
    assert stage.kwargs is not None
    stage.kwargs.pop("progress")
    assert stage.kwargs == {
        "layers": 25,
        "sparsity": None,
        "method": "come-p",
        "calibration": ["a.txt", "b.txt"],
        "tokens": 4096,
        "seq_len": 128,
        "heal": "none",
        "eval_text": "c.txt",
        "eval_windows": 8,
        "run": tmp_path / "run",
        "revision": "main",
        "settings": ComePSettings(
            span_choice="sleb",
            merge=3,
            sharpness=2.0,
            dominance=0.5,
            no_repeat=True,
            norm="average",
            sensitivity="l2",
            distance="last-token",
            granularity=10,
            spans=2,
            racing=False,
            reference=True,
        ),
        "heal_in_loop": True,
        "device": "cpu",
        "dtype": "float32",
        "batch_tokens": 512,
        "seed": 7,
        "devices": [],
        "stream": False,
        "memory_bytes": None,
        "max_shard_bytes": 2 * 10**9,
        "overwrite": True,
        "dry_run": True,
    }


@pytest.mark.parametrize("verb", [["compress", "demo", "-o", "out"], ["plan", "demo", "--run", "run"]], ids="-".join)
def test_thorough(verb: list[str], stage: Stage) -> None:

    thorough = ComePSettings(spans=5, granularity=5, removals=True, finalists=4, blocks=5)
    given = [*verb, "--layers", "25", "--thorough"]
    assert run(*given, "--method", "come-p").exit_code == 0
    assert stage.kwargs is not None
    assert (stage.kwargs["settings"], stage.kwargs["heal_in_loop"]) == (thorough, True)
    # What is given besides counts, also where it is what it would be without.
    assert run(*given, "--method", "come-p", "--spans", "3", "--blocks", "1", "--sharpness", "2").exit_code == 0
    assert stage.kwargs["settings"] == replace(thorough, spans=3, blocks=1, sharpness=2.0)
    stage.kwargs = None
    result = run(*given, "--method", "sleb")
    assert result.exit_code == 2 and "Leave --thorough out" in result.stderr
    assert stage.kwargs is None


def test_the_options_of_laco(stage: Stage, tmp_path: Path) -> None:

    words = "--layers 24 --method laco --laco-merge 3 --laco-lowest 2 --reference".split()
    assert run("plan", "demo", "--run", str(tmp_path / "run"), *words).exit_code == 0
    assert stage.kwargs is not None
    assert stage.kwargs["settings"] == LacoSettings(merge=3, lowest=2, reference=True)


@pytest.mark.parametrize("verb", [["compress", "demo", "-o", "out"], ["plan", "demo", "--run", "run"]], ids="-".join)
def test_defaults_are_the_settings_own(verb: list[str], stage: Stage) -> None:

    assert run(*verb, "--sparsity", "0.3").exit_code == 0
    assert stage.kwargs is not None
    assert stage.kwargs["settings"] == ComeSettings()
    assert stage.kwargs["calibration"] == "self"
    assert (stage.kwargs["sparsity"], stage.kwargs["layers"]) == (0.3, None)


def test_build_and_evaluate_pass_their_flags_on(stage: Stage) -> None:
    assert run("build", "run", "-o", "out", "--layers", "5", "--max-shard-size", "500MB").exit_code == 0
    assert stage.args == (Path("run"), Path("out"))
    assert stage.kwargs is not None
    assert stage.kwargs["max_shard_bytes"] == 500_000_000
    assert (stage.kwargs["layers"], stage.kwargs["overwrite"]) == (5, False)

    assert run("eval", "perplexity", "demo", "--text", "a.txt#0.9:1", "--windows", "0").exit_code == 0
    assert stage.args == ("demo", "a.txt#0.9:1")
    assert stage.kwargs["windows"] is None


@pytest.mark.parametrize("text", ["", "GB", "-1", "5 parsecs", "nan", "inf", "1e400"])
def test_a_size_that_is_none(text: str, stage: Stage) -> None:
    result = run("build", "run", "-o", "out", "--max-shard-size", text)
    assert result.exit_code == 2
    assert "--max-shard-size" in result.stderr
    assert stage.kwargs is None


def test_every_problem_is_told_at_once(stage: Stage) -> None:
    problems = [
        Problem(where=f"layers[{n}]", expected="0 to 29", found=f"[{30 + n}]", remedy=f"Mend the {n}th.")
        for n in (1, 2)
    ]
    stage.action = failing(UserError(problems))
    result = run("build", "recipe.yaml", "-o", "out")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    told = " ".join(result.stderr.split())
    for problem in problems:
        assert f"error: {problem.message} hint: {problem.hint}" in told


def test_a_long_problem_is_not_broken_into_lines(stage: Stage) -> None:
    path = "/very" * 60 + "/long.txt"
    stage.action = failing(UserError.of(where=path, expected="text", found="nothing", remedy="Write some."))
    assert path in run("inspect", "x").stderr


def test_a_defect_of_ours_ends_with_1_and_a_log(stage: Stage, tmp_path: Path) -> None:
    error = RuntimeError("a dimension is wrong\nsomewhere")
    error.__notes__ = ["run folder: elsewhere"]  # type: ignore[attr-defined]
    stage.action = failing(error)
    result = run("plan", "demo", "--run", str(tmp_path / "run"), "--layers", "5")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "internal error" in result.stderr
    assert "RuntimeError: a dimension is wrong somewhere" in result.stderr
    assert "run folder: elsewhere" in result.stderr
    assert str(tmp_path / "run") in result.stderr
    log = re.search(r"traceback: (\S+\.log)", result.stderr)
    assert log
    text = Path(log[1]).read_text(encoding="utf-8")
    assert "Traceback" in text
    assert "RuntimeError: a dimension is wrong" in text


def test_debugging_shows_the_traceback(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTARSIA_DEBUG", "1")
    stage.action = failing(RuntimeError("wrong"))
    result = run("inspect", "demo")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_out_of_memory_says_what_to_do(stage: Stage) -> None:
    stage.action = failing(MemoryError("could not allocate"))
    result = run("inspect", "demo")
    assert result.exit_code == 1
    assert "--batch-tokens" in result.stderr


def test_what_the_machine_refuses_is_the_users_to_mend(stage: Stage) -> None:
    stage.action = failing(PermissionError(errno.EACCES, "Permission denied", "/root/out"))
    result = run("build", "run", "-o", "out")
    assert result.exit_code == 2
    assert "/root/out" in result.stderr
    assert "Permission denied" in result.stderr


def test_interrupted(stage: Stage) -> None:
    stage.action = failing(KeyboardInterrupt())
    result = run("plan", "demo", "--run", "run", "--layers", "5")
    assert result.exit_code == 130
    assert "The same command continues" in result.stderr


def test_json_is_one_object_alone_on_stdout(stage: Stage) -> None:
    data = {"before": {"layers": 30}, "after": {"layers": 25}, "text": "ä [bold] ☃", "none": None}

    def noisy() -> Answer:
        print("a library greets")
        return Answer(data)

    stage.action = noisy
    result = run("compress", "demo", "-o", "out", "--layers", "25", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == data
    assert "a library greets" in result.stderr


def test_json_and_quiet_show_no_progress(stage: Stage) -> None:
    from intarsia.progress import Silent

    for flag, silent in (("--json", True), ("--quiet", True), (None, False)):
        run("compress", "demo", "-o", "out", "--layers", "25", *([flag] if flag else []))
        assert stage.kwargs is not None
        assert isinstance(stage.kwargs["progress"], Silent) == silent


def test_a_plain_dataclass_is_a_result_too(stage: Stage) -> None:
    @dataclass(frozen=True)
    class Score:
        value: float
        windows: int

    stage.action = lambda: Score(28.2, 64)
    result = run("eval", "perplexity", "demo", "--text", "a.txt", "--json")
    assert json.loads(result.stdout) == {"value": 28.2, "windows": 64}


def test_no_control_characters_in_a_pipe() -> None:
    for words in (["--help"], ["inspect", "/no/such/model"], ["compress"]):
        done = intarsia(*words)
        assert "\x1b" not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


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
        ["eval", "perplexity", "/no/such/model", "--text", "/no/such/text.txt"],
    ],
    ids=lambda words: words[0],
)
def test_a_place_that_is_not_there(words: list[str], tmp_path: Path) -> None:
    done = intarsia(*(word.format(tmp=tmp_path) for word in words), HF_HUB_OFFLINE="1")
    assert done.returncode == 2, done.stderr
    assert "/no/such/" in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir()), "nothing half-written"
