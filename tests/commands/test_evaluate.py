"""Tasks from the outside: models by name and in memory, retention, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import intarsia
from intarsia.commands.evaluate import TaskSpec
from intarsia.errors import UserError
from intarsia.options import ModelRef, Runtime
from tests import families
from tests.command import invoke
from tests.conftest import Folder
from tests.evaluation.test_tasks import some_questions


@pytest.fixture
def quiz(tmp_path: Path) -> str:
    lines = [{"query": q.query, "choices": list(q.choices), "gold": q.gold} for q in some_questions(40)]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(tmp_path / "quiz.jsonl")


@pytest.fixture
def shallow(tmp_path: Path) -> str:
    return str(families.save(families.make_model("llama", num_hidden_layers=2), tmp_path / "shallow"))


def test_by_name_and_in_memory(model_folder: Folder, quiz: str) -> None:
    folder = str(model_folder("llama"))
    spec = TaskSpec(tasks=(f"{quiz}#0:0.5", f"{quiz}#0.5:1"), limit=15)
    stored = intarsia.evaluate_tasks(folder, spec)
    assert [(score.name, score.n) for score in stored.scores] == [("quiz#0:0.5", 15), ("quiz#0.5:1", 15)]
    assert (stored.model, stored.dtype, stored.limit, stored.retention) == (folder, "float32", 15, None)
    model, tokenizer = families.make_model("llama"), families.make_tokenizer()
    loaded = intarsia.evaluate_tasks((model, tokenizer), spec, runtime=Runtime(batch_tokens=50))
    assert loaded.model == "a model in memory"
    assert loaded.scores == stored.scores
    by_reference = intarsia.evaluate_tasks(ModelRef(model=folder), f"{quiz}#0:0.5,{quiz}#0.5:1")
    assert [score.n for score in by_reference.scores] == [20, 20]


def test_what_is_kept(model_folder: Folder, shallow: str, quiz: str) -> None:
    dense = str(model_folder("llama"))
    small = intarsia.evaluate_tasks(shallow, quiz, against=dense, seed=2)
    before = intarsia.evaluate_tasks(dense, quiz)
    assert small.retention is not None and small.retention.mean.accuracy is not None
    assert (small.retention.against, small.retention.seed) == (dense, 2)
    assert small.retention.mean.accuracy.value == pytest.approx(small.mean / before.mean)
    assert small.scores[0].outcomes != before.scores[0].outcomes
    assert intarsia.evaluate_tasks(shallow, quiz, against=before, seed=2).retention == small.retention
    itself = intarsia.evaluate_tasks(dense, quiz, against=dense).retention
    assert itself is not None and itself.mean.accuracy is not None
    accuracy = itself.mean.accuracy
    assert (accuracy.value, accuracy.low, accuracy.high) == (1.0, 1.0, 1.0)
    with pytest.raises(UserError, match="the same items"):
        intarsia.evaluate_tasks(shallow, TaskSpec(tasks=(quiz,), limit=5), against=before)


def test_the_two_ways_to_write_the_command(model_folder: Folder, shallow: str, quiz: str) -> None:
    dense = str(model_folder("llama"))
    words = ["--tasks", f"{quiz}#0:0.5, {quiz}#0.5:1", "--against", dense, "--limit", "12", "--json"]
    short = invoke("eval", shallow, *words)
    assert short.exit_code == 0, short.stderr
    found = json.loads(short.stdout)
    spec = TaskSpec(tasks=(f"{quiz}#0:0.5", f"{quiz}#0.5:1"), limit=12)
    expected = intarsia.evaluate_tasks(shallow, spec, against=dense)
    assert found == json.loads(json.dumps(expected.to_dict()))
    for form in (["eval", "tasks", shallow, *words], ["eval", *words, shallow]):
        assert json.loads(invoke(*form).stdout) == found


def test_the_table(model_folder: Folder, shallow: str, quiz: str) -> None:
    dense = str(model_folder("llama"))
    result = invoke("eval", shallow, "--tasks", quiz, "--against", dense)
    assert result.exit_code == 0, result.stderr
    expected = intarsia.evaluate_tasks(shallow, quiz, against=dense)
    assert expected.retention is not None
    ratio = expected.retention.tasks[0].accuracy
    assert ratio is not None and ratio.low is not None and ratio.high is not None
    assert f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})" in result.stdout
    heading = next(line for line in result.stdout.splitlines() if line.startswith("task "))
    assert [cell.strip() for cell in heading.split("┃")] == [
        "task",
        "acc",
        "acc norm",
        "items",
        "chance",
        "kept",
        "kept above chance",
    ]
    assert f"{expected.scores[0].metrics['acc'].value:.4g} ±" in result.stdout


def test_perplexity_is_a_verb_too(model_folder: Folder, text_file: Path) -> None:
    words = ["--text", text_file, "--seq-len", "16", "--windows", "2", "--json"]
    result = invoke("eval", "perplexity", model_folder("llama"), *words)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["windows"] == 2
    streamed = invoke("eval", "perplexity", model_folder("llama"), *words, "--stream")
    assert json.loads(streamed.stdout)["value"] == pytest.approx(found["value"], rel=1e-5)


def test_help_names_both() -> None:
    shown = invoke("eval", "--help").stdout
    assert "eval perplexity" in shown and "lm-eval" in shown
    options = invoke("eval", "tasks", "--help")
    assert options.exit_code == 0
    assert all(option in options.output for option in ("--tasks", "--limit", "--include-path", "--against"))


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        (["--tasks", "QUIZ", "--limit", "0"], "--limit"),
        (["--tasks", "none.jsonl"], "no such file"),
        (["--tasks", "QUIZ#0.9:0.1"], "a share START:END"),
        (["--tasks", "QUIZ", "--against", "./nowhere"], "nowhere"),
        (["--tasks", "QUIZ", "--dtype", "int3"], "int3"),
        (["--tasks", "QUIZ", "--stream"], "--stream is given, and this needs the whole model"),
    ],
)
def test_mistakes_end_before_any_work(model_folder: Folder, quiz: str, words: list[str], printed: str) -> None:
    given = [word.replace("QUIZ", quiz) for word in words]
    result = invoke("eval", model_folder("llama"), *given)
    assert result.exit_code == 2
    assert printed in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_a_model_without_its_tokenizer(quiz: str, tmp_path: Path) -> None:
    families.make_model("llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="has no tokenizer that transformers can read"):
        intarsia.evaluate_tasks(str(tmp_path / "bare"), quiz)
    with pytest.raises(UserError, match="has no tokenizer"):
        intarsia.evaluate_tasks((families.make_model("llama"), None), quiz)
