"""Layers that are trained on what the trained layers before them give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from intarsia.activations.stream import LayerStream
from intarsia.building.loaded_model import LoadedModel
from intarsia.data.corpus import Corpus
from intarsia.errors import UserError
from intarsia.healing import layer_training, layerwise
from intarsia.healing.losses import hidden_mse
from intarsia.healing.stages.layerwise import LayerwiseSettings
from intarsia.healing.training import Text
from intarsia.recipe.recipe import Recipe
from tests import families
from tests.conftest import InMemory
from tests.healing.conftest import Cut, Tokens
from tests.recipes_by_hand import recipe_of, select

QUICK = LayerwiseSettings(batch_tokens=64, evaluations=3, lr=1e-2, kl=0.0, mse=1.0, inputs="student", layers="after")


def run_to(recipe: Recipe, resident: LoadedModel, corpus: Corpus, depth: int) -> Tensor:
    """Hidden states after that many output layers."""
    stream = LayerStream(resident.model, resident.architecture)
    entry = stream.enter(corpus.input_ids, None)
    h_BTD = entry.h_BTD
    for index in range(depth):
        op = recipe.layers[index]
        module = resident.module(op, recipe.fitted.get(index))
        h_BTD = stream.run(module, h_BTD, entry.calls[op.sources[0].layer])
    return h_BTD


def original(resident: LoadedModel, corpus: Corpus, depth: int) -> Tensor:
    stream = LayerStream(resident.model, resident.architecture)
    entry = stream.enter(corpus.input_ids, None)
    h_BTD = entry.h_BTD
    for layer in range(depth):
        h_BTD = stream.run(resident.layers[layer], h_BTD, entry.calls[layer])
    return h_BTD


def without(recipe: Recipe, index: int) -> Recipe:
    return replace(recipe, fitted={i: tensors for i, tensors in recipe.fitted.items() if i != index})


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_losses_are_those_behind_the_trained_layers(
    family: str, cut: Cut, resident_of: InMemory, tokens: Tokens
) -> None:
    _, recipe = cut(family)
    resident = resident_of(family)
    train, held_out = tokens()
    healed, report = layerwise.train(recipe, resident, Text.of(train, held_out), settings=QUICK)
    assert [row["layer"] for row in report] == [2, 3]
    with torch.inference_mode():
        for row, stop in zip(report, (4, 6), strict=True):
            wanted = original(resident, held_out, stop)
            for key, when in (("loss_before", without(healed, row["layer"])), ("loss_after", healed)):
                found = run_to(when, resident, held_out, row["layer"] + 1)
                per_row = [float(hidden_mse(wanted[n : n + 1], found[n : n + 1])) for n in range(len(held_out))]
                assert row[key] == pytest.approx(np.mean(per_row), rel=2e-4)


def test_layers_behind_are_trained_too(cut: Cut, resident_of: InMemory, tokens: Tokens) -> None:
    _, recipe = cut("llama")
    resident = resident_of("llama")
    longer = identity_behind(recipe)
    _, alone = layerwise.train(longer, resident, Text.of(*tokens()), settings=LayerwiseSettings(batch_tokens=64))
    _, behind = layerwise.train(longer, resident, Text.of(*tokens()), settings=QUICK)
    assert [row["layer"] for row in alone] == [2]
    assert [row["layer"] for row in behind] == [2, 3, 4]


def identity_behind(recipe: Recipe) -> Recipe:
    """Layers 0 and 1, pieces of 2 and 3, then 4 and 5 as they are."""
    layers = [select(0), select(1), recipe.layers[2], select(4), select(5)]
    return recipe_of(recipe.variants[0].model, layers)


def test_killed_and_continued_is_as_undisturbed(
    cut: Cut, resident_of: InMemory, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, recipe = cut("qwen2")
    resident = resident_of("qwen2")
    undisturbed, _ = layerwise.train(recipe, resident, Text.of(*tokens()), settings=QUICK)
    step, steps = layer_training._Training._step, []

    def dying(self: layer_training._Training, number: int) -> float:
        steps.append(number)
        if len(steps) == 9:  # in the second layer: each takes six steps
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(layer_training._Training, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        layerwise.train(recipe, resident, Text.of(*tokens()), settings=QUICK, folder=tmp_path)
    continued, _ = layerwise.train(recipe, resident, Text.of(*tokens()), settings=QUICK, folder=tmp_path)
    assert len(steps) < 9 + 6  # the first layer was not trained again
    for index in (2, 3):
        for name, array in undisturbed.fitted[index].items():
            assert np.array_equal(array, continued.fitted[index][name])


def test_spilled_states_are_the_same(cut: Cut, resident_of: InMemory, tokens: Tokens, tmp_path: Path) -> None:
    _, recipe = cut("llama")
    resident = resident_of("llama")
    kept, _ = layerwise.train(recipe, resident, Text.of(*tokens()), settings=QUICK)
    spilled, _ = layerwise.train(recipe, resident, Text.of(*tokens()), settings=QUICK, folder=tmp_path, memory_bytes=0)
    assert all(np.array_equal(kept.fitted[3][name], spilled.fitted[3][name]) for name in kept.fitted[3])
    assert not list(tmp_path.glob("intarsia-hidden-*"))


@pytest.mark.parametrize(("name", "value"), [("inputs", "both"), ("layers", "all")])
def test_settings_that_are_none(name: str, value: str) -> None:
    with pytest.raises(UserError, match=name):
        LayerwiseSettings(**{name: value})  # type: ignore[arg-type]
