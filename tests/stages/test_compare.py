"""A comparison on a tiny model: its numbers are those of the stages one by one, and it continues wherever it stops."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import intarsia
from intarsia.building.assembled import assembled
from intarsia.checkpoint.reader import Checkpoint
from intarsia.cli.app import app
from intarsia.errors import UserError
from intarsia.healing.settings import ClosedFormSettings
from intarsia.pruning.ladder import Ladder
from intarsia.pruning.methods.come import ComeSettings
from intarsia.pruning.methods.come_p import ComePSettings
from intarsia.pruning.methods.laco import LacoSettings
from intarsia.recipe import schema
from intarsia.stages import compare_judge
from intarsia.stages.evaluate_tasks import evaluate_tasks
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


def rows_of(out: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    lines = map(json.loads, (out / "rows.jsonl").read_text(encoding="utf-8").splitlines())
    return {(row["method"], row["layers"], row["heal"]): row for row in lines}


def separately(model: str, run: Path, halves: Sizes, **given: Any) -> intarsia.PlanResult:
    return intarsia.plan(model, run, **{name: halves[name] for name in ("calibration", "tokens", "seq_len")}, **given)


def perplexity_of(folder: Path | str, halves: Sizes) -> float:
    text = halves["eval_text"].partition("=")[2]
    return intarsia.evaluate_perplexity(str(folder), text, seq_len=32, windows=4).value


def test_the_numbers_are_those_of_the_stages_one_by_one(
    model_folder: Folder, halves: Sizes, quiz: Path, tmp_path: Path
) -> None:
    model, out = str(model_folder("llama")), tmp_path / "compare"
    result = intarsia.compare(
        model,
        out,
        methods="come,mka,laco[merge=3],come-p[granularity=4,norm=average],sleb[heal_in_loop=true]",
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
    for name, method, settings in (
        ("come", "come", None),
        ("mka", "mka", None),
        ("laco[merge=3]", "laco", LacoSettings(merge=3)),
        ("come-p[granularity=4,norm=average]", "come-p", ComePSettings(granularity=4, norm="average")),
        ("sleb[heal_in_loop=true]", "sleb", None),
    ):
        for layers in (5, 4, 3):
            run, in_loop = tmp_path / f"{method}-{layers}", "in_loop" in name
            planned = separately(
                model, run, halves, layers=layers, method=method, settings=settings, heal_in_loop=in_loop
            )
            built = intarsia.build(run, tmp_path / "built", overwrite=True)
            row = rows[name, layers, "none"]
            assert schema.content_hash(schema.load(out / row["recipe"])) == built.recipe_sha256 == row["recipe_sha256"]
            assert row["perplexity"]["words"]["value"] == perplexity_of(built.out, halves)
            assert row["parameters"] == built.parameters
            assert row["bytes"] == Checkpoint.open(built.out, model="built").nbytes
            assert row["layer_forwards"] == pytest.approx(planned.layer_forwards - 6)  # the shared pass
            assert row["heal"] == "none" and row["heal_seconds"] is None

            healed = rows[name, layers, "closed-form"]
            rebuilt = intarsia.build(out / healed["recipe"], tmp_path / "rebuilt", overwrite=True)
            assert healed["perplexity"]["words"]["value"] == perplexity_of(rebuilt.out, halves)
            assert healed["heal_seconds"] > 0 and healed["heal_forwards"] > 0

            assert (row["tasks"] is not None) == (layers == 4)
            if layers == 4:
                alone = evaluate_tasks(str(built.out), [str(quiz)], against=model)
                for key in ("metrics", "outcomes", "items_sha256"):
                    assert row["tasks"]["scores"][0][key] == alone.to_dict()["scores"][0][key]
                assert alone.retention is not None
                assert row["tasks"]["retention"]["mean"] == alone.retention.to_dict()["mean"]
    assert rows["laco[merge=3]", 5, "none"]["note"] == "a ladder of its own"
    assert rows["laco[merge=3]", 4, "none"]["note"] is None
    assert Ladder(out / "plans" / "laco-merge-3-to-003").depths() == [4, 3]
    assert Ladder(out / "plans" / "laco-merge-3-to-005").depths() == [5]
    assert Ladder(out / "plans" / "come").depths() == [5, 4, 3]
    assert result.passes == 1


def test_what_stands_beside_the_rows(model_folder: Folder, halves: Sizes, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "compare"
    halves["eval_text"] = [halves["eval_text"], f"{text_file}#0.9:1"]
    halves["eval_windows"] = [4, 2]
    result = intarsia.compare(
        str(model_folder("llama")), out, methods="shortgpt,reverse", layers=[5, 4], speed=True, **halves
    )
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
    assert {"table.csv", "table.md", "figure-words.svg", "figure-words-speed.svg", "report.html"} <= names
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
    assert (out / "table.md").read_text(encoding="utf-8").count("\n") == 2 + 5
    assert all(file.stat().st_size > 0 for file in result.files)


def test_a_method_that_stops_early_has_rows_that_say_why(model_folder: Folder, halves: Sizes, tmp_path: Path) -> None:
    model, out = str(model_folder("llama")), tmp_path / "compare"
    methods = "taylor+,come[no_repeat=true]"
    for _ in range(2):  # and the second time it is known
        intarsia.compare(model, out, methods=methods, layers=[3, 2], **halves)
    rows = rows_of(out)
    assert len((out / "rows.jsonl").read_text(encoding="utf-8").splitlines()) == len(rows) + 1  # dense told its cost
    for layers in (3, 2):
        row = rows["taylor+", layers, "none"]
        assert row["note"].startswith("not reached: this method never drops the first 4")
        assert (row["recipe"], row["parameters"], row["perplexity"]) == (None, None, {})
    assert rows["come[no_repeat=true]", 3, "none"]["note"] is None
    assert "not reached" in rows["come[no_repeat=true]", 2, "none"]["note"]
    assert "not reached" in (out / "table.md").read_text(encoding="utf-8")


def test_methods_share_a_pass(model_folder: Folder, halves: Sizes, tmp_path: Path) -> None:
    model = str(model_folder("llama"))
    methods = [
        "come",
        "shortgpt",
        "sleb",
        "reverse",
        "taylor",
        "come[reference=true]",
        "mka",
        "come[distance=last-token]",
    ]
    result = intarsia.compare(model, tmp_path / "compare", methods=methods, layers=[4], **halves)
    rows = rows_of(tmp_path / "compare")
    assert result.passes == 2  # one of them behind the final norm
    assert result.shared_layer_forwards == rows["dense", 6, "none"]["layer_forwards"] == 12
    assert result.layer_forwards == pytest.approx(sum(row["layer_forwards"] for row in rows.values()) - 12)
    for name in ("shortgpt", "mka", "reverse"):
        assert rows[name, 4, "none"]["layer_forwards"] == 0
    alone = separately(model, tmp_path / "alone", halves, layers=4, method="sleb")
    assert alone.layer_forwards == rows["sleb", 4, "none"]["layer_forwards"] + 6
    reference = separately(
        model, tmp_path / "reference", halves, layers=4, method="come", settings=ComeSettings(reference=True)
    )
    assert reference.layer_forwards == rows["come[reference=true]", 4, "none"]["layer_forwards"] + 6
    recipe = schema.load(tmp_path / "compare" / rows["come[reference=true]", 4, "none"]["recipe"])
    assert recipe.layers == Ladder(tmp_path / "reference").recipe(4).layers


def test_more_may_be_asked_for_and_nothing_is_measured_twice(
    model_folder: Folder, halves: Sizes, quiz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = str(model_folder("llama")), tmp_path / "compare"
    judged: list[int] = []

    def counted(recipe: Any, resident: Any) -> Any:
        judged.append(len(recipe.layers))
        return assembled(recipe, resident)

    monkeypatch.setattr(compare_judge, "assembled", counted)
    intarsia.compare(model, out, methods="come,come[norm=fold]", layers=[5], **halves)
    assert judged == [5]  # two names for one model
    rows = rows_of(out)
    assert rows["come", 5, "none"]["perplexity"] == rows["come[norm=fold]", 5, "none"]["perplexity"]
    intarsia.compare(model, out, methods="come", layers=[5, 4], heal=["none"], **halves)
    assert judged == [5, 4]
    before = (out / "rows.jsonl").read_bytes()
    again = intarsia.compare(model, out, methods="come", layers=[4], **halves)
    assert judged == [5, 4] and (out / "rows.jsonl").read_bytes() == before and again.layer_forwards == 0

    intarsia.compare(model, out, methods="come", layers=[5, 4], tasks=[str(quiz)], task_layers=[4], **halves)
    assert judged == [5, 4, 4]
    rows = rows_of(out)
    assert rows["come", 4, "none"]["tasks"]["scores"][0]["n"] == 12
    assert rows["dense", 6, "none"]["tasks"]["scores"][0]["n"] == 12
    assert rows["come", 5, "none"]["tasks"] is None
    intarsia.compare(model, out, methods="come", layers=[5, 4], **halves)
    assert judged == [5, 4, 4]
    with pytest.raises(UserError) as caught:
        intarsia.compare(model, out, methods="come", layers=[4], tasks=[str(quiz)], limit=3, **halves)
    assert [problem.where.rpartition(": ")[2] for problem in caught.value.problems] == ["tasks"]


def test_it_fits_as_compress_does_or_as_told(model_folder: Folder, halves: Sizes, tmp_path: Path) -> None:
    model = str(model_folder("llama"))
    given: Sizes = {**halves, "eval_text": halves["eval_text"].partition("=")[2], "method": "shortgpt", "layers": 5}
    told: Sizes = {"methods": "shortgpt", "layers": [5], "heal": ["closed-form"], **halves}
    alone = intarsia.compress(model, tmp_path / "alone", **given)
    intarsia.compare(model, tmp_path / "compare", **told)
    row = rows_of(tmp_path / "compare")["shortgpt", 5, "closed-form"]
    assert row["recipe_sha256"] == alone.recipe_sha256
    fitted = schema.load(tmp_path / "compare" / row["recipe"]).provenance["heal"]["settings"]["closed-form"]
    assert fitted["unchanged"] == ["mlp", "attention"]

    light = ClosedFormSettings(unchanged=("mlp",))
    with pytest.raises(UserError, match=r"closed_form\.unchanged") as caught:
        intarsia.compare(model, tmp_path / "compare", closed_form=light, **told)
    assert [problem.found for problem in caught.value.problems if "unchanged" in problem.where] == ["['mlp']"]
    intarsia.compare(model, tmp_path / "light", closed_form=light, **told)
    other = rows_of(tmp_path / "light")["shortgpt", 5, "closed-form"]
    lighter = intarsia.compress(model, tmp_path / "lighter", closed_form=light, **given)
    assert other["recipe_sha256"] == lighter.recipe_sha256 != row["recipe_sha256"]
    assert other["heal_forwards"] < row["heal_forwards"]


def test_other_settings_are_refused(model_folder: Folder, halves: Sizes, text_file: Path, tmp_path: Path) -> None:
    model, out = str(model_folder("llama")), tmp_path / "compare"
    intarsia.compare(model, out, methods="reverse", layers=[5], **halves)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    other = {**halves, "tokens": 512, "eval_text": f"words={text_file}#0.6:1"}
    with pytest.raises(UserError) as caught:
        intarsia.compare(model, out, methods="reverse", layers=[5], seed=3, **other)
    places = [problem.where.rpartition(": ")[2] for problem in caught.value.problems]
    assert places == ["eval_texts", "settings.seed", "settings.tokens"]
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_the_same_texts_and_tasks_by_other_paths(
    model_folder: Folder, halves: Sizes, quiz: Path, text_file: Path, tmp_path: Path
) -> None:
    model, out = str(model_folder("llama")), tmp_path / "compare"
    intarsia.compare(model, out, methods="come", layers=[5], tasks=[str(quiz)], **halves)
    moved = tmp_path / "moved"
    moved.mkdir()
    text, questions = (Path(shutil.copy(file, moved / file.name)) for file in (text_file, quiz))
    elsewhere = {**halves, "calibration": f"{text}#0:0.5", "eval_text": f"words={text}#0.5:1"}
    intarsia.compare(  # the model's folder too is spelled otherwise
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
        intarsia.compare(model, out, methods="come", layers=[3], tasks=[str(questions)], **elsewhere)
    places = [problem.where.rpartition(": ")[2] for problem in caught.value.problems]
    assert places == ["eval_texts", "settings.calibration", "tasks"]


def test_a_calibration_text_that_changed_under_a_comparison(
    model_folder: Folder, halves: Sizes, text_file: Path, tmp_path: Path
) -> None:
    model, out = str(model_folder("llama")), tmp_path / "compare"
    halves["calibration"] = str(shutil.copy(text_file, tmp_path / "text.txt"))
    intarsia.compare(model, out, methods="come", layers=[5], **halves)
    Path(halves["calibration"]).write_text(families.sample_text(5000, seed=9), encoding="utf-8")
    with pytest.raises(UserError, match=r"calibration sha256"):  # not even for a method that has no ladder yet
        intarsia.compare(model, out, methods="mka", layers=[5], **halves)
    assert ("mka", 5, "none") not in rows_of(out) and not (out / "plans" / "mka").exists()


def test_a_config_that_changed_under_a_comparison(halves: Sizes, tmp_path: Path) -> None:
    model, out = families.save(families.make_model("llama"), tmp_path / "model"), tmp_path / "compare"
    intarsia.compare(str(model), out, methods="reverse", layers=[5], **halves)
    plain = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**plain, "rms_norm_eps": 0.01, "attention_dropout": 0.5}))
    with pytest.raises(UserError) as caught:
        intarsia.compare(str(model), out, methods="reverse", layers=[4], **halves)
    (problem,) = caught.value.problems
    assert problem.where.endswith("compare.json: config.rms_norm_eps") and problem.found == "0.01"


def test_a_folder_of_something_else(model_folder: Folder, halves: Sizes, tmp_path: Path) -> None:
    model = str(model_folder("llama"))
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thing").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="something else"):
        intarsia.compare(model, tmp_path / "else", methods="reverse", layers=[5], **halves)


def test_input_that_cannot_be_used(model_folder: Folder, halves: Sizes, quiz: Path, tmp_path: Path) -> None:
    model, out = str(model_folder("llama")), tmp_path / "compare"

    def refused(**changes: Any) -> list[str]:
        given = {"methods": "come", "layers": [5], **halves, **changes}
        with pytest.raises(UserError) as caught:
            intarsia.compare(model, out, **given)
        assert not out.exists()
        return [problem.where for problem in caught.value.problems]

    assert refused(methods="come,nothing,mka[x=1]") == ["--methods nothing", "--methods mka[x=1]"]
    assert refused(layers=[], heal=["none", "magic"], eval_windows=[1, 2, 0], task_layers=[9]) == [
        "--layers",
        "--heal",
        "--eval-windows",
        "--eval-windows",
        "--task-layers",
        "--task-layers",
    ]
    assert refused(layers=[6, 0, 5]) == ["--layers"]
    assert refused(eval_text=[]) == ["--eval-text"]
    assert refused(eval_text=[halves["eval_text"]] * 2) == [f"--eval-text {halves['eval_text']}"]
    assert refused(eval_text="gone.txt")[0].startswith("text source")
    assert refused(tasks=["gone.jsonl"]) == ["task file gone.jsonl"]
    assert refused(calibration="gone.txt")[0].startswith("text source")
    assert refused(seq_len=4096) == ["--seq-len"]
    with quiz.open("a", encoding="utf-8") as file:
        file.write('{"query": "a", "choices": ["b", "c"], "gold": 2}\n')
    assert refused(tasks=[str(quiz)]) == [f"{quiz}:13, gold"]


def test_a_dry_run_writes_nothing_and_bounds_the_cost(model_folder: Folder, halves: Sizes, tmp_path: Path) -> None:
    model, out = str(model_folder("llama")), tmp_path / "compare"
    methods = "come,come-p,shortgpt,sleb,taylor,magnitude,mka,laco[merge=3],angular,reverse,come[heal_in_loop=true]"
    given: Sizes = {"methods": methods, "layers": [5, 4, 3], "heal": ["none", "closed-form"], **halves}
    dry = intarsia.compare(model, out, dry_run=True, **given)
    assert not out.exists() and dry.rows is None
    intarsia.compare(model, out, **given)
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
    assert heal["come"] == 3 * 3 and heal["come[heal_in_loop=true]"] == 2 * 3 * 3


COMPARE = """
import intarsia
model, out, text = sys.argv[1:]
intarsia.compare(
    model, out, methods="come,sleb,laco[merge=3]", layers=[5, 3], heal=["none", "closed-form"],
    calibration=f"{text}#0:0.5", eval_text=f"words={text}#0.5:1", eval_windows=4, tokens=256, seq_len=32,
)
"""


@needs_proc
@pytest.mark.parametrize(
    ("name", "count", "cut"),
    [("rows.jsonl", 1, 50), ("rows.jsonl", 4, 80), ("log.jsonl", 4, 60), ("log.jsonl", 9, 0)],
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
        "methods": "come,sleb,laco[merge=3]",
        "layers": [5, 3],
        "heal": ["none", "closed-form"],
        **halves,
    }
    intarsia.compare(model, out, **given)
    intarsia.compare(model, tmp_path / "undisturbed", **given)
    drop = ("layer_forwards", "plan_seconds", "heal_seconds")
    found = [
        {key: {name: value for name, value in row.items() if name not in drop} for key, row in rows_of(each).items()}
        for each in (out, tmp_path / "undisturbed")
    ]
    assert found[0] == found[1] and len(found[0]) == 13


def test_command(model_folder: Folder, halves: Sizes, tmp_path: Path) -> None:
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
    words += ["--calibration", halves["calibration"], "--tokens", "256", "--seq-len", "32"]
    dry = CliRunner().invoke(app, [*words, "--dry-run", "--json"])
    assert dry.exit_code == 0, dry.output
    assert [line["method"] for line in json.loads(dry.stdout)["estimate"]] == ["shortgpt", "come[norm=average]"]
    assert not out.exists()

    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert len(data["rows"]) == 1 + 2 * 2 * 2 and data["passes"] == 1
    assert data["rows"][1]["words"]["value"] == rows_of(out)["shortgpt", 5, "none"]["perplexity"]["words"]["value"]

    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0 and "come[norm=average]" in shown.stdout
    wrong = CliRunner().invoke(app, [*words[:-1], "32", "--layers", "five"])
    assert wrong.exit_code == 2 and "--layers" in wrong.output and "Traceback" not in wrong.output


def test_help_shows_how_options_of_methods_are_written() -> None:
    shown = CliRunner().invoke(app, ["compare", "--help"], env={"COLUMNS": "200"}, terminal_width=200)
    assert shown.exit_code == 0 and "come-p[spans=1]" in shown.stdout
