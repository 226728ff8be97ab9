"""Removals beside merges, and candidates that are healed before one of them is chosen, against the same by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.building.loaded_model import LoadedModel
from intarsia.errors import UserError
from intarsia.healing.settings import ClosedFormSettings
from intarsia.pruning import prune
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.ladder import Ladder
from intarsia.pruning.methods.come_p import ComeP, ComePSettings
from intarsia.pruning.methods.sleb import SlebSettings
from intarsia.pruning.prune import StepHealer
from intarsia.pruning.race import best_of_groups, race
from intarsia.pruning.step import Step
from intarsia.recipe.recipe import Op, Variant, identity
from intarsia.registry import planners
from tests import families
from tests.conftest import InMemory, Opened
from tests.pruning.by_hand import climb, ladder_in, losses_with, planner_of, take
from tests.pruning.test_in_loop import SETTINGS, written_by
from tests.pruning.test_race import Track, noisy
from tests.recipes_by_hand import select, shared
from tests.test_streaming import ladder as ladder_hashes
from tests.test_streaming import streamed

WHOLE: list[Op] = [select(layer) for layer in range(families.DEPTH)]
EVERY = ComePSettings(granularity=2, spans=2, removals=True, racing=False)


def measured(resident: LoadedModel, ops: list[Op], **changes: object) -> Intermediate:
    model = Intermediate(resident, written_by(resident, 32), ops, **changes)  # type: ignore[arg-type]
    model.measure()
    return model


def ladder(resident: LoadedModel, folder: Path, method: str, settings: Any, in_loop: bool) -> Ladder:
    run = ladder_in(folder, {})
    start = identity(Variant(name="base", model="m"), families.DEPTH)
    model = Intermediate(resident, written_by(resident), start.layers)
    climb(planner_of(method, settings), model, start, 2, run, in_loop=SETTINGS if in_loop else None)
    return run


# Removals


def test_every_removal_is_tried_once_with_its_loss(resident_of: InMemory) -> None:
    """Beside them only those ratios that are no removal: of the two spans, one half each."""
    resident = resident_of("qwen2")
    model = measured(resident, list(WHOLE))
    step = ComeP(EVERY).decide(model, 5, [])[0]
    assert step is not None
    grid = step.evidence["grid"]
    dropped = [entry["start"] for entry in grid if "dropped" in entry]
    assert dropped == list(range(6)) and [entry["ratios"] for entry in grid[6:]] == [[0.5, 0.5]] * 2
    for entry in grid[:6]:
        bare = measured(resident, [*WHOLE[: entry["start"]], *WHOLE[entry["start"] + 1 :]])
        loss = float(losses_with(bare, bare.depth, 0, []).sum() / bare.counts_N.sum())
        assert entry["dropped"] == 1 and entry["loss"] == pytest.approx(loss, rel=1e-6)
    best = min(grid, key=lambda entry: entry["loss"])
    assert step.start == best["start"] and (step.op is None) == ("dropped" in best)


def test_of_three_at_once_two_adjacent_layers_are_dropped(resident_of: InMemory) -> None:
    """So that every candidate leads to the same depth; and no more than estimated is run."""
    settings = ComePSettings(
        merge=3, granularity=1, spans=1, removals=True, racing=False, finalists=99, heal_in_loop=True
    )
    model = measured(resident_of("llama"), list(WHOLE))
    before = model.layer_forwards
    planner = ComeP(settings)
    steps = planner.decide(model, 4, [{}])
    at_most = planner.forwards_at_most(model.architecture, 4, len(model.corpus))
    assert model.layer_forwards - before <= at_most - 6 - 4  # what is measured before and after
    removals = [step for step in steps if step.op is None]
    assert sorted(step.start for step in removals) == [0, 1, 2, 3, 4] and {step.count for step in removals} == {2}
    # Of the three ratios of the one span two are removals; the middle layer alone is none of one run of layers.
    assert len(steps) == 6 and {step.count - (step.op is not None) for step in steps} == {2}


@pytest.mark.parametrize("in_loop", [False, True], ids=["", "in-loop"])
def test_with_removals_alone_it_is_sleb(in_loop: bool, resident_of: InMemory, tmp_path: Path) -> None:
    """A grid of one step has no ratios but those that drop a layer: the same recipes, with what is fitted on them."""
    resident = resident_of("llama")
    settings = ComePSettings(granularity=1, removals=True, racing=False, finalists=1)
    ours = ladder(resident, tmp_path / "ours", "come-p", settings, in_loop)
    sleb = ladder(resident, tmp_path / "sleb", "sleb", SlebSettings(racing=False, criterion="loss"), in_loop)
    assert ours.depths() == sleb.depths() == [5, 4, 3, 2]
    assert [entry["hash"] for entry in ours.log()] == [entry["hash"] for entry in sleb.log()]
    for mine, its in zip(ours.log(), sleb.log(), strict=True):
        assert mine["op"] is None and mine["evidence"]["dropped"] == its["evidence"]["dropped"]
        losses = [entry["loss"] for entry in mine["evidence"]["grid"]]
        assert losses == pytest.approx(its["evidence"]["losses"])
    assert bool(ours.recipe(2).fitted) == in_loop


def test_where_nothing_may_be_merged_layers_are_dropped(resident_of: InMemory, tmp_path: Path) -> None:
    """The prior form has no removals, and stops."""
    settings = ComePSettings(no_repeat=True, removals=True, granularity=2, spans=1)
    assert ladder(resident_of("llama"), tmp_path / "p", "come-p", settings, False).depths()[-1] == 2
    assert ladder(resident_of("llama"), tmp_path / "c", "come", settings, False).depths()[-1] > 2


# Which ones are healed


def test_finalists_remove_something_else_each(resident_of: InMemory) -> None:
    """The best of every kind, by the loss that all of them have on the same sequences."""
    model = measured(resident_of("llama"), list(WHOLE))
    every = ComePSettings(granularity=4, spans=5, removals=True, racing=False, finalists=99, heal_in_loop=True)
    steps = ComeP(every).decide(model, 5, [])
    kinds = [_kind(model, step) for step in steps]
    assert len(kinds) == len(set(kinds))
    assert sum(step.op is None for step in steps) == 6
    shown: dict[tuple[int, bool], list[float]] = {kind: [] for kind in kinds}
    for entry in steps[0].evidence["grid"]:
        dropped = "dropped" in entry
        kind = entry["start"] if dropped else entry["start"] + (entry["ratios"][0] >= entry["ratios"][1]), dropped
        shown[kind].append(entry["loss"])
    losses = [min(shown[kind]) for kind in kinds]
    assert losses == sorted(losses)
    assert ComeP(replace(every, finalists=3)).decide(model, 5, []) == steps[:3]


def _kind(model: Intermediate, step: Step) -> tuple[int, bool]:
    """Which layer goes, by which of two gives less (of equal ones the second); and whether it goes as a whole."""
    if step.op is None:
        return step.start, True
    groups, channels = step.evidence["counts"]["kv_groups"], step.evidence["counts"]["channels"]
    total = [groups[index] / sum(groups) + channels[index] / sum(channels) for index in range(2)]
    return step.start + (total[0] >= total[1]), False


def test_of_a_group_one_is_kept_and_the_race_ends_with_so_many() -> None:
    """a1 and a2 are of one group and too close to rank; b is worse than both, c than b."""
    close = {"a1": [0.0, 1.0] * 32, "a2": [1.0, 0.0] * 32}
    track = Track({**close, "b": noisy(20.0, 64, 2), "c": noisy(40.0, 64, 3)})
    _, seen = race(
        list(track.sums), track.losses, track.counts, racing=True, keep=2, group=lambda name: name[0],
        title="race",
    )  # fmt: skip
    assert {name: sums.numel() for name, sums in seen.items()} == {"a1": 64, "a2": 64, "b": 64, "c": 2}
    assert best_of_groups(seen, 3, lambda name: name[0]) == ["a1", "b"]
    assert best_of_groups(seen, 2) == ["a1", "a2"]
    sure = Track({"a": noisy(0.0, 64, 0), "b": noisy(20.0, 64, 2), "c": noisy(40.0, 64, 3)})
    _, seen = race(list(sure.sums), sure.losses, sure.counts, racing=True, keep=2, title="race")
    assert {name: sums.numel() for name, sums in seen.items()} == {"a": 2, "b": 2, "c": 2}


# How they are scored


def steps_of(resident: LoadedModel) -> list[Step]:
    """Two removals and two merges."""
    ops: list[tuple[int, int, Op | None]] = [
        (3, 1, None),
        (1, 2, shared(resident.architecture, (1, 2))),
        (0, 1, None),
        (4, 2, shared(resident.architecture, (4, 5))),
    ]
    return [Step(start=start, count=count, op=op, evidence={"number": n}) for n, (start, count, op) in enumerate(ops)]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_best_healed_model_is_taken(family: str, resident_of: InMemory) -> None:
    resident, found = resident_of(family), []
    steps = steps_of(resident)
    for step in steps:
        model = measured(resident, list(WHOLE))
        healer = take(StepHealer(model, SETTINGS), step.start, step.count, step.op)
        found.append((min(healer["held_out_loss"]), healer, model))
    model = measured(resident, list(WHOLE))
    chosen, report = StepHealer(model, SETTINGS).take(steps)
    number = min(range(4), key=lambda index: found[index][0])
    assert chosen is steps[number]
    _, healer, wanted = found[number]
    assert report["taken"] == healer["taken"] and report["output_projections"] == healer["output_projections"]
    for entry, step, (_, alone, _) in zip(report["finalists"], steps, found, strict=True):
        assert entry["replaced"] == [step.start, step.start + step.count]
        assert (entry["op"] is None) == (step.op is None)
        assert entry["held_out_loss"] == pytest.approx(alone["held_out_loss"], rel=1e-6)
    assert report["held_out_loss"] == pytest.approx(healer["held_out_loss"], rel=1e-6)
    assert model.ops == wanted.ops
    torch.testing.assert_close(model.losses_N, wanted.losses_N, rtol=1e-6, atol=0)
    assert [fitted is None for fitted in model.fitted] == [fitted is None for fitted in wanted.fitted]
    assert len({entry["held_out_loss"][1] for entry in report["finalists"]}) == 4


def test_a_trial_leaves_the_model_as_it_was(resident_of: InMemory) -> None:
    """The layer before the hole and the joined one after it are both fitted, the second on what the first then gives;
    the others are scored after the same layers as before."""
    resident = resident_of("llama")
    joined = shared(resident.architecture, (3, 4))
    ops: list[Op] = [select(0), select(1), select(2), joined, select(5)]
    both = Step(start=2, count=2, op=joined, evidence={})
    other = Step(start=4, count=1, op=None, evidence={})
    alone = take(StepHealer(measured(resident, list(ops)), SETTINGS), 4, 1, None)["held_out_loss"]
    model = measured(resident, list(ops))
    spent = model.layer_forwards
    _, report = StepHealer(model, SETTINGS).take([both, other])
    assert report["finalists"][1]["held_out_loss"] == alone
    by_itself = take(StepHealer(measured(resident, list(ops)), SETTINGS), 2, 2, joined)
    assert report["finalists"][0]["held_out_loss"] == pytest.approx(by_itself["held_out_loss"], rel=1e-6)
    # The original, which was not what was measured; `both`: 3 + 1 + 3 fits and between, twice what comes after, and
    # what was measured again; `other`: 3 fits, and nothing after it (its layer stands before the last one).
    assert model.layer_forwards - spent == pytest.approx(report["layer_forwards"] + 6 + layers_after(report, model))


def layers_after(report: dict[str, object], model: Intermediate) -> int:
    """Layers that are run to measure the model with the step that is taken."""
    return model.depth - min(fit["layer"] for fit in report["output_projections"])  # type: ignore[attr-defined]


def test_candidates_are_scored_on_sequences_that_no_fit_sees(
    resident_of: InMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = resident_of("llama")
    model = measured(resident, list(WHOLE))
    rows: list[list[int]] = []
    losses_after = prune.losses_after

    def looks(of: Intermediate, start: int, some: Sequence[int]) -> torch.Tensor:
        rows.append(list(some))
        return losses_after(of, start, some)

    monkeypatch.setattr(prune, "losses_after", looks)
    StepHealer(model, ClosedFormSettings(ridges=(0.1,), held_out=4)).take(steps_of(resident)[:2])
    assert rows == [list(range(0, 32, 4))] * 4


# Settings


def test_the_published_behaviour_has_neither() -> None:
    settings = replace(ComePSettings(removals=True), **ComePSettings.presets["paper"])
    assert (settings.removals, settings.finalists, settings.racing) == (False, 1, False)


def test_what_they_do_not_go_with() -> None:
    with pytest.raises(UserError) as caught:
        ComePSettings(finalists=3, spans=0)
    assert [problem.message for problem in caught.value.problems] == [
        "--spans is 0; it must be a whole number, 1 or more.",
        "--finalists is 3; it must be 1 without --heal-in-loop.",
    ]
    with pytest.raises(UserError, match="--heal-in-loop"):
        planners.choose_all("sleb,come-p[finalists=2]")
    (chosen,) = planners.choose_all("come-p[finalists=2,removals=yes,heal_in_loop=true]")
    assert chosen.settings == ComePSettings(finalists=2, removals=True, heal_in_loop=True)


def test_streamed_it_is_the_same(tmp_path: Path, checkpoint_of: Opened, resident_of: InMemory) -> None:
    settings, rule = (
        ComePSettings(granularity=3, removals=True, finalists=3, heal_in_loop=True),
        ClosedFormSettings(held_out=2),
    )
    resident = streamed(checkpoint_of("llama"))
    found = [
        ladder_hashes(model, tmp_path / str(number), "come-p", settings=settings, in_loop=rule)
        for number, model in enumerate((resident_of("llama"), resident))
    ]
    assert found[0] == found[1] and len(found[0]) == 3
    assert resident.offload is not None and resident.offload.most <= 2
