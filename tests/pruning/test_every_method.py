"""Every method on every family that is built otherwise than Llama: its recipe is a model with the loss it reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.building.materialize import assembled
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.methods.come import ComeSettings
from intarsia.pruning.methods.come_p import ComePSettings
from intarsia.pruning.methods.laco import LacoSettings
from intarsia.pruning.methods.sleb import SlebSettings
from intarsia.recipe.recipe import Select
from intarsia.recipe.validate import check
from tests import families
from tests.conftest import InMemory
from tests.pruning.by_hand import METHODS, ladder_of
from tests.pruning.conftest import corpus_of

RUNS: list[tuple[str, Any]] = [
    *((method, None) for method in METHODS if method != "laco"),
    ("laco", LacoSettings(merge=2)),  # there are no four neighbours of one kind in every family
    ("come", ComeSettings(span_choice="sleb")),
    ("come-p", ComePSettings(granularity=4, spans=2, norm="average")),
    ("come-p", ComePSettings(granularity=2, spans=1, removals=True, half_layers=True)),
    ("sleb", SlebSettings(half_layers=True)),
]


@pytest.mark.parametrize("family", [*families.DENSE, *families.PARALLEL, *families.MIXTURES])
def test_every_method(family: str, resident_of: InMemory, tmp_path: Path) -> None:
    resident, corpus = resident_of(family), corpus_of()
    joined = 0
    for number, (method, settings) in enumerate(RUNS):
        run, stopped, _ = ladder_of(method, resident, corpus, tmp_path / str(number), 4, settings)
        if method in ("taylor+", "magnitude+"):  # of six layers they protect all
            assert run.depths() == [] and stopped is not None
            continue
        depth = run.depths()[-1]
        assert depth == 4 or stopped is not None, method
        recipe = run.recipe(depth)
        check(recipe, {"base": resident.architecture})
        joined += any(not isinstance(op, Select) for op in recipe.layers)
        model = Intermediate(resident, corpus, recipe.layers)
        model.measure()
        with torch.no_grad():
            logits = assembled(recipe, resident)(corpus.input_ids).logits[:, :-1]
        own = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), corpus.input_ids[:, 1:].flatten())
        assert model.loss == pytest.approx(float(own), rel=1e-5), method
    assert joined >= 1
