"""Removals as candidates of CoMe-P beside merges, against the same by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.building.loaded_model import LoadedModel
from intarsia.healing.settings import ClosedFormSettings
from intarsia.pruning import prune
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.ladder import Ladder
from intarsia.pruning.methods.come_p import ComeP, ComePSettings
from intarsia.pruning.methods.sleb import SlebSettings
from intarsia.pruning.prune import StepHealer
from intarsia.recipe.recipe import Op, Variant, identity
from tests import families
from tests.conftest import InMemory, Opened
from tests.pruning.by_hand import climb, ladder_in, losses_with, planner_of, take
from tests.pruning.test_in_loop import SETTINGS, written_by
from tests.recipes_by_hand import select
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
    step = ComeP(EVERY).decide(model, 5, [])
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
    settings = ComePSettings(merge=3, granularity=1, spans=1, removals=True, racing=False)
    model = measured(resident_of("llama"), list(WHOLE))
    before = model.layer_forwards
    planner = ComeP(settings)
    step = planner.decide(model, 4, [{}])
    assert step is not None and step.count - (step.op is not None) == 2
    at_most = planner.forwards_at_most(model.architecture, 4, len(model.corpus))
    assert model.layer_forwards - before <= at_most - 6 - 4  # what is measured before and after
    # Of the three ratios of the one span two are removals; the middle layer alone is none of one run of layers.
    grid = step.evidence["grid"]
    removals = [entry for entry in grid if "dropped" in entry]
    assert [(entry["start"], entry["dropped"]) for entry in removals] == [(start, 2) for start in range(5)]
    assert [entry["ratios"] for entry in grid[5:]] == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("in_loop", [False, True], ids=["", "in-loop"])
def test_with_removals_alone_it_is_sleb(in_loop: bool, resident_of: InMemory, tmp_path: Path) -> None:
    """A grid of one step has no ratios but those that drop a layer: the same recipes, with what is fitted on them."""
    resident = resident_of("llama")
    settings = ComePSettings(granularity=1, removals=True, racing=False)
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


# Healing in the loop


def test_fits_are_scored_on_sequences_that_they_do_not_see(
    resident_of: InMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = measured(resident_of("llama"), list(WHOLE))
    rows: list[list[int]] = []
    losses_after = prune.losses_after

    def looks(of: Intermediate, start: int, some: Sequence[int]) -> torch.Tensor:
        rows.append(list(some))
        return losses_after(of, start, some)

    monkeypatch.setattr(prune, "losses_after", looks)
    take(StepHealer(model, ClosedFormSettings(ridges=(0.1,), held_out=4)), 3, 1, None)
    assert rows == [list(range(0, 32, 4))] * 2


# Settings


def test_the_published_behaviour_has_neither() -> None:
    settings = replace(ComePSettings(removals=True), **ComePSettings.presets["paper"])
    assert (settings.removals, settings.racing) == (False, False)


def test_streamed_it_is_the_same(tmp_path: Path, checkpoint_of: Opened, resident_of: InMemory) -> None:
    settings = ComePSettings(granularity=3, removals=True, heal_in_loop=True)
    rule = ClosedFormSettings(held_out=2)
    resident = streamed(checkpoint_of("llama"))
    found = [
        ladder_hashes(model, tmp_path / str(number), "come-p", settings=settings, in_loop=rule)
        for number, model in enumerate((resident_of("llama"), resident))
    ]
    assert found[0] == found[1] and len(found[0]) == 3
    assert resident.offload is not None and resident.offload.most <= 2
