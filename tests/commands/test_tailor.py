"""A search over tiny models, from a family file to a built and scored incumbent."""

from __future__ import annotations

import json
import random
import shutil
from math import comb, log10
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import intarsia
from intarsia.checkpoint.reader import Checkpoint
from intarsia.cli import main as cli
from intarsia.commands import tailor as command
from intarsia.commands.tailor import FinalOptions, SearchOptions, TailorResult
from intarsia.errors import UserError
from intarsia.healing import closed_form
from intarsia.options import Runtime
from intarsia.recipe import schema
from intarsia.recipe.recipe import Concat, Recipe
from intarsia.tailoring.candidate import Join
from intarsia.tailoring.evaluator import Evaluator, rest_of, unseen
from intarsia.tailoring.family import open_family
from intarsia.tailoring.family_file import read_family_file
from intarsia.tailoring.recipes import trial_recipe
from intarsia.tailoring.run import TailorRun
from tests import families
from tests.conftest import Folder
from tests.killing import kill_within, needs_proc

FAMILY = """
base: {base}
variants:
  math: {math}
target: {{layers: 4}}
operations: [remove, select, merge, concat]
merge: {{methods: [task_arithmetic, slerp]}}
objectives:
  - {{name: prose, loss: {text}, split: "0:0.5"}}
  - {{name: quiz, task: {quiz}, split: "0:0.5"}}
search:
  {{engine: evolve, trials: 12, min_budget: 4, max_budget: 12, eta: 3, seed: 0, warm_start: [random-middle, shortgpt]}}
"""


def tailor(
    source: Path, out: Path | None = None, *, engine: str | None = None, result: bool = True, **given: Any
) -> TailorResult:
    """A search on the CPU with little calibration text."""
    return command.tailor(
        source,
        out,
        engine=engine,
        search=SearchOptions(**{"tokens": 512, **given}),
        runtime=Runtime(device="cpu"),
        final=FinalOptions(build=result, score=result),
    )


@pytest.fixture(scope="session")
def parts(model_folder: Folder, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, a variant of it, a text and questions."""
    folder = tmp_path_factory.mktemp("family")
    base = model_folder("llama")
    model = families.make_model("llama")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    math = families.save(model, folder / "math")
    words = text_file.read_text(encoding="utf-8").split()
    rng = random.Random(0)
    lines = [
        json.dumps({"query": " ".join(rng.sample(words, 4)), "choices": rng.sample(words, 2), "gold": n % 2})
        for n in range(48)
    ]
    (folder / "quiz.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"base": base, "math": math, "text": text_file, "quiz": folder / "quiz.jsonl"}


@pytest.fixture
def family(parts: dict[str, Path], tmp_path: Path) -> Path:
    return write_family(parts, tmp_path / "family.yaml")


def write_family(parts: dict[str, Path], path: Path, **changes: str) -> Path:
    text = FAMILY.format(**{name: str(part) for name, part in parts.items()})
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def searched(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TailorResult]:
    """A finished search; tests must not change it."""
    folder = tmp_path_factory.mktemp("searched")
    family = write_family(parts, folder / "family.yaml")
    return folder / "run", tailor(family, folder / "run")


def trials_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "trials.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "layer_forwards")} for line in lines]


def test_a_search(searched: tuple[Path, TailorResult]) -> None:
    run, result = searched
    assert (result.trials, result.failed, result.stopped) == (12, 0, None)
    trials = trials_of(run)
    assert {trial["origin"] for trial in trials} >= {"warm start: random-middle", "promotion"}
    assert {trial["budget"] for trial in trials} == {4, 12}
    assert (run / "plans" / "shortgpt" / "settings.json").exists()
    front = json.loads((run / "front.json").read_text(encoding="utf-8"))
    assert front["objectives"] == ["prose", "quiz"]
    assert result.report == run / "report.html"
    assert f"trial {front['knee']} is the knee" in result.report.read_text(encoding="utf-8")
    assert result.front is not None
    costs = [tuple(trial["costs"]) for trial in trials if trial["budget"] == 12]
    for point in front["points"]:
        own = tuple(point["costs"].values())
        assert own in costs
        assert not any(all(a <= b for a, b in zip(other, own, strict=True)) and other != own for other in costs)


def test_the_incumbent_is_built_and_scored(searched: tuple[Path, TailorResult], parts: dict[str, Path]) -> None:
    run, result = searched
    assert result.front is not None and result.evaluated is not None and result.best == run / "best"
    knee = result.front.knee
    built = Checkpoint.open(run / "best", model="best")
    assert built.architecture.n_layers == 4
    recipe = schema.load(run / "best" / "recipe" / "recipe.yaml")
    assert schema.content_hash(recipe) == knee.recipe == result.evaluated["recipe"]
    assert recipe.provenance["settings"]["trial"] == knee.number
    rows = {row["model"]: row for row in result.evaluated["rows"]}
    assert (rows["base"]["layers"], rows["incumbent"]["layers"]) == (6, 4)
    assert result.evaluated["examples"]["quiz"] == 24  # the other half of 48
    assert rows["base"]["prose"]["value"] != rows["incumbent"]["prose"]["value"]


def test_any_trial_can_be_built(searched: tuple[Path, TailorResult], tmp_path: Path) -> None:
    run, result = searched
    assert result.front is not None
    trials = trials_of(run)
    for place, (choice, number) in enumerate(
        [
            ({"best": "quiz"}, result.front.best("quiz").number),
            ({"knee": True}, result.front.knee.number),
            ({"trial": 3}, 3),
            ({}, result.front.knee.number),
        ]
    ):
        built = intarsia.build(run, tmp_path / str(place), **choice)  # type: ignore[arg-type]
        assert built.recipe_sha256 == trials[number]["recipe"]


@pytest.mark.parametrize(
    ("choice", "where"),
    [
        ({"best": "poetry"}, "--best"),
        ({"trial": 99}, "--trial"),
        ({"best": "quiz", "knee": True}, "--best"),
        ({"layers": 4, "knee": True}, "--best, --knee and --trial"),
    ],
)
def test_what_cannot_be_built(
    searched: tuple[Path, TailorResult], tmp_path: Path, choice: dict[str, Any], where: str
) -> None:
    with pytest.raises(UserError, match=where):
        intarsia.build(searched[0], tmp_path / "out", **choice)
    assert not (tmp_path / "out").exists()


def test_stopped_and_continued(searched: tuple[Path, TailorResult], family: Path, tmp_path: Path) -> None:
    """Five trials, then the rest: the log of an undisturbed search, whatever was cut off."""
    run = tmp_path / "run"
    tailor(family, run, trials=5, result=False)
    log = run / "trials.jsonl"
    assert len(trials_of(run)) == 5
    log.write_bytes(log.read_bytes()[:-40])
    tailor(family, run, trials=12, result=False)
    assert trials_of(run) == trials_of(searched[0])


def test_half_layers(parts: dict[str, Path], tmp_path: Path) -> None:
    """A search for drops of half layers, from the command line to a built trial; pieces are not measured for it."""
    changes = {"merge, concat]": "half-layers]", "merge: {methods: [task_arithmetic, slerp]}\n": "", ", shortgpt": ""}
    family = write_family(parts, tmp_path / "family.yaml", **changes)
    cli.run(["tailor", str(family), "-o", str(tmp_path / "run"), "--device", "cpu", "--no-score", "--no-build"])
    run = TailorRun(tmp_path / "run")
    halves = [trial for trial in run.trials if Join(first="base", second="math") in trial.candidate.choices]
    assert halves and not (run.path / "sensitivities.safetensors").exists()
    built = intarsia.build(run.path, tmp_path / "built", trial=halves[0].number)
    assert built.recipe_sha256 == halves[0].recipe
    cuts = [
        len(op.cuts)
        for op in schema.load(tmp_path / "built" / "recipe" / "recipe.yaml").layers
        if isinstance(op, Concat)
    ]
    assert cuts and set(cuts) == {2}


def test_more_trials(family: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tailor(family, run, trials=4, result=False)
    before = trials_of(run)
    again = tailor(run, more_trials=3, result=False)
    assert again.trials == 7
    assert trials_of(run)[:4] == before
    assert tailor(run, result=False).trials == 7
    # Stopped before the wanted number of trials: the same call continues to the same end.
    TailorRun(run).want(9)
    assert tailor(run, more_trials=2, result=False).trials == 9


def test_a_changed_family_is_refused(
    searched: tuple[Path, TailorResult], parts: dict[str, Path], tmp_path: Path
) -> None:
    changed = write_family(
        parts, tmp_path / "family.yaml", **{"eta: 3": "eta: 2", "layers: 4": "layers: 3", "trials: 12": "trials: 13"}
    )
    before = (searched[0] / "trials.jsonl").read_bytes()
    with pytest.raises(UserError) as caught:
        tailor(changed, searched[0])
    assert [problem.message for problem in caught.value.problems] == [
        "This run was started with family.search.eta 3, not 2.",
        "This run was started with family.target.layers 4, not 3.",
    ]
    assert (searched[0] / "trials.jsonl").read_bytes() == before


def test_earlier_trials_are_taken_over(
    searched: tuple[Path, TailorResult], parts: dict[str, Path], tmp_path: Path
) -> None:
    run, _ = searched
    path = write_family(
        parts, tmp_path / "family.yaml", **{"[random-middle, shortgpt]": f"[{run}]", "seed: 0": "seed: 0"}
    )
    result = tailor(path, tmp_path / "run", trials=4, result=False)
    assert result.trials == 4
    log, old = trials_of(tmp_path / "run"), trials_of(run)
    taken = [trial for trial in log if trial["engine"] == "earlier"]
    assert [(trial["recipe"], trial["budget"], trial["costs"]) for trial in taken] == [
        (trial["recipe"], trial["budget"], trial["costs"]) for trial in old
    ]
    keys = [(trial["recipe"], trial["budget"]) for trial in log]
    assert len(set(keys)) == len(keys) == 16


def test_dry_run_reads_config_files_alone(parts: dict[str, Path], tmp_path: Path) -> None:
    for name in ("base", "math"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((parts[name] / "config.json").read_bytes())
    path = write_family({**parts, "base": tmp_path / "base", "math": tmp_path / "math"}, tmp_path / "family.yaml")
    result = tailor(path, tmp_path / "run", dry_run=True)
    assert not (tmp_path / "run").exists()
    assert result.predicted.stages == (
        {"budget": 4, "trials": 9, "examples": 72},
        {"budget": 12, "trials": 3, "examples": 72},
    )
    assert result.predicted.layer_passes == 144 * 4
    assert "10^" in result.to_dict()["space"]


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
    "vocab_size": 32000,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def test_the_example_of_13_billion_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hub, on config files that lie in a folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "tailor-llama-2-13b.yaml"
    file = read_family_file(recipe)
    for member in file.members.values():
        folder = tmp_path / member.model
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    result = tailor(recipe, configs=tmp_path, dry_run=True)
    assert (result.predicted.space.depth, result.predicted.space.target) == (40, 30)  # a quarter
    # C(40, 10) subsets; a layer: 4 whole members, or task arithmetic of 1 to 3 variants with 15 values other than 0
    # (14 for one variant, whose whole difference is a member), each with one of 9 scales.
    keeps = (4 + 3 * 14 + 3 * 15 + 15) * 9
    assert result.predicted.space.log10_size == pytest.approx(log10(comb(40, 10)) + 30 * log10(keeps))
    (tmp_path / file.variants["math"].model / "config.json").write_text(
        json.dumps({**LLAMA, "num_hidden_layers": 32}), encoding="utf-8"
    )
    with pytest.raises(UserError) as caught:
        tailor(recipe, configs=tmp_path, dry_run=True)
    assert caught.value.problems[0].message.startswith("Variant math (WizardLMTeam/WizardMath-13B-V1.0)")


def test_a_changed_family_is_refused_before_a_model_is_loaded(
    searched: tuple[Path, TailorResult], parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*given: Any, **more: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("intarsia.tailoring.evaluator.Evaluator", loaded)
    changed = write_family(parts, tmp_path / "family.yaml", **{"layers: 4": "layers: 3", "slerp": "linear"})
    with pytest.raises(UserError) as caught:
        tailor(changed, searched[0])
    changed_settings = [problem.message.split()[5] for problem in caught.value.problems]
    assert changed_settings == ["family.merge.methods", "family.target.layers"]


def test_a_config_that_changed_under_a_search(parts: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(parts["base"], tmp_path / "base"))
    path = write_family({**parts, "base": base}, tmp_path / "family.yaml")
    tailor(path, tmp_path / "run", trials=2, result=False)
    plain = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**plain, "rms_norm_eps": 0.01}))
    with pytest.raises(UserError) as caught:
        tailor(tmp_path / "run", more_trials=1, result=False)
    assert "started with config.rms_norm_eps" in str(caught.value)


def test_a_search_goes_on_wherever_the_command_runs(
    parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder keeps absolute paths."""
    monkeypatch.chdir(parts["quiz"].parent)
    named = {**parts, "math": Path("math"), "quiz": Path("quiz.jsonl")}
    path = write_family(named, tmp_path / "family.yaml", **{"[random-middle, shortgpt]": "[random-middle]"})
    tailor(path, tmp_path / "run", trials=2, result=False)
    kept = read_family_file(tmp_path / "run" / "family.yaml")
    assert kept.variants["math"].model == str(parts["math"].resolve())
    assert [each.source for each in kept.objectives] == [str(parts[name].resolve()) for name in ("text", "quiz")]
    monkeypatch.chdir(tmp_path)
    again = tailor(tmp_path / "run", more_trials=1, result=False)
    assert again.trials == 3


def test_a_search_that_goes_on_does_not_measure_the_base_again(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    tailor(family, run, trials=1, result=False)
    settings = (run / "tailor.json").read_bytes()
    assert set(json.loads(settings)["base"]) == {"prose", "quiz"}

    def probe(*given: Any) -> None:
        raise AssertionError("the base was measured")

    monkeypatch.setattr("intarsia.tailoring.evaluator.Evaluator.probe", probe)
    assert tailor(run, more_trials=1, result=False).trials == 2
    assert (run / "tailor.json").read_bytes() == settings


def test_what_is_shown_of_a_text_in_a_column(parts: dict[str, Path], tmp_path: Path) -> None:
    """Members are measured on the objectives' own texts, whatever names these."""
    words = parts["text"].read_text(encoding="utf-8")
    pages = [{"title": "page", "body": words[start : start + 800]} for start in range(0, len(words), 800)]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages), encoding="utf-8")
    named = {**parts, "text": Path(f"{tmp_path / 'pages.jsonl'}#column=body")}
    path = write_family(named, tmp_path / "family.yaml", **{"[random-middle, shortgpt]": "[random-middle]"})
    result = tailor(path, tmp_path / "run", trials=1, result=False)
    assert result.trials == 1 and (tmp_path / "run" / "sensitivities.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"configs": "nowhere"}, "--configs"),
        ({"more_trials": 3}, "--more-trials"),
        ({"engine": "annealing"}, "There is no engine 'annealing'"),
        ({"scheduler": "nowhere:xyz"}, "--scheduler"),
        ({"workers": 0}, "--workers"),
    ],
)
def test_what_is_refused_before_anything_is_written(
    family: Path, tmp_path: Path, arguments: dict[str, Any], where: str
) -> None:
    with pytest.raises(UserError, match=where):
        tailor(family, tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else(family: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="exists and is not a run folder"):
        tailor(family, tmp_path / "run")


def stop(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("heal", ["finalists", pytest.param("every", marks=pytest.mark.exhaustive)])
def test_healed_in_the_loop(parts: dict[str, Path], tmp_path: Path, heal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials are ranked by what the healed model costs; that model is what is built and scored, fitted once."""
    path = write_family(
        parts,
        tmp_path / "family.yaml",
        **{"min_budget: 4, max_budget: 12": "min_budget: 24, max_budget: 72", "trials: 12": "trials: 5"},
    )
    path.write_text(path.read_text(encoding="utf-8") + f"heal: {heal}\n", encoding="utf-8")
    run = tmp_path / "run"
    fits: list[Recipe] = []

    def counted(recipe: Recipe, *args: Any, **kwargs: Any) -> Any:
        fits.append(recipe)
        return closed_form.fit(recipe, *args, **kwargs)

    monkeypatch.setattr("intarsia.tailoring.evaluator.fit", counted)
    with monkeypatch.context() as killed:
        killed.setattr(command, "_finish", stop)
        with pytest.raises(KeyboardInterrupt):
            tailor(path, run)
    # The front keeps its fits.
    folder = TailorRun(run)
    front, trials = folder.front, list(folder.trials)
    assert front is not None
    healed = [trial for trial in trials if heal == "every" or trial.budget == 72]
    kept = {file.stem for file in (run / "fits").iterdir()}
    assert {trial.recipe for trial in healed} >= kept >= {point.recipe for point in front.points}
    assert 0 < len(fits) <= len(healed)
    made = len(fits)
    result = tailor(path, run)
    assert len(fits) == made and not (run / "fits").exists()
    assert result.front is not None and result.front.budget == 72
    recipe = schema.load(run / "best" / "recipe" / "recipe.yaml")
    assert recipe.fitted
    assert recipe.provenance["settings"]["trial"] == result.front.knee.number
    built = intarsia.build(run, tmp_path / "again", knee=True)
    assert built.recipe_sha256 == schema.content_hash(recipe)

    file = read_family_file(path)
    family = open_family(file.members)
    evaluator = Evaluator(family, file, Runtime(device="cpu"), probe=False)
    for trial in trials:
        cut = trial_recipe(folder, trial, healed=False)
        assert not cut.fitted and schema.content_hash(cut) == trial.recipe
        wanted = evaluator.heal(cut) if heal == "every" or trial.budget == 72 else cut
        assert trial.costs == evaluator.evaluate(wanted, trial.budget).costs
        if wanted is not cut:
            assert trial.costs != evaluator.evaluate(cut, trial.budget, healed=False).costs

    # Scored before and after, on the other halves.
    assert result.evaluated is not None
    rows = {row["model"]: row for row in result.evaluated["rows"]}
    assert list(rows) == ["base", "incumbent as pruned", "incumbent"]
    rest, _ = unseen(file)
    search = rest.search.model_copy(update={"max_budget": max(result.evaluated["examples"].values())})
    rest = rest.model_copy(update={"heal": "none", "search": search})
    final = Evaluator(family, rest, Runtime(device="cpu"), probe=False)
    for name, model in (
        ("incumbent as pruned", trial_recipe(folder, result.front.knee, healed=False)),
        ("incumbent", recipe),
    ):
        costs = final.evaluate(model, final.most).costs
        assert [rows[name][objective]["value"] for objective in ("prose", "quiz")] == pytest.approx(costs, rel=1e-6)


def test_accuracy_beside_the_likelihood(searched: tuple[Path, TailorResult], parts: dict[str, Path]) -> None:
    """The search's measure of the questions is the likelihood; beside it stands the share of right answers."""
    run, result = searched
    assert result.evaluated is not None
    rows = {row["model"]: row for row in result.evaluated["rows"]}
    for name, model in (("base", parts["base"]), ("incumbent", run / "best")):
        found = intarsia.evaluate_tasks(str(model), [f"{parts['quiz']}#0.5:1"])
        expected = found.scores[0].metrics["acc_norm"]
        reported = rows[name]["accuracy"]["quiz"]
        assert (reported["value"], reported["stderr"]) == pytest.approx((expected.value, expected.stderr))
    kept = rows["incumbent"]["accuracy"]["quiz"]["value"] / rows["base"]["accuracy"]["quiz"]["value"]
    assert rows["incumbent"]["kept"] == {"quiz": kept} and rows["incumbent"]["mean_kept"] == kept
    assert "prose" not in rows["base"]["accuracy"] and "kept" not in rows["base"]


SEARCH = """
from intarsia.commands.tailor import SearchOptions, tailor
from intarsia.options import Runtime
tailor(sys.argv[1], sys.argv[2], search=SearchOptions(tokens=512), runtime=Runtime(device="cpu"))
"""


@needs_proc
def test_killed_and_started_again(searched: tuple[Path, TailorResult], family: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kill_within("trials.jsonl", 4, 100, SEARCH, family, run)
    assert len(TailorRun(run).trials) == 3
    assert (run / "trials.jsonl").read_bytes()[-1:] != b"\n"
    again = tailor(family, run)
    whole = searched[1]
    assert trials_of(run) == trials_of(searched[0])
    assert again.front is not None and whole.front is not None and again.evaluated is not None
    assert again.front.to_dict() == whole.front.to_dict()
    assert again.evaluated == whole.evaluated


@pytest.mark.parametrize(
    ("split", "rest"),
    [((0.0, 0.33), (0.33, 1.0)), ((0.5, 1.0), (0.0, 0.5)), ((0.2, 0.5), (0.5, 1.0)), ((0.0, 1.0), None)],
)
def test_rest_of(split: tuple[float, float], rest: tuple[float, float] | None) -> None:
    assert rest_of(split) == rest


PLUGIN = """
from intarsia.registry import engine, merge_op
from intarsia.tailoring.engine import Ask

@merge_op("halfway", needs_base=True, search={"pull": (0.2, 0.8)})
def halfway(tensors, weights, base, *, pull: float = 0.5):
    '''From the base towards the mean.'''
    return base + pull * (sum(tensors) / len(tensors) - base)

@engine("listed")
class Listed:
    '''The base without each pair of neighbours, merged in one way.'''

    def __init__(self, task):
        self.task, self.told, self.next = task, [], 0

    def ask(self, n):
        found = []
        for _ in range(n):
            if self.next + 1 < self.task.space.depth:
                space, changed = self.task.space, (self.next, self.next + 1)
                blend = space.menu.nearest(space.menu.members[1:], "halfway", {"pull": 0.4})
                keep = type(space.plain(changed).choices[0])(attention=blend)
                choices = {(layer, 0): keep for layer in space.positions(changed)}
                found.append(Ask(candidate=space.arrange(changed, choices), budget=12, origin="listed"))
                self.next += 1
        return found

    def tell(self, candidate, budget, costs):
        self.told.append((candidate, budget, costs))
"""


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.exhaustive)])
def test_an_operator_and_an_engine_of_one_s_own(
    parts: dict[str, Path], tmp_path: Path, workers: str, capsys: pytest.CaptureFixture[str], own_registry: None
) -> None:
    """Defined in a file, and used through the command line; also by workers, which load that file themselves."""
    (tmp_path / "mine.py").write_text(PLUGIN, encoding="utf-8")
    path = write_family(
        parts,
        tmp_path / "family.yaml",
        **{"[task_arithmetic, slerp]": "[halfway]", "merge, concat]": "merge]", "[random-middle, shortgpt]": "[]"},
    )
    words = [str(path), "-o", str(tmp_path / "run"), "--engine", "listed", "--plugin", str(tmp_path / "mine.py")]
    cli.run(["tailor", *words, "--workers", workers, "--device", "cpu", "--json", "--score-examples", "4"])
    found = json.loads(capsys.readouterr().out)
    built = intarsia.build(tmp_path / "run", tmp_path / "built", trial=1)
    assert found["stopped"] == "the engine found nothing new to try" and found["trials"] == 5
    assert {row["engine"] for row in found["front"]} == {"listed"}
    assert built.layers == 4
    recipe = yaml.safe_load((tmp_path / "built" / "recipe" / "recipe.yaml").read_text(encoding="utf-8"))
    merge = recipe["layers"][0]["merge"]
    layer = merge["base"]  # with two workers either of the first trials may be the second in the log
    params = {"pull": 0.38}
    assert merge == {"method": "halfway", "from": [f"math:{layer}"], "weights": [1.0], "params": params, "base": layer}
