"""Layers with few pieces: attention that is one piece (multi-query), MLPs of a handful of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from intarsia.building.materialize import materialize
from intarsia.pruning.methods.come_p import ComePSettings
from intarsia.pruning.methods.laco import LacoSettings
from intarsia.recipe.validate import check
from tests import families
from tests.conftest import InMemory, Opened
from tests.pruning.by_hand import METHODS, ladder_of, planner_of
from tests.pruning.conftest import corpus_of

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
