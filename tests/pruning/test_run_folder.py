"""Run folders: what is in them, and that a run which was stopped anywhere ends as one that was not."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from intarsia.disk import full_disk_named
from intarsia.errors import UserError
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.ladder import climb, planner_of
from intarsia.pruning.run_folder import RunFolder, Wanted
from intarsia.pruning.settings import ComeSettings
from intarsia.recipe.recipe import Recipe, Variant, identity
from intarsia.recipe.schema import content_hash
from tests import families
from tests.conftest import InMemory
from tests.pruning.conftest import corpus_of
from tests.recipes_by_hand import recipe_of, select

SETTINGS = {"model": "m", "tokens": 512, "planner": {"merge": 2, "norm": "fold"}, "dtype": None}


class Stopped(Exception):
    """Stands for a kill."""


def whole() -> Recipe:
    recipe = identity(Variant(name="base", model="m", sha256="0" * 64), families.DEPTH)
    return recipe.with_layers(recipe.layers, provenance={"method": "come", "settings": {"merge": 2}})


def go(folder: Path, resident: Any, method: str, target: int, **settings: Any) -> Intermediate:
    """What `plan` does, in a run folder that may have been begun."""
    run = RunFolder.start(folder, SETTINGS)
    start = run.recipe(run.depths()[-1]) if run.depths() else whole()
    model = Intermediate(resident, corpus_of(), start.layers)
    climb(planner_of(method, ComeSettings(granularity=5, **settings)), model, start, target, run)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "ladder").iterdir())}


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in entry.items() if key not in ("seconds", "layer_forwards")}
        for entry in RunFolder(folder).log()
    ]


@pytest.mark.parametrize(
    "method", ["come", "come-p", "shortgpt", "sleb", "taylor", "magnitude", "mka", "angular", "reverse"]
)
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("half_written", [False, True], ids=["between", "within"])
def test_stopped_and_started_again(
    steps: int, method: str, half_written: bool, resident_of: InMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = resident_of("llama")
    go(tmp_path / "undisturbed", resident, method, 2)

    append, done = RunFolder.append, []

    def stops(self: RunFolder, entry: Mapping[str, Any], recipe: Recipe) -> None:
        if len(done) == steps:
            if half_written:  # the recipe is there, and half of its line
                append(self, entry, recipe)
                path = self.path / "log.jsonl"
                path.write_bytes(path.read_bytes()[:-40])
            raise Stopped
        append(self, entry, recipe)
        done.append(entry)

    monkeypatch.setattr(RunFolder, "append", stops)
    with pytest.raises(Stopped):
        go(tmp_path / "stopped", resident, method, 2)
    monkeypatch.undo()
    assert RunFolder(tmp_path / "stopped").depths() == [5, 4, 3][:steps]
    go(tmp_path / "stopped", resident, method, 2)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "undisturbed")
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "undisturbed")
    assert len(log_of(tmp_path / "stopped")) == 4


def test_going_further_is_going_on(resident_of: InMemory, tmp_path: Path) -> None:
    resident = resident_of("opt")
    go(tmp_path / "once", resident, "come", 2)
    go(tmp_path / "twice", resident, "come", 4)
    go(tmp_path / "twice", resident, "come", 2)
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")
    assert log_of(tmp_path / "once") == log_of(tmp_path / "twice")


@pytest.mark.parametrize("method", ["come", "come-p"])
def test_reusing_the_prefix_changes_the_cost_and_nothing_else(
    method: str, resident_of: InMemory, tmp_path: Path
) -> None:
    resident = resident_of("llama")
    spent = {}
    for reuse in (True, False):
        run = RunFolder.start(tmp_path / str(reuse), SETTINGS)
        model = Intermediate(resident, corpus_of(), whole().layers, reuse_prefix=reuse)
        climb(planner_of(method, ComeSettings(granularity=5, spans=1)), model, whole(), 2, run)
        spent[reuse] = sum(entry["layer_forwards"] for entry in run.log())
        assert spent[reuse] == pytest.approx(model.layer_forwards)
    assert contents(tmp_path / "True") == contents(tmp_path / "False")
    assert log_of(tmp_path / "True") == log_of(tmp_path / "False")
    # By hand: the whole model once, then per step and candidate either all layers or those from the merge on.
    starts = [entry["merged"][0] for entry in RunFolder(tmp_path / "True").log()]
    grids = [len(entry["evidence"].get("grid", [])) for entry in RunFolder(tmp_path / "True").log()]
    depths = [5, 4, 3, 2]
    assert spent[False] == pytest.approx(6 + sum((1 + g) * depth for depth, g in zip(depths, grids, strict=True)))
    behind = [depth - start for depth, start in zip(depths, starts, strict=True)]
    assert spent[True] == pytest.approx(6 + sum((1 + g) * rest for rest, g in zip(behind, grids, strict=True)))


def test_the_log_tells_how_it_was_decided(resident_of: InMemory, tmp_path: Path) -> None:
    model = go(tmp_path / "run", resident_of("llama"), "come-p", 4)
    run = RunFolder.existing(tmp_path / "run")
    first, second = run.log()
    assert (first["layers"], second["layers"]) == (5, 4)
    assert second["loss"] == model.loss
    for entry in (first, second):
        assert entry["hash"] == content_hash(run.recipe(entry["layers"]))
        assert entry["recipe"] == f"layers-{entry['layers']:03d}.yaml"
        evidence = entry["evidence"]
        assert {"influence", "span_scores", "prior_ratios", "grid", "counts"} <= set(evidence)
        assert len(evidence["influence"]) == entry["layers"] + 1
        assert sum(evidence["counts"]["channels"]) == families.CHANNELS
        assert entry["seconds"] > 0 and entry["layer_forwards"] > 0
    assert run.recipe(4).provenance["method"] == "come"
    assert [stop - start for start, stop in run.recipe(4).spans].count(1) < 4


def test_a_planner_that_ends_early_says_why(resident_of: InMemory, tmp_path: Path) -> None:
    run = RunFolder.start(tmp_path / "run", SETTINGS)
    model = Intermediate(resident_of("llama"), corpus_of(), whole().layers)
    planner = planner_of("come", ComeSettings(no_repeat=True))
    reason = climb(planner, model, whole(), 1, run)
    assert reason is not None and "no-repeat" in reason
    assert run.depths() == list(range(5, model.depth - 1, -1))
    assert 3 <= model.depth < 6


@pytest.mark.parametrize("what", ["recipe", "line"])
def test_a_full_disk_within_a_step(
    what: str, resident_of: InMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps before are kept, nothing half-written is left, and the run goes on when there is room again."""
    resident = resident_of("llama")
    go(tmp_path / "undisturbed", resident, "come", 2)
    write = {"recipe": "intarsia.recipe.schema.write_whole", "line": "intarsia.pruning.run_folder.append_line"}[what]
    go(tmp_path / "full", resident, "come", 4)
    before = contents(tmp_path / "full")

    def full(*_: object) -> None:
        with full_disk_named(tmp_path / "full"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(write, full)
        with pytest.raises(UserError, match="a full disk"):
            go(tmp_path / "full", resident, "come", 2)
    assert RunFolder(tmp_path / "full").depths() == [5, 4]
    assert {name: contents(tmp_path / "full")[name] for name in before} == before
    assert not [path for path in (tmp_path / "full").rglob(".*") if path.is_file()]
    assert RunFolder(tmp_path / "full").unfinished() == "it has come to 4 layers on the way down to 2"
    go(tmp_path / "full", resident, "come", 2)
    assert contents(tmp_path / "full") == contents(tmp_path / "undisturbed")
    assert log_of(tmp_path / "full") == log_of(tmp_path / "undisturbed")


def test_how_far_a_plan_is(resident_of: InMemory, tmp_path: Path) -> None:
    run = RunFolder.start(tmp_path / "run", SETTINGS)
    assert (run.wanted(), run.unfinished()) == (None, None)  # not asked for anything yet
    run.want(Wanted(layers=4))
    assert run.unfinished() == "no step is done yet on the way down to 4"
    go(tmp_path / "run", resident_of("llama"), "come", 4)
    assert (run.wanted(), run.unfinished()) == (Wanted(layers=4), None)
    run.want(Wanted(layers=2))
    assert run.unfinished() == "it has come to 4 layers on the way down to 2"
    with pytest.raises(UserError, match="on the way down to 2"):
        run.recipe(3)
    run.want(Wanted(layers=5))  # what is asked for last
    assert run.unfinished() is None
    (tmp_path / "run" / "wanted.json").write_text("[]")
    with pytest.raises(UserError, match="Delete the file"):
        run.unfinished()


def test_a_plan_that_can_go_no_further_is_told_as_such(resident_of: InMemory, tmp_path: Path) -> None:
    model = go(tmp_path / "run", resident_of("llama"), "come", 1, no_repeat=True)
    told = RunFolder(tmp_path / "run").unfinished()
    assert told is not None and told.startswith(f"it has come to {model.depth} layers on the way down to 1 and goes no")
    assert "no-repeat" in told


# The folder itself


def test_other_settings_are_all_listed(tmp_path: Path) -> None:
    RunFolder.start(tmp_path / "run", SETTINGS)
    RunFolder.start(tmp_path / "run", SETTINGS)
    other = {**SETTINGS, "tokens": 1024, "planner": {"merge": 3, "norm": "fold"}, "seed": 1}
    with pytest.raises(UserError) as caught:
        RunFolder.start(tmp_path / "run", other)
    places = [problem.where.rpartition(": ")[2] for problem in caught.value.problems]
    assert places == ["planner.merge", "seed", "tokens"]
    assert "512" in caught.value.problems[2].expected and caught.value.problems[2].found == "1024"
    assert RunFolder.existing(tmp_path / "run").settings() == SETTINGS


def test_settings_survive_json(tmp_path: Path) -> None:
    """A tuple is a list afterwards, which is no difference."""
    RunFolder.start(tmp_path / "run", {"texts": ("a", "b")})
    RunFolder.start(tmp_path / "run", {"texts": ("a", "b")})


@pytest.mark.parametrize("thing", ["file", "folder"])
def test_a_place_that_holds_something_else(thing: str, tmp_path: Path) -> None:
    place = tmp_path / "run"
    if thing == "file":
        place.write_text("a file")
    else:
        place.mkdir()
        (place / "thesis.txt").write_text("mine")
    for method in (RunFolder.offer, RunFolder.start):
        with pytest.raises(UserError, match="something else"):
            method(place, SETTINGS)
    with pytest.raises(UserError, match="run folder"):
        RunFolder.existing(place)
    assert place.is_file() or [path.name for path in place.iterdir()] == ["thesis.txt"]


def test_an_offer_writes_nothing(tmp_path: Path) -> None:
    assert RunFolder.offer(tmp_path / "run", SETTINGS).depths() == []
    assert list(tmp_path.iterdir()) == []
    RunFolder.start(tmp_path / "run", SETTINGS)
    with pytest.raises(UserError, match="tokens"):
        RunFolder.offer(tmp_path / "run", {**SETTINGS, "tokens": 1})


def test_killed_before_there_were_settings(tmp_path: Path) -> None:
    """An empty folder, or one with the half-written settings in it, can still be begun."""
    place = tmp_path / "run"
    place.mkdir()
    RunFolder.offer(place, SETTINGS)
    (place / ".settings.json.4711").write_text('{"mod')
    run = RunFolder.start(place, SETTINGS)
    assert run.settings() == SETTINGS
    (place / "ladder").rmdir()  # killed between the settings and the ladder
    RunFolder.start(place, SETTINGS).append({"layers": 1}, recipe_of("m", [select(0)]))
    assert run.depths() == [1]


def test_a_cut_off_last_line_does_not_count(tmp_path: Path) -> None:
    run = RunFolder.start(tmp_path / "run", SETTINGS)
    assert run.log() == [] and run.depths() == []
    run.append({"layers": 5}, recipe_of("m", [select(layer) for layer in range(5)]))
    path = tmp_path / "run" / "log.jsonl"
    complete = path.read_text()
    for cut in ("{", '{"layers": 4, "op', '{"layers": 4}'):
        path.write_text(complete + cut)
        assert run.depths() == [5]
        run.append({"layers": 4, "note": cut}, recipe_of("m", [select(layer) for layer in range(4)]))
        assert [json.loads(line) for line in path.read_text().splitlines()] == [
            {"layers": 5},
            {"layers": 4, "note": cut},
        ]


def test_a_depth_that_is_not_there(tmp_path: Path) -> None:
    run = RunFolder.start(tmp_path / "run", SETTINGS)
    with pytest.raises(UserError, match="none yet"):
        run.recipe(5)
    run.append({"layers": 5}, recipe_of("m", [select(layer) for layer in range(5)]))
    run.append({"layers": 3}, recipe_of("m", [select(layer) for layer in range(3)]))
    with pytest.raises(UserError, match="5, 3"):
        run.recipe(4)
    assert len(run.recipe(3).layers) == 3


def test_pinned_facts_must_stay(tmp_path: Path) -> None:
    run = RunFolder.start(tmp_path / "run", SETTINGS)
    run.pin("calibration", {"sha256": "a", "tokens": 8})
    run.pin("calibration", {"sha256": "a", "tokens": 8})
    with pytest.raises(UserError) as caught:
        run.pin("calibration", {"sha256": "b", "tokens": 8})
    assert len(caught.value.problems) == 1
    assert "sha256" in caught.value.problems[0].where


def test_damaged_settings(tmp_path: Path) -> None:
    RunFolder.start(tmp_path / "run", SETTINGS)
    (tmp_path / "run" / "settings.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        RunFolder.existing(tmp_path / "run").settings()
    with pytest.raises(UserError, match="damaged"):
        RunFolder.start(tmp_path / "run", SETTINGS)
