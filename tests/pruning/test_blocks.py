"""Blocks of the original beside the candidates of a step, against the same by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from intarsia.activations.hidden_store import Room
from intarsia.building.loaded_model import Resident
from intarsia.healing.settings import ClosedFormSettings
from intarsia.pruning import finalists
from intarsia.pruning.finalists import settle
from intarsia.pruning.heal_in_loop import Repair, losses_after
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.methods.come_p import ComePSettings
from intarsia.pruning.step import Step, healed_words
from intarsia.recipe.ops import Op
from tests import families
from tests.conftest import InMemory, Opened
from tests.pruning.by_hand import planner_of
from tests.pruning.test_in_loop import SETTINGS, go, written_by
from tests.recipes_by_hand import select
from tests.test_streaming import ladder as ladder_hashes
from tests.test_streaming import streamed

WHOLE: list[Op] = [select(layer) for layer in range(families.DEPTH)]
ALL = ComePSettings(granularity=1, spans=1, removals=True, finalists=2, blocks=2, heal_in_loop=True)


def measured(resident: Resident, layers: list[int], **changes: object) -> Intermediate:
    model = Intermediate(resident, written_by(resident, 32), [select(layer) for layer in layers], **changes)  # type: ignore[arg-type]
    model.measure()
    return model


def without(start: int, count: int) -> list[int]:
    return [layer for layer in range(families.DEPTH) if not start <= layer < start + count]


def alone(resident: Resident, start: int, count: int) -> tuple[dict[str, object], Intermediate]:
    """The original without a block, repaired as any removal is."""
    model = measured(resident, list(range(families.DEPTH)))
    return Repair(model, SETTINGS).replace(start, count, None), model


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("memory_bytes", [None, 0])
def test_every_trial_is_that_block_alone(family: str, memory_bytes: int | None, resident_of: InMemory) -> None:
    resident = resident_of(family)
    model = measured(resident, [0, 2, 3, 4, 5], room=Room(memory_bytes))  # a removal that was not repaired
    before = [model.hidden_at(depth, slice(0, 32)).clone() for depth in range(model.depth + 1)]
    step = Step(start=3, count=1, op=None, evidence={"influence": [0.0], "dropped": "base:4", "counts": 0})
    spent = model.layer_forwards
    chosen, told = settle(Repair(model, SETTINGS), [step], blocks=5)
    # Of the five blocks of two layers none is what the step leads to.
    shown = {tuple(entry["replaced"]): entry["held_out_loss"] for entry in told["finalists"][1:]}
    assert sorted(shown) == [(start, start + 2) for start in range(5)]
    by_hand = {start: alone(resident, start, 2) for start in range(5)}
    for start, (repair, _) in by_hand.items():
        assert shown[start, start + 2] == pytest.approx(repair["held_out_loss"], rel=1e-6)
    unrepaired = [entry["held_out_loss"][0] for entry in told["finalists"][1:]]
    assert unrepaired == sorted(unrepaired)

    best = min(by_hand, key=lambda start: min(by_hand[start][0]["held_out_loss"]))  # type: ignore[call-overload]
    repair, wanted = by_hand[best]
    if min(told["finalists"][0]["held_out_loss"]) < min(repair["held_out_loss"]):  # type: ignore[call-overload]
        assert chosen is step
        return
    assert chosen.whole == tuple(wanted.ops) == tuple(model.ops)
    assert chosen.evidence == {
        "influence": [0.0],
        "block": [best, best + 2],
        "dropped": f"base:{best}, base:{best + 1}",
    }
    torch.testing.assert_close(model.losses_N, wanted.losses_N, rtol=1e-6, atol=0)
    for depth in range(model.depth + 1):
        torch.testing.assert_close(
            model.hidden_at(depth, slice(0, 32)), wanted.hidden_at(depth, slice(0, 32)), rtol=0, atol=1e-5
        )
    assert len(before) == model.depth + 2
    # The original, which was not measured, and the model as it is now, beside what the trials took.
    assert model.layer_forwards - spent == pytest.approx(told["layer_forwards"] + 6 + 4)
    assert f"the original without {best} to {best + 1}" in healed_words({**chosen.evidence, "repair": told})


def test_the_better_of_both_is_taken(resident_of: InMemory) -> None:
    """Whichever of the two it is: the path of a bad first step loses, that of a good one may win."""
    resident = resident_of("llama")
    taken = set()
    for first in range(families.DEPTH):
        model = measured(resident, list(range(families.DEPTH)))
        Repair(model, SETTINGS).replace(first, 1, None)
        steps = [Step(start=start, count=1, op=None, evidence={}) for start in range(model.depth)]
        chosen, told = settle(Repair(model, SETTINGS), steps, blocks=2)
        losses = [min(entry["held_out_loss"]) for entry in told["finalists"]]
        assert min(told["held_out_loss"]) == min(losses)
        assert (chosen.whole is not None) == (losses.index(min(losses)) >= len(steps))
        taken.add(chosen.whole is not None)
    assert taken == {True, False}


def test_blocks_that_are_tried_already_are_left_out(resident_of: InMemory) -> None:
    """At the first step every removal of one layer is a candidate of its own."""
    model = measured(resident_of("llama"), list(range(families.DEPTH)))
    steps = [Step(start=start, count=1, op=None, evidence={}) for start in range(5)]
    _, told = settle(Repair(model, SETTINGS), steps, blocks=3)
    assert [entry["replaced"] for entry in told["finalists"]] == [[start, start + 1] for start in range(6)]
    assert [entry.get("of") for entry in told["finalists"]] == [None] * 5 + ["the original"]


def test_only_the_nearest_are_looked_at(resident_of: InMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finalists, "NEAREST", 2)
    resident = resident_of("llama")
    whole = measured(resident, list(range(families.DEPTH)))
    rows = Repair(whole, SETTINGS).held_out
    distances = [whole.span_distance(start, 2, "all-tokens") for start in range(5)]
    losses = [float(losses_after(measured(resident, without(start, 2)), 0, rows).sum()) for start in range(5)]
    near = sorted(range(5), key=lambda start: distances[start])[:2]
    model = measured(resident, [0, 2, 3, 4, 5])
    step = Step(start=3, count=1, op=None, evidence={})
    _, told = settle(Repair(model, SETTINGS), [step], blocks=5)
    assert [entry["replaced"][0] for entry in told["finalists"][1:]] == sorted(near, key=lambda start: losses[start])


def test_a_ladder_that_is_stopped_goes_on_as_if_it_were_not(resident_of: InMemory, tmp_path: Path) -> None:
    resident = resident_of("llama")
    run, _ = go(tmp_path / "whole", resident, "come-p", 2, settings=ALL)
    for target in (4, 3, 2):
        again, _ = go(tmp_path / "parts", resident, "come-p", target, settings=ALL)
    assert [entry["hash"] for entry in again.log()] == [entry["hash"] for entry in run.log()]
    assert run.depths() == [5, 4, 3, 2]
    tried = [[entry.get("of") for entry in step["evidence"]["repair"]["finalists"]] for step in run.log()]
    assert all(each[-1] == "the original" for each in tried)
    for step in run.log():
        if "block" in step["evidence"]:
            start, stop = step["evidence"]["block"]
            assert list(run.recipe(step["layers"]).layers) == [*WHOLE[:start], *WHOLE[stop:]]


@pytest.mark.parametrize("target", [5, 3])
def test_it_costs_no_more_than_estimated(target: int, resident_of: InMemory, tmp_path: Path) -> None:
    resident = resident_of("llama")
    run, _ = go(tmp_path / "run", resident, "come-p", target, settings=ALL, in_loop=ClosedFormSettings())
    corpus = written_by(resident)
    planner = planner_of("come-p", ALL)
    at_most = planner.forwards_at_most(resident.architecture, target, len(corpus))
    assert sum(entry["layer_forwards"] for entry in run.log()) <= at_most


def test_streamed_it_is_the_same(tmp_path: Path, checkpoint_of: Opened, resident_of: InMemory) -> None:
    resident = streamed(checkpoint_of("llama"))
    found = [
        ladder_hashes(model, tmp_path / str(number), "come-p", settings=ALL, in_loop=ClosedFormSettings(held_out=2))
        for number, model in enumerate((resident_of("llama"), resident))
    ]
    assert found[0] == found[1] and len(found[0]) == 3
