"""The command line that is generated from a verb's signature."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import pytest

from intarsia import registry
from intarsia.cli import main
from intarsia.cli.parse import Call, parse
from intarsia.errors import UserError
from intarsia.flags import Flag
from intarsia.options import EvalSpec, ModelRef, Output, Runtime, Target, TextSpec
from intarsia.registry import HealStages, Planner
from tests.conftest import registry_restored

PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar, Literal
from intarsia.registry import heal_stage, planner

@dataclass(frozen=True, kw_only=True)
class JoinSettings:
    # Layers joined at once.
    join_count: int = 2
    # Fold norms, or average them.
    join_norm: Literal["fold", "average"] = "fold"
    presets: ClassVar = {"paper": {"join_norm": "average"}}

@dataclass(frozen=True, kw_only=True)
class JoinMoreSettings(JoinSettings):
    # Steps of the grid.
    steps_of_grid: int = 10
    # Give up early.
    giving_up: bool = True

@dataclass(frozen=True, kw_only=True)
class StageSettings:
    # Times over.
    epochs_over: int = 1
    # Seed of everything random.
    seed: int = 0

@planner("t-join", settings=JoinSettings)
class Join: ...

@planner("t-join-more", settings=JoinMoreSettings)
class JoinMore: ...

@planner("t-plain")
class Plain: ...

@heal_stage("t-first")
def first(context, recipe): ...

@heal_stage("t-second", settings=StageSettings)
def second(context, recipe, settings): ...
"""


def squeeze(
    model: ModelRef | str,
    out: Output | str,
    target: Target,
    *,
    method: Planner = "t-join",
    heal: HealStages = ("t-first",),
    text: TextSpec = TextSpec(tokens=1024),
    evaluation: EvalSpec = EvalSpec(speed=False),
    runtime: Runtime = Runtime(),
) -> None:
    """Make a model smaller.

    In one go.
    """


def page(*runs: Path, title: Annotated[str, Flag(help="What it is called.")] = "runs") -> None:
    """Write a page."""


@pytest.fixture(scope="module", autouse=True)
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("plugin") / "mine.py"
    file.write_text(PLUGIN, encoding="utf-8")
    with registry_restored():
        registry.load_plugin(file)
        yield file


def ask(line: str) -> Call:
    return parse(squeeze, "squeeze", shlex.split(line))


def said(line: str) -> list[tuple[str, str]]:
    with pytest.raises(UserError) as caught:
        ask(line)
    return [(problem.message, problem.hint) for problem in caught.value.problems]


def test_flags_become_value_objects() -> None:
    call = ask(
        "org/model -o out --layers 3 --seq-len 128 --tokens 2k --calibration a.txt,b.txt --calibration self "
        "--memory 8GB --devices cuda:0,cuda:1 --eval-text wiki=w.txt --speed --no-dequantize --json -q"
    )
    assert call.verb is squeeze and call.rest == ()
    values = dict(call.arguments)
    assert values.pop("method").name == "t-join"
    assert [stage.name for stage in values.pop("heal")] == ["t-first"]
    assert values == {
        "model": ModelRef(model="org/model"),
        "out": Output(path=Path("out")),
        "target": Target(layers=3),
        "text": TextSpec(sources=("a.txt", "b.txt", "self"), tokens=2000, seq_len=128),
        "evaluation": EvalSpec(text=("wiki=w.txt",)),
        "runtime": Runtime(memory="8GB", devices=("cuda:0", "cuda:1")),
    }
    assert call.shared.json and call.shared.quiet


def test_what_is_left_out_is_as_the_verb_says() -> None:
    values = ask("m -o out").arguments
    assert values["text"] == TextSpec(tokens=1024) and values["evaluation"] == EvalSpec(speed=False)


def test_the_options_of_what_is_chosen() -> None:
    call = ask("m -o o --method t-join-more --steps-of-grid 3 --no-giving-up --heal t-second,t-first --seed 4")
    method, heal = call.arguments["method"], call.arguments["heal"]
    assert (method.settings.steps_of_grid, method.settings.giving_up, method.settings.join_count) == (3, False, 2)
    assert [stage.name for stage in heal] == ["t-second", "t-first"]
    # One flag serves every owner of an option of that name.
    assert heal[0].settings.seed == call.arguments["text"].seed == 4
    assert ask("m -o o --heal none").arguments["heal"] == ()
    assert ask("m -o o --method=t-plain").arguments["method"].settings is None


def test_a_preset_gives_way_to_what_is_given() -> None:
    assert ask("m -o o --preset paper").arguments["method"].settings.join_norm == "average"
    assert ask("m -o o --preset paper --join-norm fold").arguments["method"].settings.join_norm == "fold"
    assert said("m -o o --preset best") == [
        ("--preset takes one of paper, not 'best'.", "Give one of paper."),
    ]


def test_an_option_of_another_method_names_who_has_it() -> None:
    assert said("m -o o --steps-of-grid 3 --epochs-over 2") == [
        ("--steps-of-grid is an option of t-join-more.", "Leave it out, or choose --method t-join-more."),
        ("--epochs-over is an option of t-second.", "Leave it out, or choose --heal t-second."),
    ]
    assert said("m -o o --method t-plain --join-count 3") == [
        ("--join-count is an option of t-join and t-join-more.", "Leave it out, or choose --method t-join."),
    ]


def test_every_problem_is_found_at_once() -> None:
    assert said("--layers x --sparsity 0.2 --join-norm none --memory 8XB --sead=3 --no-epochs-over") == [
        ("There is no option --sead.", "Did you mean --seed?"),
        ("--no-epochs-over is an option of t-second.", "Leave it out, or choose --heal t-second."),
        ("MODEL is missing.", "Give MODEL: A local folder, a GGUF file, a hub id, or `demo`."),
        ("--out is missing.", "Give --out: Folder of the new model."),
        ("--layers takes a whole number, not 'x'.", "Give a whole number."),
        ("--join-norm takes one of fold, average, not 'none'.", "Give one of fold, average."),
        ("--memory is '8XB', which is no size.", "Give a size such as 5GB, 500MB or 1.5GiB."),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("m -o o --layers 3 --sparsity 0.2", "--layers and --sparsity are both given."),
        ("m -o o --method t-joint", "There is no method 't-joint'."),
        ("m -o o --heal t-first,t-third", "There is no heal stage 't-third'."),
        ("m -o o extra", "'extra' is one argument too many."),
        ("m -o o --tokens", "--tokens has no value."),
        ("m -o o --tokens -5", "--tokens: '-5' is not a number of tokens such as 65536, 500k or 2M."),
    ],
)
def test_what_cannot_be(line: str, message: str) -> None:
    assert [each for each, _ in said(line)] == [message]


def test_a_config_file_has_the_flags_as_keys(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "model: m\nout: from-file\nseq-len: 64\ntokens: 1k\nmethod: t-join-more\nsteps_of_grid: 5\n"
        "giving-up: false\ncalibration: [a.txt, b.txt]\nsparsity: 0.25\n",
        encoding="utf-8",
    )
    values = ask(f"--config {file} -o typed --seq-len 32").arguments
    assert values["model"] == ModelRef(model="m") and values["out"].path == Path("typed")
    assert values["text"] == TextSpec(sources=("a.txt", "b.txt"), tokens=1000, seq_len=32)
    assert (values["method"].settings.steps_of_grid, values["method"].settings.giving_up) == (5, False)
    assert values["target"].sparsity == 0.25
    file.write_text("model: m\nout: o\nsteps-of-grid: 3\nsequence: 5\nlayers: many\n", encoding="utf-8")
    assert said(f"--config {file}") == [
        (
            "steps-of-grid in the config file is an option of t-join-more.",
            "Leave it out, or choose --method t-join-more.",
        ),
        ("There is no option sequence in the config file.", "Did you mean --seq-len?"),
        ("--layers takes a whole number, not 'many'.", "Give a whole number."),
    ]


def test_plain_parameters() -> None:
    call = parse(page, "page", ["a", "b", "--title", "both"])
    assert call.rest == (Path("a"), Path("b")) and call.arguments == {"title": "both"}
    assert parse(page, "page", []).rest == ()


def test_help_shows_every_method_and_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        ask("--help")
    assert caught.value.code == 0
    text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)  # lines are broken wherever the width asks for it
    assert "Usage: intarsia squeeze MODEL [OPTIONS]" in text
    for words in (
        "Make a model smaller.",
        "t-join, t-join-more, t-plain",
        "With --method t-join, t-join-more",
        "With --method t-join-more",
        "With --heal t-second",
        "Layers joined at once. (default: 2)",
        "--giving-up --no-giving-up",
        "--steps-of-grid N",
        "--preset NAME",
        "--plugin FILE.py",
    ):
        assert words in text, words
    assert "--no-dequantize" not in text


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("", ("", [])),
        ("--help", ("", [])),
        ("compress m", ("compress", ["m"])),
        ("eval tasks m", ("eval tasks", ["m"])),
        ("eval m --tasks x", ("eval tasks", ["m", "--tasks", "x"])),
        ("eval perplexity m", ("eval perplexity", ["m"])),
        ("eval", ("eval", [])),
        ("anatomy --help", ("anatomy", [])),
    ],
)
def test_verbs(words: str, found: tuple[str, list[str]]) -> None:
    assert main.find(words.split()) == found


def test_verbs_that_are_not_there() -> None:
    with pytest.raises(UserError, match="Did you mean compress"):
        main.find(["compres"])
    with pytest.raises(UserError, match="There is no verb anatomy 'look'"):
        main.find(["anatomy", "look"])


class Result:
    def __init__(self, passed: bool) -> None:
        self.passed = passed

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed}


@pytest.mark.parametrize(
    ("action", "code", "words"),
    [
        (Result(True), 0, ""),
        (Result(False), 1, ""),
        (
            UserError("It is bad.", "Mend it."),
            2,
            "error: It is bad.\n  hint: Mend it.\n",
        ),
        (RuntimeError("broken"), 1, "internal error in intarsia: RuntimeError: broken"),
        (KeyboardInterrupt(), 130, "Interrupted."),
    ],
)
def test_exit_codes(
    action: Any, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def inspect(source: Annotated[str, Flag(positional=True)]) -> Any:
        """Look."""
        if isinstance(action, BaseException):
            raise action
        return action

    monkeypatch.setattr(main, "function", lambda name: inspect)
    try:
        main.run(["inspect", "x", "--json"])
        found = 0
    except SystemExit as error:
        found = error.code
    out = capsys.readouterr()
    assert found == code and words in out.err and "Traceback" not in out.err
    assert out.out == ('{\n  "passed": true\n}\n' if code == 0 else '{\n  "passed": false\n}\n' if not words else "")
