"""Magnitude and Taylor against a model's own weights and gradients."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from intarsia.building.loaded_model import LoadedModel
from intarsia.checkpoint.reader import Checkpoint
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.methods.shortened_llama import saliences
from tests import families
from tests.conftest import InMemory
from tests.pruning.by_hand import climb, kept_layers, ladder_in, ladder_of, planner_of, real_tokens
from tests.pruning.conftest import corpus_of
from tests.recipes_by_hand import select


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


WHOLE = [select(layer) for layer in range(families.DEPTH)]


def saliences_by_hand(resident, corpus) -> list[float]:
    """sum_k sum_ij |dL/dW_ij * W_ij|, L the mean loss over all predictions."""
    model = copy.deepcopy(resident.model).requires_grad_(True)
    real = real_tokens(corpus)
    labels = corpus.input_ids.masked_fill(~real, -100)
    model(corpus.input_ids, attention_mask=real.long(), labels=labels).loss.backward()
    layers = model.get_submodule(resident.architecture.family.modules.layers)
    return [
        sum(
            float((weight.grad * weight.detach()).abs().sum())
            for name, weight in layer.named_parameters()
            if weight.ndim > 1 and "norm" not in name
        )
        for layer in layers
    ]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_scores_are_those_of_the_models_own_backward(family: str, padded: bool, resident_of: InMemory) -> None:
    resident, corpus = resident_of(family), corpus_of(padded=padded)
    model = Intermediate(resident, corpus, WHOLE, batch_tokens=2 * corpus.seq_len)
    model.measure()
    spent = model.layer_forwards
    assert saliences(model) == pytest.approx(saliences_by_hand(resident, corpus), rel=1e-4)
    assert model.layer_forwards - spent == pytest.approx(3 * families.DEPTH)
    assert not any(parameter.requires_grad for parameter in resident.model.parameters())
    assert all(parameter.grad is None for parameter in resident.model.parameters())


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
def test_the_least_salient_goes_first(family: str, resident_of: InMemory, tmp_path: Path) -> None:
    resident, corpus = resident_of(family), corpus_of()
    scores = saliences_by_hand(resident, corpus)
    order = sorted(range(families.DEPTH), key=lambda layer: scores[layer])
    run, stopped, _ = ladder_of("taylor", resident, corpus, tmp_path / "run", 1)
    assert stopped is None and run.depths() == [5, 4, 3, 2, 1]
    for depth in run.depths():
        assert kept_layers(run, depth) == sorted(order[families.DEPTH - depth :])


def test_taylor_plus_keeps_the_first_four_and_the_last_two(resident_of: InMemory, tmp_path: Path) -> None:
    run, stopped, _ = ladder_of("taylor+", resident_of("llama"), corpus_of(), tmp_path / "run", 3)
    assert run.depths() == [] and stopped is not None and "first 4 and the last 2" in stopped
