"""A comparison on a tiny model: its numbers are those of the stages one by one, and it continues wherever it stops."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import intarsia
from intarsia.building.materialize import assembled
from intarsia.checkpoint.reader import Checkpoint
from intarsia.cli import main
from intarsia.commands import compare as verb
from intarsia.commands.compare import CompareEval, CompareResult, Entrants
from intarsia.errors import Problem, UserError
from intarsia.options import AnswerSpec, EvalSpec, NewModel, Output, Target, TextSpec
from intarsia.progress import Display, reporting_to
from intarsia.pruning.ladder import Ladder
from intarsia.recipe import schema
from intarsia.registry import planners
from intarsia.reporting.comparison import ANSWERS
from tests import families
from tests.conftest import Folder
from tests.killing import kill_within, needs_proc

Sizes = dict[str, Any]


@pytest.fixture
def halves(text_file: Path) -> Sizes:
    """Calibration from one half of the text, evaluation on the other."""
    return {
        "calibration": f"{text_file}#0:0.5",
        "eval_text": f"words={text_file}#0.5:1",
        "eval_windows": 4,
        "tokens": 256,
        "seq_len": 32,
    }


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    """A task of twelve questions."""
    words = families.sample_text(120, seed=5).replace(".", "").split()
    lines = [
        {"query": " ".join(words[start : start + 6]), "choices": words[start + 6 : start + 9], "gold": start % 3}
        for start in range(0, 108, 9)
    ]
    path = tmp_path / "quiz.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def text_of(given: Sizes) -> TextSpec:
    return TextSpec(
        sources=(given["calibration"],),
        **{name: given[name] for name in ("tokens", "seq_len", "seed") if name in given},
    )


def compare(model: str, out: Path, **given: Any) -> CompareResult:
    """`intarsia.compare` of options one by one."""
    parts: list[Sizes] = [{}, {}]
    names = {"eval_text": "text", "eval_windows": "windows"}
    for name, value in given.items():
        if name not in ("calibration", "tokens", "seq_len", "seed", "dry_run"):
            parts[name not in ("methods", "layers", "heal", "models")][names.get(name, name)] = value
    spec = text_of(given)
    return verb.compare(
        model,
        out,
        Entrants(**parts[0]),
        CompareEval(**{"answers": 4, **parts[1]}),
        text=spec,
        dry_run=given.get("dry_run", False),
    )


def rows_of(out: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    lines = map(json.loads, (out / "rows.jsonl").read_text(encoding="utf-8").splitlines())
    return {(row["method"], row["layers"], row["heal"]): row for row in lines}


def separately(model: str, run: Path, halves: Sizes, *, layers: int, method: str) -> intarsia.PlanResult:
    (chosen,) = planners.choose_all(method)
    return intarsia.plan(model, run, Target(layers=layers), method=chosen, text=text_of(halves))


def perplexity_of(folder: Path | str, halves: Sizes) -> float:
    text = halves["eval_text"].partition("=")[2]
    return intarsia.evaluate_perplexity(str(folder), text, seq_len=32, windows=4).value


def test_the_numbers_are_those_of_the_stages_one_by_one(
    model_folder: Folder, halves: Sizes, quiz: Path, tmp_path: Path
) -> None:
    model, out = str(model_folder("llama")), tmp_path / "compare"
    result = compare(
        model,
        out,
        methods="come,mka,laco[laco_merge=3],come-p[granularity=4,norm=average],sleb[heal_in_loop=true]",
        layers=[3, 5, 4],
        heal=["none", "closed-form"],
        tasks=[str(quiz)],
        task_layers=[4],
        **halves,
    )
    rows = rows_of(out)
    assert len(rows) == 1 + 5 * 3 * 2 and result.rows is not None and len(result.rows) == len(rows)
    dense = rows["dense", 6, "none"]
    assert dense["perplexity"]["words"]["value"] == perplexity_of(model, halves)
    assert dense["layer_forwards"] == result.shared_layer_forwards == 6
    for name in ("come", "mka", "laco[laco-merge=3]", "come-p[norm=average,granularity=4]", "sleb[heal-in-loop=true]"):
        for layers in (5, 4, 3):
            run = tmp_path / f"{name}-{layers}"
            planned = separately(model, run, halves, layers=layers, method=name)
            built = intarsia.build(run, NewModel(path=tmp_path / "built", overwrite=True))
            row = rows[name, layers, "none"]
            assert schema.content_hash(schema.load(out / row["recipe"])) == built.recipe_sha256 == row["recipe_sha256"]
            assert row["perplexity"]["words"]["value"] == perplexity_of(built.out, halves)
            assert row["parameters"] == built.parameters
            assert row["bytes"] == Checkpoint.open(built.out, model="built").nbytes
            assert row["layer_forwards"] == pytest.approx(planned.layer_forwards - 6)  # the shared pass
            assert row["heal"] == "none" and row["heal_seconds"] is None

            healed = rows[name, layers, "closed-form"]
            rebuilt = intarsia.build(out / healed["recipe"], NewModel(path=tmp_path / "rebuilt", overwrite=True))
            assert healed["perplexity"]["words"]["value"] == perplexity_of(rebuilt.out, halves)
            assert healed["heal_seconds"] > 0 and healed["heal_forwards"] > 0

            assert (row["tasks"] is not None) == (layers == 4)
            if layers == 4:
                alone = intarsia.evaluate_tasks(str(built.out), [str(quiz)], against=model)
                for key in ("metrics", "outcomes", "items_sha256"):
                    assert row["tasks"]["scores"][0][key] == alone.to_dict()["scores"][0][key]
                assert alone.retention is not None
                assert row["tasks"]["retention"]["mean"] == asdict(alone.retention)["mean"]
    assert rows["laco[laco-merge=3]", 5, "none"]["note"].startswith("a ladder of its own; answers differ more than")
    assert rows["laco[laco-merge=3]", 4, "none"]["note"].startswith("answers differ more than perplexity says: ")
    assert Ladder(out / "plans" / "laco-laco-merge-3-to-003").depths() == [4, 3]
    assert Ladder(out / "plans" / "laco-laco-merge-3-to-005").depths() == [5]
    assert Ladder(out / "plans" / "come").depths() == [5, 4, 3]
    assert result.passes == 1


def test_what_stands_beside_the_rows(model_folder: Folder, halves: Sizes, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "compare"
    halves["eval_text"] = [halves["eval_text"], f"{text_file}#0.9:1"]
    halves["eval_windows"] = [4, 2]
    result = compare(str(model_folder("llama")), out, methods="shortgpt,reverse", layers=[5, 4], speed=True, **halves)
    facts = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    assert [(text["name"], text["windows"], text["seq_len"]) for text in facts["eval_texts"]] == [
        ("words", 4, 32),
        ("words 0.9:1", 2, 32),
    ]
    assert facts["kind"] == "compare" and facts["calibration"]["tokens"] == 256
    rows = rows_of(out)
    for row in rows.values():
        assert set(row["perplexity"]) == {"words", "words 0.9:1"}
        for text in facts["eval_texts"]:
            found = row["perplexity"][text["name"]]
            assert (found["sha256"], found["windows"]) == (text["sha256"], text["windows"])
        assert row["speed"]["decode_tokens_per_s"] > 0
        assert ("dense" in row["speed"]) == (row["method"] != "dense")
    names = {file.name for file in result.files}
    assert {"table.csv", "table.md", "figure-words.svg", "report.html"} <= names
    assert "shortgpt" in (out / "report.html").read_text(encoding="utf-8")
    with (out / "table.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [(line["method"], int(line["layers"])) for line in table] == [
        ("dense", 6),
        ("shortgpt", 5),
        ("shortgpt", 4),
        ("reverse", 5),
        ("reverse", 4),
    ]
    assert float(table[1]["words"]) == rows["shortgpt", 5, "none"]["perplexity"]["words"]["value"]
    answers = rows["shortgpt", 5, "none"]["answers"]
    assert rows["dense", 6, "none"]["answers"]["agreement"]["value"] == float(table[0]["agreement"]) == 1.0
    assert float(table[1]["agreement"]) == answers["agreement"]["value"] < 1.0
    intarsia.build(out / "plans" / "shortgpt", tmp_path / "five", layers=5)
    alone = intarsia.evaluate_agreement(
        str(tmp_path / "five"), str(model_folder("llama")), AnswerSpec(answers=4)
    ).agreement
    assert answers == {**json.loads(json.dumps(asdict(alone))), "asked": [4, 64]}
    assert result.rows is not None
    for column, name in ANSWERS.items():
        assert float(table[1][column]) == answers[name]["value"]
        assert float(table[1][f"{column} stderr"]) == answers[name]["stderr"]
        assert result.rows[1][column] == {"value": answers[name]["value"], "stderr": answers[name]["stderr"]}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<h3>Answers</h3>" in page and "<h3>Answers side by side</h3>" in page
    assert f"5 layers: {answers['examples'][0]['prompt']}" in page and "4 layers: " in page
    agreements = [rows[name, 5, "none"]["answers"]["agreement"]["value"] for name in ("shortgpt", "reverse")]
    assert any(f", agreement {value:.3f}" in page for value in agreements)
    assert (out / "table.md").read_text(encoding="utf-8").count("\n") == 2 + 5
    assert all(file.stat().st_size > 0 for file in result.files)


def test_a_method_that_stops_early_has_rows_that_say_why(model_folder: Folder, halves: Sizes, tmp_path: Path) -> None:
    model, out = str(model_folder("llama")), tmp_path / "compare"
    methods = "taylor+,come[no_repeat=true]"
    for _ in range(2):  # and the second time it is known
        compare(model, out, methods=methods, layers=[3, 2], **halves)
    rows = rows_of(out)
    assert (
        len((out / "rows.jsonl").read_text(encoding="utf-8").splitlines()) == len(rows) + 1
    )  # the original's again, with its cost
    for layers in (3, 2):
        row = rows["taylor+", layers, "none"]
        assert row["note"].startswith("not reached: this method never drops the first 4")
        assert (row["recipe"], row["parameters"], row["perplexity"]) == (None, None, {})
    assert "not reached" not in (rows["come[no-repeat=true]", 3, "none"]["note"] or "")
    assert "not reached" in rows["come[no-repeat=true]", 2, "none"]["note"]
    assert "not reached" in (out / "table.md").read_text(encoding="utf-8")


def test_methods_share_a_pass(model_folder: Folder, halves: Sizes, tmp_path: Path) -> None:
    model = str(model_folder("llama"))
    methods = [
        "come",
        "shortgpt",
        "sleb",
        "reverse",
        "taylor",
        "come[after_final_norm=true]",
        "mka",
        "come[distance=last-token]",
    ]
    shares = set()

    class Watched(Display):
        def moved(self) -> None:
            super().moved()
            if self._tasks and self._tasks[0].title == "comparing":
                shares.add(self._pace.share)

    with reporting_to(Watched(io.StringIO())):
        result = compare(model, tmp_path / "compare", methods=methods, layers=[4], **halves)
    assert sorted(shares) == pytest.approx([row / 9 for row in range(10)])  # the original's, and one of each method
    rows = rows_of(tmp_path / "compare")
    assert result.passes == 2  # one of them after the final norm
    assert result.shared_layer_forwards == rows["dense", 6, "none"]["layer_forwards"] == 12
    assert result.layer_forwards == pytest.approx(sum(row["layer_forwards"] for row in rows.values()) - 12)
    for name in ("shortgpt", "mka", "reverse"):
        assert rows[name, 4, "none"]["layer_forwards"] == 0
    alone = separately(model, tmp_path / "alone", halves, layers=4, method="sleb")
    assert alone.layer_forwards == rows["sleb", 4, "none"]["layer_forwards"] + 6
    reference = separately(model, tmp_path / "reference", halves, layers=4, method="come[after_final_norm=true]")
    assert reference.layer_forwards == rows["come[after-final-norm=true]", 4, "none"]["layer_forwards"] + 6
    recipe = schema.load(tmp_path / "compare" / rows["come[after-final-norm=true]", 4, "none"]["recipe"])
    assert recipe.layers == Ladder(tmp_path / "reference").recipe(4).layers


def test_more_may_be_asked_for_and_nothing_is_measured_twice(
    model_folder: Folder, halves: Sizes, quiz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = str(model_folder("llama")), tmp_path / "compare"
    measured: list[int] = []

    def counted(recipe: Any, resident: Any) -> Any:
        measured.append(len(recipe.layers))
        return assembled(recipe, resident)

    monkeypatch.setattr("intarsia.evaluation.perplexity.assembled", counted)
    compare(model, out, methods="sleb,sleb[racing=false]", layers=[5], **halves)
    assert measured == [5]  # two ways to one model
    rows = rows_of(out)
    assert rows["sleb", 5, "none"]["perplexity"] == rows["sleb[racing=false]", 5, "none"]["perplexity"]
    compare(model, out, methods="sleb", layers=[5, 4], heal=["none"], **halves)
    assert measured == [5, 4]
    before = (out / "rows.jsonl").read_bytes()
    again = compare(model, out, methods="sleb", layers=[4], **halves)
    assert measured == [5, 4] and (out / "rows.jsonl").read_bytes() == before and again.layer_forwards == 0

    compare(model, out, methods="sleb", layers=[5, 4], tasks=[str(quiz)], task_layers=[4], **halves)
    assert measured == [5, 4, 4]
    rows = rows_of(out)
    assert rows["sleb", 4, "none"]["tasks"]["scores"][0]["n"] == 12
    assert rows["dense", 6, "none"]["tasks"]["scores"][0]["n"] == 12
    assert rows["sleb", 5, "none"]["tasks"] is None
    compare(model, out, methods="sleb", layers=[5, 4], **halves)
    assert measured == [5, 4, 4]
    with pytest.raises(UserError) as caught:
        compare(model, out, methods="sleb", layers=[4], tasks=[str(quiz)], limit=3, **halves)
    assert [_setting(problem) for problem in caught.value.problems] == ["quiz.limit", "quiz.sha256"]


def test_it_heals_as_compress_does_by_any_stages(model_folder: Folder, halves: Sizes, tmp_path: Path) -> None:
    model, out = str(model_folder("llama")), tmp_path / "compare"
    given: Sizes = {"methods": "shortgpt", "layers": [5], **halves}
    light = "closed-form[fit_unchanged=mlp]"
    compare(model, out, heal=("none", "closed-form", light), **given)
    rows = rows_of(out)
    for heal in ("closed-form", light):
        evaluation = EvalSpec(text=(halves["eval_text"].partition("=")[2],), speed=False, answers=2)
        alone = intarsia.compress(
            model,
            Output(path=tmp_path / heal),
            Target(layers=5),
            method="shortgpt",
            heal=heal,
            text=text_of(halves),
            evaluation=evaluation,
        )
        row = rows["shortgpt", 5, heal]
        assert row["recipe_sha256"] == alone.recipe_sha256
    first, second = (rows["shortgpt", 5, heal] for heal in ("closed-form", light))
    assert first["recipe_sha256"] != second["recipe_sha256"]
    assert second["heal_forwards"] < first["heal_forwards"]


def test_other_settings_are_refused(model_folder: Folder, halves: Sizes, text_file: Path, tmp_path: Path) -> None:
    model, out = str(model_folder("llama")), tmp_path / "compare"
    compare(model, out, methods="reverse", layers=[5], **halves)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    other = {**halves, "tokens": 512, "eval_text": f"words={text_file}#0.6:1"}
    with pytest.raises(UserError) as caught:
        compare(model, out, methods="reverse", layers=[5], seed=3, **other)
    places = [_setting(problem) for problem in caught.value.problems]
    assert places == ["eval_texts.words.sha256", "seed", "tokens"]
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_the_same_texts_and_tasks_by_other_paths(
    model_folder: Folder, halves: Sizes, quiz: Path, text_file: Path, tmp_path: Path
) -> None:
    model, out = str(model_folder("llama")), tmp_path / "compare"
    compare(model, out, methods="come", layers=[5], tasks=[str(quiz)], **halves)
    moved = tmp_path / "moved"
    moved.mkdir()
    text, questions = (Path(shutil.copy(file, moved / file.name)) for file in (text_file, quiz))
    elsewhere = {**halves, "calibration": f"{text}#0:0.5", "eval_text": f"words={text}#0.5:1"}
    compare(  # the model's folder too is spelled otherwise
        f"{model}/", out, methods="come,reverse", layers=[4], heal=["closed-form"], tasks=[str(questions)], **elsewhere
    )
    assert set(rows_of(out)) == {
        ("dense", 6, "none"),
        ("come", 5, "none"),
        ("come", 4, "closed-form"),
        ("reverse", 4, "closed-form"),
    }
    assert Ladder(out / "plans" / "come").depths() == [5, 4]

    text.write_text(families.sample_text(5000, seed=9), encoding="utf-8")
    questions.write_text("".join(questions.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        compare(model, out, methods="come", layers=[3], tasks=[str(questions)], **elsewhere)
    assert [_setting(problem) for problem in caught.value.problems] == ["calibration", "eval_texts.words.sha256"]


def test_a_calibration_text_that_changed_under_a_comparison(
    model_folder: Folder, halves: Sizes, text_file: Path, tmp_path: Path
) -> None:
    model, out = str(model_folder("llama")), tmp_path / "compare"
    halves["calibration"] = str(shutil.copy(text_file, tmp_path / "text.txt"))
    compare(model, out, methods="come", layers=[5], **halves)
    Path(halves["calibration"]).write_text(families.sample_text(5000, seed=9), encoding="utf-8")
    with pytest.raises(UserError, match=r"sha256"):  # not even for a method that has no ladder yet
        compare(model, out, methods="mka", layers=[5], **halves)
    assert ("mka", 5, "none") not in rows_of(out) and not (out / "plans" / "mka").exists()


def test_a_config_that_changed_under_a_comparison(halves: Sizes, tmp_path: Path) -> None:
    model, out = families.save(families.make_model("llama"), tmp_path / "model"), tmp_path / "compare"
    compare(str(model), out, methods="reverse", layers=[5], **halves)
    plain = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**plain, "rms_norm_eps": 0.01, "attention_dropout": 0.5}))
    with pytest.raises(UserError) as caught:
        compare(str(model), out, methods="reverse", layers=[4], **halves)
    (problem,) = caught.value.problems
    assert _setting(problem) == "config.rms_norm_eps" and "not 0.01" in problem.message


def test_a_folder_of_something_else(model_folder: Folder, halves: Sizes, tmp_path: Path) -> None:
    model = str(model_folder("llama"))
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thing").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="not a run folder"):
        compare(model, tmp_path / "else", methods="reverse", layers=[5], **halves)


def test_input_that_cannot_be_used(model_folder: Folder, halves: Sizes, quiz: Path, tmp_path: Path) -> None:
    model, out = str(model_folder("llama")), tmp_path / "compare"

    def refused(**changes: Any) -> str:
        given = {"methods": "come", "layers": [5], **halves, **changes}
        with pytest.raises(UserError) as caught:
            compare(model, out, **given)
        assert not out.exists()
        return "\n".join(problem.message for problem in caught.value.problems)

    found = refused(methods="come,nothing,mka[x=1]")
    assert "no method 'nothing'" in found and "mka has no options" in found
    found = refused(heal=["magic", "none", "wonder"])
    assert "no heal stage 'magic'" in found and "no heal stage 'wonder'" in found
    found = refused(eval_windows=[1, 2, -1])
    assert [line.split()[0] for line in found.splitlines()] == ["--eval-windows", "--eval-windows"]
    assert refused(task_layers=[9]).startswith("--task-layers")
    assert refused(layers=[]) == "--layers names no depth."
    assert refused(layers=[6, 0, 5]) == "--layers names 6, 0; the model has 6 layers."
    assert refused(tasks=[str(quiz)], task_layers=[9]) == "--task-layers names 9."
    assert refused(eval_text=[]) == "There is nothing to measure."
    assert refused(methods=[], layers=[]) == "--methods names no method."
    assert refused(methods=[]).splitlines()[-1] == "--layers is given without --methods."
    assert refused(models=[f"come={model}"]) == "Two rows are called 'come'."
    other, tokenizer = families.save(families.make_model("llama"), tmp_path / "other"), families.make_tokenizer()
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(other)
    assert "has another tokenizer than" in refused(models=[str(other)])
    assert refused(eval_text=[halves["eval_text"]] * 2) == "Two --eval-text are called 'words'."
    for name in ("eval_text", "calibration"):
        assert "gone.txt" in refused(**{name: "gone.txt"})
    assert "gone.jsonl" in refused(tasks=["gone.jsonl"])
    assert "--seq-len is 4096" in refused(seq_len=4096, tokens=4096)
    with quiz.open("a", encoding="utf-8") as file:
        file.write('{"query": "a", "choices": ["b", "c"], "gold": 2}\n')
    assert f"{quiz}:13" in refused(tasks=[str(quiz)])


@pytest.mark.exhaustive
def test_a_dry_run_writes_nothing_and_bounds_the_cost(model_folder: Folder, halves: Sizes, tmp_path: Path) -> None:
    model, out = str(model_folder("llama")), tmp_path / "compare"
    methods = (
        "come,come-p,shortgpt,sleb,taylor,magnitude,mka,laco[laco-merge=3],angular,reverse,come[heal_in_loop=true]"
    )
    given: Sizes = {"methods": methods, "layers": [5, 4, 3], "heal": ["none", "closed-form"], **halves}
    dry = compare(model, out, dry_run=True, **given)
    assert not out.exists() and dry.rows is None
    compare(model, out, **given)
    rows = rows_of(out)
    for line in dry.estimate:
        own = [row for row in rows.values() if row["method"] == line["method"]]
        ladders = {(out / row["recipe"]).parents[1] for row in own}
        spent = sum(entry["layer_forwards"] for folder in ladders for entry in Ladder(folder).log())
        assert 0 <= spent <= line["passes_at_most"] * 6 + 1e-9, line["method"]
        assert 0 < sum(row["heal_forwards"] or 0 for row in own) <= line["heal_passes_at_most"] * 6
        assert line["models"] == 6
    passes = {line["method"]: line["passes_at_most"] for line in dry.estimate}
    assert passes["shortgpt"] == passes["reverse"] == passes["angular"] == 0
    # What was healed in the loop is fitted again from two starting points.
    heal = {line["method"]: line["heal_passes_at_most"] for line in dry.estimate}
    assert heal["come"] == 3 * 3 and heal["come[heal-in-loop=true]"] == (2 / 4 + 1) * 3 * 3


COMPARE = """
from tests.commands.test_compare import compare
model, out, text = sys.argv[1:]
compare(
    model, out, methods="come,sleb,laco[laco_merge=3]", layers=[5, 3], heal=["none", "closed-form"],
    calibration=f"{text}#0:0.5", eval_text=f"words={text}#0.5:1", eval_windows=4, tokens=256, seq_len=32,
)
"""


@needs_proc
@pytest.mark.exhaustive  # Ctrl-C in the midst of it: test_golden.py
@pytest.mark.parametrize(
    ("name", "count", "cut"),
    [
        ("rows.jsonl", 1, 50),
        ("rows.jsonl", 4, 80),
        ("log.jsonl", 4, 60),
        ("log.jsonl", 9, 0),
    ],
    ids=["first row", "in a row", "in a ladder", "in a ladder of its own"],
)
def test_killed_and_started_again(
    name: str,
    count: int,
    cut: int,
    model_folder: Folder,
    halves: Sizes,
    text_file: Path,
    cache_here: Path,
    tmp_path: Path,
) -> None:
    model, out = str(model_folder("llama")), tmp_path / "killed"
    kill_within(name, count, cut, COMPARE, model, out, text_file, cache=cache_here)
    assert (out / "rows.jsonl").read_bytes().count(b"\n") < 13 and not (out / "table.csv").exists()
    given: Sizes = {
        "methods": "come,sleb,laco[laco_merge=3]",
        "layers": [5, 3],
        "heal": ["none", "closed-form"],
        **halves,
    }
    compare(model, out, **given)
    compare(model, tmp_path / "undisturbed", **given)
    drop = ("layer_forwards", "plan_seconds", "heal_seconds")
    found = [
        {key: {name: value for name, value in row.items() if name not in drop} for key, row in rows_of(each).items()}
        for each in (out, tmp_path / "undisturbed")
    ]
    assert found[0] == found[1] and len(found[0]) == 13


def test_command(model_folder: Folder, halves: Sizes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "compare"
    words = ["compare", str(model_folder("llama")), "-o", str(out), "--methods", "shortgpt,come[norm=average]"]
    words += [
        "--layers",
        "5,4",
        "--heal",
        "none,closed-form",
        "--eval-text",
        halves["eval_text"],
        "--eval-windows",
        "4",
    ]
    words += ["--calibration", halves["calibration"], "--tokens", "256", "--seq-len", "32", "--answers", "2"]
    main.run([*words, "--dry-run", "--json"])
    assert [line["method"] for line in json.loads(capsys.readouterr().out)["estimate"]] == [
        "shortgpt",
        "come[norm=average]",
    ]
    assert not out.exists()

    main.run([*words, "--json"])
    data = json.loads(capsys.readouterr().out)
    assert len(data["rows"]) == 1 + 2 * 2 * 2 and data["passes"] == 1
    assert data["rows"][1]["words"]["value"] == rows_of(out)["shortgpt", 5, "none"]["perplexity"]["words"]["value"]

    main.run(words)
    assert "come[norm=average]" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main.run([*words, "--layers", "five"])
    assert caught.value.code == 2 and "--layers" in capsys.readouterr().err


def test_help_shows_how_options_of_methods_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.run(["compare", "--help"])
    assert "come-p[spans=1]" in "".join(capsys.readouterr())


def test_models_that_exist_already(model_folder: Folder, halves: Sizes, quiz: Path, tmp_path: Path) -> None:
    """Each has the row that its recipe has; one that has changed is measured again."""
    model, out, five = str(model_folder("llama")), tmp_path / "compare", tmp_path / "five"
    compare(model, out, methods="shortgpt", layers=[5], tasks=[str(quiz)], **halves)
    intarsia.build(out / "plans" / "shortgpt", five, layers=5)
    compare(model, out, models=[f"mine={five}", str(five)], tasks=[str(quiz)], **halves)
    rows = rows_of(out)
    assert set(rows) == {("dense", 6, "none"), ("shortgpt", 5, "none"), ("mine", 5, "none"), ("five", 5, "none")}
    planned, mine = rows["shortgpt", 5, "none"], rows["mine", 5, "none"]
    for name in ("perplexity", "answers", "parameters", "bytes"):
        assert mine[name] == rows["five", 5, "none"][name] == planned[name]
    assert mine["tasks"]["scores"] == planned["tasks"]["scores"]
    assert mine["tasks"]["retention"]["mean"] == planned["tasks"]["retention"]["mean"]
    lines = (out / "rows.jsonl").read_bytes()
    again = compare(model, out, models=[f"mine={five}"], tasks=[str(quiz)], **halves)
    assert (out / "rows.jsonl").read_bytes() == lines
    assert {"figure-words.svg", "figure-mean.svg"} <= {file.name for file in again.files}
    other = families.save(families.make_model("llama", seed=3), tmp_path / "other")
    compare(model, tmp_path / "alone", models=[f"mine={other}"], **halves)
    facts = json.loads((tmp_path / "alone" / "compare.json").read_text(encoding="utf-8"))
    assert facts["calibration"] is None  # nothing was calibrated, so no text was read
    compare(model, out, models=[f"mine={other}"], **halves)
    assert rows_of(out)["mine", 6, "none"]["perplexity"] == rows_of(tmp_path / "alone")["mine", 6, "none"]["perplexity"]


def _setting(problem: Problem) -> str:
    """The name of a setting that a resumed comparison has otherwise."""
    return problem.message.split(" with ")[1].split(" ")[0]
