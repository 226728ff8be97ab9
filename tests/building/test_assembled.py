"""A recipe's model in memory is the model of the folder that is built from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from intarsia.building.loaded_model import LoadedModel
from intarsia.building.materialize import assembled, materialize
from intarsia.checkpoint.reader import Checkpoint
from intarsia.recipe.ops import Merge
from intarsia.recipe.recipe import Recipe
from tests import families
from tests.conftest import InMemory
from tests.recipes_by_hand import recipe_of, ref, select, shared

IDS = torch.randint(2, families.VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(3))


def some_recipe(resident: LoadedModel) -> Recipe:
    """Layers of every kind, out of their old places, and two fitted tensors."""
    architecture = resident.architecture
    summed = Merge(sources=(ref(4), ref(5)), weights=(0.25, 0.75))
    recipe = recipe_of(str(resident.checkpoint.folder), (select(1), shared(architecture, (2, 3)), summed, select(5)))
    name = f"{architecture.modules(architecture.writer('mlp'))[0]}.weight"
    chance = np.random.default_rng(0)
    fitted = {
        index: {name: chance.normal(0, 0.2, architecture.layer_shapes()[name]).astype(np.float32)} for index in (0, 1)
    }
    return replace(recipe, fitted=fitted)


def built_and_loaded(recipe: Recipe, checkpoint: Checkpoint, out: Path, dtype: torch.dtype) -> torch.nn.Module:
    materialize(recipe, {"base": checkpoint}, out)
    return AutoModelForCausalLM.from_pretrained(out, dtype=dtype).eval()


def written(model: torch.nn.Module) -> torch.Tensor:
    return model.generate(IDS[:1, :5], max_new_tokens=12, do_sample=False)


@torch.no_grad()
@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_same_as_the_built_folder(family: str, resident_of: InMemory, tmp_path: Path) -> None:
    resident = resident_of(family)
    recipe = some_recipe(resident)
    before = resident.model(IDS).logits
    model = assembled(recipe, resident)
    other = built_and_loaded(recipe, resident.checkpoint, tmp_path / "out", torch.float32)
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # Where a tensor begins in memory decides in which order some processors add: weights are equal, sums nearly.
    torch.testing.assert_close(model(IDS).logits, other(IDS).logits, rtol=0, atol=2e-6)
    assert torch.equal(written(model), written(other))  # the cache has a place for every layer
    assert model.config.to_diff_dict().keys() == other.config.to_diff_dict().keys()
    ways = [getattr(each.config, "_experts_implementation", None) for each in (model, other)]
    assert ways[0] == ways[1]
    assert model.config.num_hidden_layers == 4
    assert torch.equal(resident.model(IDS).logits, before)
    assert resident.model.config.num_hidden_layers == 6


@torch.no_grad()
def test_in_another_dtype_fitted_tensors_are_rounded_as_on_disk(tmp_path: Path) -> None:
    families.save(families.make_model("llama").bfloat16(), tmp_path / "bf16")
    checkpoint = Checkpoint.open(tmp_path / "bf16", model="bf16")
    resident = LoadedModel(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    recipe = some_recipe(resident)
    other = built_and_loaded(recipe, checkpoint, tmp_path / "out", torch.float32)
    assert torch.equal(assembled(recipe, resident)(IDS).logits, other(IDS).logits)


def test_parameters_are_shared(resident_of: InMemory) -> None:
    resident = resident_of("llama")
    recipe = recipe_of("llama", (select(0), select(3)))
    ours = {id(parameter) for parameter in assembled(recipe, resident).parameters()}
    assert ours <= {id(parameter) for parameter in resident.model.parameters()}
    assert len(ours) == 2 * 9 + 3
