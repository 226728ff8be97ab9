"""What holds for every method, also where layers have few pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from intarsia.building.materialize import assembled, materialize
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.methods.come import ComeSettings
from intarsia.pruning.methods.come_p import ComePSettings
from intarsia.pruning.methods.laco import LacoSettings
from intarsia.pruning.methods.sleb import SlebSettings
from intarsia.recipe.recipe import Select
from intarsia.recipe.validate import check
from tests import families
from tests.conftest import InMemory, Opened
from tests.pruning.by_hand import METHODS, ladder_of, planner_of
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


OWN: dict[str, Any] = {"come-p": ComePSettings(granularity=3, spans=2), "laco": LacoSettings(merge=2, lowest=0)}
# The plus variants keep six layers, which is all there are.
TRIED = [method for method in METHODS if not method.endswith("+")]


@pytest.mark.parametrize("method", TRIED)
def test_attention_in_one_piece(method: str, resident_of: InMemory, checkpoint_of: Opened, tmp_path: Path) -> None:
    """Every method gives a model that can be built, with the loss that it says."""
    corpus, checkpoint = corpus_of(), checkpoint_of("falcon-7b")
    run, stopped, _ = ladder_of(method, resident_of("falcon-7b"), corpus, tmp_path / "run", 4, OWN.get(method))
    assert stopped is None and run.depths() in ([5, 4], [4])
    recipe = run.recipe(4)
    check(recipe, {"base": checkpoint.architecture})
    materialize(recipe, {"base": checkpoint}, tmp_path / "out")
    built = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        loss = float(built(corpus.input_ids, labels=corpus.input_ids).loss)
    measured = run.log()[-1]["loss"]
    assert measured is None or measured == pytest.approx(loss, rel=1e-5)
    assert (measured is not None) == planner_of(method).progressive


@pytest.mark.parametrize("family", families.MIXTURES)
def test_a_merged_mixture_has_as_many_experts_as_the_config_says(
    family: str, resident_of: InMemory, checkpoint_of: Opened, tmp_path: Path
) -> None:
    run, _, _ = ladder_of("come", resident_of(family), corpus_of(), tmp_path / "run", 5)
    entry = run.log()[0]["evidence"]["counts"]
    assert sum(entry["channels"]) == families.EXPERTS and sum(entry["kv_groups"]) == 4
    materialize(run.recipe(5), {"base": checkpoint_of(family)}, tmp_path / "out")
    built = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    start, _ = run.log()[0]["merged"]
    experts = built.model.layers[start].mlp.experts
    assert experts.gate_up_proj.shape[0] == families.EXPERTS == built.model.layers[start].mlp.gate.weight.shape[0]
