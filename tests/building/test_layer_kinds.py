"""Layers that attend in different ways: each brings its own way to its new place, and the config says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from intarsia.activations.stream import LayerStream
from intarsia.architecture.detect import detect
from intarsia.building.loaded_model import LoadedModel
from intarsia.building.materialize import assembled, materialize
from intarsia.checkpoint.reader import Checkpoint
from intarsia.errors import UserError
from intarsia.recipe.recipe import Merge, Recipe
from intarsia.recipe.validate import check
from tests import families
from tests.conftest import Folder, InMemory, Opened
from tests.families_dense import UNLIKE
from tests.recipes_by_hand import recipe_of, ref, select, shared

# Longer than every window of the tiny models.
IDS = torch.randint(2, families.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))


def mixed(checkpoint: Checkpoint) -> Recipe:
    """Both kinds of layers, all in new places: 1, 2, pieces of 0 and 4, 3, 5."""
    architecture = checkpoint.architecture
    return recipe_of(checkpoint.model, [select(1), select(2), shared(architecture, [0, 4]), select(3), select(5)])


@torch.no_grad()
@pytest.mark.parametrize("family", UNLIKE)
def test_a_layer_brings_its_kind_along(family: str, resident_of: InMemory, tmp_path: Path) -> None:
    """Reloaded from disk, assembled in memory, and chained layer by layer: one model."""
    resident = resident_of(family)
    recipe = mixed(resident.checkpoint)
    materialize(recipe, {"base": resident.checkpoint}, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    stream = LayerStream(resident.model, resident.architecture)
    entry = stream.enter(IDS, None)
    h = entry.h_BTD
    for index, op in enumerate(recipe.layers):
        h = stream.run(resident.module(op, recipe.fitted.get(index)), h, entry.calls[op.sources[0].layer])
    chain = stream.logits(h, IDS, None)
    torch.testing.assert_close(loaded(IDS).logits, chain, rtol=1e-5, atol=1e-5)
    assert torch.equal(assembled(recipe, resident)(IDS).logits, loaded(IDS).logits)
    cached, plain = (
        loaded.generate(IDS[:1, :6], use_cache=use, max_new_tokens=20, min_new_tokens=20, do_sample=False)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)


@torch.no_grad()
@pytest.mark.parametrize("family", UNLIKE)
def test_the_kind_of_a_layer_matters(family: str, resident_of: InMemory, tmp_path: Path) -> None:
    """Else the test above could not fail: with a list as for the old places, the logits are others."""
    resident = resident_of(family)
    materialize(mixed(resident.checkpoint), {"base": resident.checkpoint}, tmp_path / "out")
    right = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    name = "no_rope_layers" if family == "smollm3" else "layer_types"
    assert config[name] == [resident.checkpoint.config[name][layer] for layer in (1, 2, 0, 3, 5)]
    config[name] = resident.checkpoint.config[name][:5]
    file.write_text(json.dumps(config), encoding="utf-8")
    wrong = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits
    assert float((wrong - right).abs().max()) > 1e-3


RULES = {
    "gemma2": ({}, ()),
    "gemma3": ({"sliding_window_pattern": 2}, ("sliding_window_pattern",)),
    "olmo3": ({}, ()),
    "smollm3": ({"no_rope_layer_interval": 2}, ("no_rope_layer_interval",)),
}


def by_rule(family: str, folder: Path, out: Path) -> Checkpoint:
    """The family's model with a config that states its lists by a rule, as older ones do."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in ("layer_types", "no_rope_layers", "_sliding_window_pattern", "no_rope_layer_interval"):
        config.pop(name, None)
    (out / "config.json").write_text(json.dumps({**config, **RULES[family][0]}), encoding="utf-8")
    return Checkpoint.open(out, model="by-rule")


@torch.no_grad()
@pytest.mark.parametrize("family", RULES)
def test_a_rule_becomes_a_list(family: str, model_folder: Folder, tmp_path: Path) -> None:
    """The rule would distinguish the layers by their new places."""
    source = by_rule(family, model_folder(family), tmp_path / "source")
    theirs: Any = AutoConfig.from_pretrained(source.folder)
    for name, values in source.architecture.per_layer.items():
        assert list(values) == list(getattr(theirs, name))  # as transformers makes it
    kinds = source.architecture.layer_types
    assert kinds is not None and len(set(kinds)) == 2
    kept = [0, *range(2, families.DEPTH)]
    recipe = recipe_of("by-rule", [select(layer) for layer in kept])
    materialize(recipe, {"base": source}, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    for name, values in source.architecture.per_layer.items():
        assert written[name] == [values[layer] for layer in kept]
    assert not any(name in written for name in RULES[family][1])
    assert detect(written).layer_types == tuple(kinds[layer] for layer in kept)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    in_memory = assembled(recipe, LoadedModel(source, device=torch.device("cpu")))
    assert torch.equal(loaded(IDS).logits, in_memory(IDS).logits)


def test_a_rule_that_still_holds_stays(model_folder: Folder, tmp_path: Path) -> None:
    source = by_rule("gemma3", model_folder("gemma3"), tmp_path / "source")
    materialize(recipe_of("by-rule", [select(n) for n in range(4)]), {"base": source}, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert written["sliding_window_pattern"] == 2
    assert written["layer_types"] == ["sliding_attention", "full_attention"] * 2


@pytest.mark.parametrize("family", UNLIKE)
def test_layers_of_different_kinds_are_not_joined(family: str, checkpoint_of: Opened) -> None:
    checkpoint = checkpoint_of(family)
    architecture = checkpoint.architecture
    kinds = architecture.layer_types
    assert kinds is not None
    for op in (shared(architecture, [1, 2]), Merge(sources=(ref(1), ref(2)), weights=(0.5, 0.5))):
        with pytest.raises(UserError, match=r"layers\[0\]: expected sources of one layer type") as caught:
            check(recipe_of(checkpoint.model, [op, *(select(n) for n in (0, 3))]), {"base": architecture})
        assert f"base:1 is {kinds[1]}, base:2 is {kinds[2]}" in str(caught.value)
        assert "Join layers of one type only." in str(caught.value)
