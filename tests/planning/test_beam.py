"""A beam of several ways down, against the same search done by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from intarsia.errors import UserError
from intarsia.healing.closed_form_settings import ClosedFormSettings
from intarsia.planning.beam import check_beam
from intarsia.planning.come import Come
from intarsia.planning.intermediate import Intermediate
from intarsia.planning.run_folder import RunFolder, Wanted
from intarsia.planning.settings import ComeSettings, SlebSettings
from intarsia.recipe.ops import Op
from intarsia.recipe.recipe import Variant, identity
from intarsia.stages.compare_methods import parse_methods
from tests import families
from tests.conftest import InMemory
from tests.planning.by_hand import ladder_of
from tests.planning.conftest import corpus_of

SETTINGS = {"granularity": 3, "spans": 2, "racing": False}


def options(resident: Any, ops: list[Op], target: int) -> list[tuple[float, tuple[Op, ...]]]:
    """Every model one step further, with its loss as it is measured when it stands there; best first."""
    model = Intermediate(resident, corpus_of(), ops, batch_tokens=26)
    model.measure()
    found = []
    for step in Come(ComeSettings(**SETTINGS), posterior=True).steps(model, target, [], 99):
        layers = [*ops[: step.start], step.op, *ops[step.start + step.count :]]
        one = Intermediate(resident, corpus_of(), layers, batch_tokens=26)
        one.measure()
        assert step.loss == pytest.approx(one.loss, rel=1e-6)
        found.append((one.loss, tuple(layers)))
    return sorted(found, key=lambda entry: entry[0])


def by_hand(resident: Any, number: int, target: int) -> list[tuple[float, tuple[Op, ...]]]:
    """The best of each depth."""
    start = identity(Variant(name="base", model="m"), families.DEPTH)
    paths, best = [list(start.layers)], []
    while len(paths[0]) > target:
        found = sorted((entry for ops in paths for entry in options(resident, ops, target)), key=lambda entry: entry[0])
        distinct = list({layers: loss for loss, layers in reversed(found)}.items())[::-1]
        paths = [list(layers) for layers, _ in distinct[:number]]
        best.append((distinct[0][1], distinct[0][0]))
    return best


@pytest.mark.parametrize("number", [2, 3])
def test_the_best_few_of_every_depth_go_on(number: int, resident_of: InMemory, tmp_path: Path) -> None:
    resident = resident_of("llama")
    settings = ComeSettings(beam=number, **SETTINGS)  # type: ignore[arg-type]
    run, stopped, model = ladder_of("come-p", resident, corpus_of(), tmp_path / "run", 3, settings)
    assert stopped is None and run.depths() == [5, 4, 3]
    for entry, (loss, layers) in zip(run.log(), by_hand(resident, number, 3), strict=True):
        assert entry["loss"] == pytest.approx(loss, rel=1e-6)
        assert run.recipe(entry["layers"]).layers == layers
        told = [way["loss"] for way in entry["beam"]]
        assert len(told) == number == len({way["hash"] for way in entry["beam"]}) and told == sorted(told)
        assert entry["hash"] == entry["beam"][0]["hash"]
    assert run.log()[0]["evidence"]["sensitivity"] and "sensitivity" not in run.log()[1]["evidence"]
    assert tuple(model.ops) == run.recipe(3).layers
    assert run.wanted() == Wanted(layers=3)


def test_it_is_never_worse_than_one_path_at_the_next_step(resident_of: InMemory, tmp_path: Path) -> None:
    losses = {}
    for number in (1, 3):
        settings = ComeSettings(beam=number, **SETTINGS)  # type: ignore[arg-type]
        run, _, _ = ladder_of("come-p", resident_of("llama"), corpus_of(), tmp_path / str(number), 4, settings)
        losses[number] = [entry["loss"] for entry in run.log()]
    assert losses[3][0] == pytest.approx(losses[1][0], rel=1e-9)
    assert losses[3][1] <= losses[1][1] * (1 + 1e-9)


@pytest.mark.parametrize("half_written", [False, True], ids=["between", "within"])
def test_stopped_and_started_again(
    half_written: bool, resident_of: InMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident, settings = resident_of("llama"), ComeSettings(beam=2, granularity=3, spans=2)
    whole, _, _ = ladder_of("come-p", resident, corpus_of(), tmp_path / "whole", 3, settings)
    append = RunFolder.append

    def stops(self: RunFolder, entry: Mapping[str, Any], recipe: Any, **others: Any) -> None:
        if entry["layers"] == 4:
            if half_written:
                append(self, entry, recipe, **others)
                log = self.path / "log.jsonl"
                log.write_bytes(log.read_bytes()[:-40])
            raise KeyboardInterrupt
        append(self, entry, recipe, **others)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "append", stops)
        with pytest.raises(KeyboardInterrupt):
            ladder_of("come-p", resident, corpus_of(), tmp_path / "parts", 3, settings)
    assert len(RunFolder(tmp_path / "parts").others(5)) == 1 and RunFolder(tmp_path / "parts").depths() == [5]
    parts, _, _ = ladder_of("come-p", resident, corpus_of(), tmp_path / "parts", 3, settings)
    told = [
        [
            {key: value for key, value in entry.items() if key not in ("seconds", "layer_forwards")}
            for entry in run.log()
        ]
        for run in (whole, parts)
    ]
    assert told[0] == told[1]
    for layers in (5, 4, 3):
        assert [r.layers for r in parts.others(layers)] == [r.layers for r in whole.others(layers)] != []
        assert parts.recipe(layers).layers == whole.recipe(layers).layers


def test_where_it_ends_early(resident_of: InMemory, tmp_path: Path) -> None:
    settings = ComeSettings(beam=2, no_repeat=True, granularity=2, spans=1)
    run, stopped, model = ladder_of("come-p", resident_of("llama"), corpus_of(), tmp_path / "run", 1, settings)
    assert stopped is not None and "no-repeat" in stopped
    assert run.depths()[-1] == model.depth > 1
    assert run.wanted() == Wanted(layers=1, stopped=stopped)


def test_what_it_does_not_go_with() -> None:
    two = ComeSettings(beam=2)
    check_beam("come-p", two, None)
    check_beam("come", ComeSettings(), ClosedFormSettings())
    check_beam("sleb", SlebSettings(), ClosedFormSettings())
    with pytest.raises(UserError) as caught:
        check_beam("come", two, ClosedFormSettings())
    assert [problem.found for problem in caught.value.problems] == ["come", "both"]
    with pytest.raises(UserError, match="repairs one path"):
        parse_methods("come,come-p[beam=2,heal_in_loop=true]")
    assert parse_methods("come-p[beam=2]")[0].settings == two


def test_run_folders_of_before_there_was_the_option() -> None:
    assert "beam" not in ComeSettings().to_dict()
    assert ComeSettings(beam=2).to_dict()["beam"] == 2
