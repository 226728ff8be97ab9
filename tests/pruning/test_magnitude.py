"""Magnitude and Magnitude+ against the sum of absolute weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from intarsia.building.loaded_model import LoadedModel
from intarsia.checkpoint.reader import Checkpoint
from tests import families
from tests.conftest import InMemory
from tests.pruning.by_hand import climb, kept_layers, ladder_in, ladder_of, planner_of
from tests.pruning.conftest import corpus_of


def scores_by_hand(resident: LoadedModel) -> list[float]:
    return [
        sum(
            float(weight.abs().sum())
            for name, weight in layer.named_parameters()
            if weight.ndim > 1 and "norm" not in name
        )
        for layer in resident.layers
    ]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_smallest_goes_first(family: str, resident_of: InMemory, tmp_path: Path) -> None:
    resident = resident_of(family)
    scores = scores_by_hand(resident)
    order = sorted(range(families.DEPTH), key=lambda layer: scores[layer])
    run, stopped, model = ladder_of("magnitude", resident, corpus_of(), tmp_path / "run", 1)
    assert stopped is None
    assert run.log()[0]["evidence"]["scores"] == pytest.approx(scores)
    for depth in run.depths():
        assert kept_layers(run, depth) == sorted(order[families.DEPTH - depth :])
    assert model.layer_forwards == 0 and model.measures == []  # nothing was run


def test_magnitude_plus_keeps_the_first_four_and_the_last_two(tmp_path: Path) -> None:
    folder = families.save(families.make_model("llama", num_hidden_layers=9), tmp_path / "model")
    resident = LoadedModel(Checkpoint.open(folder, model=str(folder)), device=torch.device("cpu"))
    scores = scores_by_hand(resident)
    order = sorted(range(4, 7), key=lambda layer: scores[layer])
    from intarsia.pruning.intermediate import Intermediate
    from intarsia.recipe.recipe import Variant, identity

    run, whole = ladder_in(tmp_path / "run", {}), identity(Variant(name="base", model="m"), 9)
    stopped = climb(planner_of("magnitude+"), Intermediate(resident, corpus_of(), whole.layers), whole, 5, run)
    assert stopped is not None and "first 4 and the last 2" in stopped
    assert run.depths() == [8, 7, 6]
    for depth in run.depths():
        assert kept_layers(run, depth) == [layer for layer in range(9) if layer not in order[: 9 - depth]]
