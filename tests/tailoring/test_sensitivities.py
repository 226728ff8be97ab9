"""Sensitivities of the members' pieces: measured, saved, loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from intarsia.building.loaded_model import LoadedModel
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.scores import part_scores
from intarsia.recipe.ops import LayerRef
from intarsia.recipe.recipe import Variant, identity
from intarsia.tailoring import warm_start
from intarsia.tailoring.family import Family
from tests.pruning.conftest import corpus_of

CPU = torch.device("cpu")


def test_what_is_measured_is_what_a_plan_measures(pair: Callable[[str], Family], tmp_path: Path) -> None:
    members, corpus = pair("qwen2").checkpoints(), corpus_of(padded=True)
    found = warm_start.measure(members, corpus, device=CPU, dtype=None)
    assert {str(ref) for ref in found} == {f"{name}:{layer}" for name in ("base", "math") for layer in range(6)}
    whole = identity(Variant(name="base", model="x"), 6)
    model = Intermediate(LoadedModel(members["base"], device=CPU), corpus, whole.layers)
    model.measure()
    expected = part_scores(model.measures[2].channels["mlp"], model.modules[2], model.architecture, "mlp")
    torch.testing.assert_close(found[LayerRef(variant="base", layer=2)]["mlp"], expected, rtol=1e-5, atol=0.0)
    path = tmp_path / "scores.safetensors"
    warm_start.save(found, path)
    loaded = warm_start.load(path)
    assert found.keys() == loaded.keys()
    assert all(torch.equal(found[ref][part], loaded[ref][part]) for ref in found for part in found[ref])
