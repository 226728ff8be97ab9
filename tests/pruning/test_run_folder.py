"""Plans in run folders: logged, stopped, resumed, described in lines."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from intarsia.disk import full_disk_named
from intarsia.errors import UserError
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.ladder import Ladder, Wanted
from intarsia.pruning.methods.come import ComeSettings
from intarsia.pruning.methods.come_p import ComePSettings
from intarsia.pruning.step import describe, mlp_pieces, of_experts, step_line
from intarsia.recipe.recipe import Concat, Cut, Op, Recipe, Variant, identity
from intarsia.recipe.schema import content_hash
from tests import families
from tests.conftest import InMemory
from tests.pruning.by_hand import climb, ladder_in, planner_of
from tests.pruning.conftest import corpus_of
from tests.recipes_by_hand import recipe_of, ref, select

SETTINGS = {"model": "m", "tokens": 512, "planner": {"merge": 2, "norm": "fold"}, "dtype": None}


class Stopped(Exception):
    """Stands for a kill."""


def whole() -> Recipe:
    recipe = identity(Variant(name="base", model="m", sha256="0" * 64), families.DEPTH)
    return recipe.with_layers(recipe.layers, provenance={"method": "come", "settings": {"merge": 2}})


def go(folder: Path, resident: Any, method: str, target: int, **settings: Any) -> Intermediate:
    """What `plan` does, in a run folder that may have been started."""
    run = ladder_in(folder, SETTINGS)
    start = run.recipe(run.depths()[-1]) if run.depths() else whole()
    model = Intermediate(resident, corpus_of(), start.layers)
    climb(planner_of(method, ComePSettings(granularity=5, **settings)), model, start, target, run)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "ladder").iterdir())}


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in entry.items() if key not in ("seconds", "layer_forwards")}
        for entry in Ladder(folder).log()
    ]


@pytest.fixture(scope="module")
def undisturbed(resident_of: InMemory, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the run folder of a method that was not stopped."""
    root = tmp_path_factory.mktemp("undisturbed")

    def made(method: str) -> Path:
        go(root / method, resident_of("llama"), method, 2)
        return root / method

    return cache(made)


@pytest.mark.parametrize(
    ("method", "steps", "half_written"),
    [
        *(("come", steps, half_written) for steps in (1, 2, 3) for half_written in (False, True)),
        *((method, 2, True) for method in ("come-p", "shortgpt", "sleb", "taylor", "magnitude", "mka", "angular")),
        ("reverse", 3, False),
    ],
)
def test_stopped_and_started_again(
    method: str,
    steps: int,
    half_written: bool,
    undisturbed: Callable[[str], Path],
    resident_of: InMemory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resident, whole = resident_of("llama"), undisturbed(method)
    append, done = Ladder.append, []

    def stops(self: Ladder, entry: Mapping[str, Any], recipe: Recipe) -> None:
        if len(done) == steps:
            if half_written:  # the recipe is there, and half of its line
                append(self, entry, recipe)
                path = self.path / "log.jsonl"
                path.write_bytes(path.read_bytes()[:-40])
            raise Stopped
        append(self, entry, recipe)
        done.append(entry)

    monkeypatch.setattr(Ladder, "append", stops)
    with pytest.raises(Stopped):
        go(tmp_path / "stopped", resident, method, 2)
    monkeypatch.undo()
    assert Ladder(tmp_path / "stopped").depths() == [5, 4, 3][:steps]
    go(tmp_path / "stopped", resident, method, 2)
    assert contents(tmp_path / "stopped") == contents(whole)
    assert log_of(tmp_path / "stopped") == log_of(whole)
    assert len(log_of(tmp_path / "stopped")) == 4


def test_going_further_is_going_on(resident_of: InMemory, tmp_path: Path) -> None:
    resident = resident_of("opt")
    go(tmp_path / "once", resident, "come", 2)
    go(tmp_path / "twice", resident, "come", 4)
    go(tmp_path / "twice", resident, "come", 2)
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")
    assert log_of(tmp_path / "once") == log_of(tmp_path / "twice")


@pytest.mark.parametrize("method", ["come", "come-p"])
def test_only_layers_after_a_change_are_run(method: str, resident_of: InMemory, tmp_path: Path) -> None:
    """By hand: the whole model once, then per step and candidate those from the merge on."""
    run = ladder_in(tmp_path / "run", SETTINGS)
    model = Intermediate(resident_of("llama"), corpus_of(), whole().layers)
    climb(planner_of(method, ComePSettings(granularity=5, spans=1)), model, whole(), 2, run)
    log = run.log()
    spent = sum(entry["layer_forwards"] for entry in log)
    after = [(1 + len(entry["evidence"].get("grid", []))) * (entry["layers"] - entry["merged"][0]) for entry in log]
    assert spent == pytest.approx(model.layer_forwards) == pytest.approx(6 + sum(after))


def test_the_log_says_how_it_was_decided(resident_of: InMemory, tmp_path: Path) -> None:
    model = go(tmp_path / "run", resident_of("llama"), "come-p", 4)
    run = Ladder.existing(tmp_path / "run")
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
    run = ladder_in(tmp_path / "run", SETTINGS)
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
    """Earlier steps are kept, nothing half-written is left, and the run resumes once there is space again."""
    resident = resident_of("llama")
    go(tmp_path / "undisturbed", resident, "come", 2)
    write = {"recipe": "intarsia.recipe.schema.write_whole", "line": "intarsia.run_dir.append_line"}[what]
    go(tmp_path / "full", resident, "come", 4)
    before = contents(tmp_path / "full")

    def full(*_: object) -> None:
        with full_disk_named(tmp_path / "full"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(write, full)
        with pytest.raises(UserError, match="a full disk"):
            go(tmp_path / "full", resident, "come", 2)
    assert Ladder(tmp_path / "full").depths() == [5, 4]
    assert {name: contents(tmp_path / "full")[name] for name in before} == before
    assert not [path for path in (tmp_path / "full").rglob(".*") if path.is_file()]
    assert Ladder(tmp_path / "full").unfinished() == "it has reached 4 layers on the way down to 2"
    go(tmp_path / "full", resident, "come", 2)
    assert contents(tmp_path / "full") == contents(tmp_path / "undisturbed")
    assert log_of(tmp_path / "full") == log_of(tmp_path / "undisturbed")


def test_how_far_a_plan_is(resident_of: InMemory, tmp_path: Path) -> None:
    run = ladder_in(tmp_path / "run", SETTINGS)
    assert (run.wanted(), run.unfinished()) == (None, None)  # not asked for anything yet
    run.want(Wanted(layers=4))
    assert run.unfinished() == "no step is done yet on the way down to 4"
    go(tmp_path / "run", resident_of("llama"), "come", 4)
    assert (run.wanted(), run.unfinished()) == (Wanted(layers=4), None)
    run.want(Wanted(layers=2))
    assert run.unfinished() == "it has reached 4 layers on the way down to 2"
    with pytest.raises(UserError, match="on the way down to 2"):
        run.recipe(3)
    run.want(Wanted(layers=5))  # what is asked for last
    assert run.unfinished() is None
    (tmp_path / "run" / "wanted.json").write_text("[]")
    with pytest.raises(UserError, match="Delete the file"):
        run.unfinished()


def test_a_plan_that_can_go_no_further_is_reported_as_such(resident_of: InMemory, tmp_path: Path) -> None:
    model = go(tmp_path / "run", resident_of("llama"), "come", 1, no_repeat=True)
    unfinished = Ladder(tmp_path / "run").unfinished()
    assert unfinished is not None and unfinished.startswith(
        f"it has reached {model.depth} layers on the way down to 1 and stopped"
    )
    assert "no-repeat" in unfinished


# What is not there


def test_a_depth_that_is_not_there(tmp_path: Path) -> None:
    run = ladder_in(tmp_path / "run", SETTINGS)
    with pytest.raises(UserError, match="none yet"):
        run.recipe(5)
    run.append({"layers": 5}, recipe_of("m", [select(layer) for layer in range(5)]))
    run.append({"layers": 3}, recipe_of("m", [select(layer) for layer in range(3)]))
    with pytest.raises(UserError, match="5, 3"):
        run.recipe(4)
    assert len(run.recipe(3).layers) == 3


HALVES = {"attention": 0.5, "mlp": 0.5}


@pytest.fixture
def joined() -> Concat:
    """Layers 1 and 2: one KV group of each, 3 and 5 pieces of the MLP."""
    return Concat(
        cuts=(
            Cut(source=ref(1), kv_groups=(0,), channels=(1, 2, 3), weights=HALVES),
            Cut(source=ref(2), kv_groups=(1,), channels=(0, 4, 5, 6, 7), weights=HALVES),
        )
    )


@pytest.mark.parametrize(("mixture", "name"), [(False, "channels"), (True, "experts")])
def test_a_step_for_a_person(mixture: bool, name: str, joined: Concat) -> None:
    def line(layers: int, at: int, op: Op | None, loss: float | None) -> str:
        made = None if op is None else describe(op)
        evidence = {"dropped": f"base:{at}"} if op is None else {}
        entry = {"layers": layers, "merged": [at, at + 1], "op": made, "evidence": evidence, "loss": loss}
        return step_line(entry, mlp_pieces(mixture))

    wanted = f"joined from 1 (KV groups 1, {name} 3) + 2 (KV groups 1, {name} 5)"
    assert line(5, 1, joined, 2.5) == f"5 layers: {wanted}, calibration loss 2.5000"
    assert line(4, 3, None, None) == "4 layers: 3 dropped"
    assert line(4, 3, select(3), None) == "4 layers: only 3 kept, whole"


def test_the_log_has_the_codecs_own_word(joined: Concat) -> None:
    described = describe(joined)
    assert list(described.values()) == [{"kv_groups": 1, "channels": 3}, {"kv_groups": 1, "channels": 5}]


def test_a_recipe_says_whether_its_pieces_are_experts() -> None:
    assert of_experts({"mlp_pieces": mlp_pieces(True)})
    assert not of_experts({}) and not of_experts({"mlp_pieces": mlp_pieces(False)})
