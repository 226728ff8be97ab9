"""What was fitted for trials is found again, or fitted again; never half of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intarsia.errors import UserError
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe
from intarsia.tailoring.evaluator import KeptFits
from tests.recipes_by_hand import recipe_of, select


def cut(*layers: int) -> Recipe:
    return recipe_of("model", [select(layer) for layer in layers])


def healed(recipe: Recipe, value: float) -> Recipe:
    return replace(recipe, fitted={1: {"mlp.down_proj.weight": np.full((4, 6), value, dtype=np.float32)}})


@pytest.fixture
def fits(tmp_path: Path) -> KeptFits:
    found = KeptFits(tmp_path / "fits")
    found.start()
    return found


def test_kept_and_found(fits: KeptFits) -> None:
    first, second = cut(0, 2, 3), cut(0, 1, 3)
    fits.keep(first, healed(first, 0.1))
    found = fits.find(first)
    assert found is not None and fits.find(second) is None
    assert schema.content_hash(found) == schema.content_hash(healed(first, 0.1))
    assert np.array_equal(found.fitted[1]["mlp.down_proj.weight"], np.full((4, 6), 0.1, dtype=np.float32))


def test_dropped(fits: KeptFits, tmp_path: Path) -> None:
    first, second = cut(0, 2, 3), cut(0, 1, 3)
    for recipe in (first, second):
        fits.keep(recipe, healed(recipe, 1.0))
    fits.keep_only({schema.content_hash(second), "of nothing"})
    assert fits.find(first) is None and fits.find(second) is not None
    assert {path.stem for path in (tmp_path / "fits").iterdir()} == {schema.content_hash(second)}
    fits.end()
    assert not (tmp_path / "fits").exists() and fits.find(second) is None
    fits.end()


def test_a_worker_elsewhere_keeps_nothing(tmp_path: Path) -> None:
    fits, recipe = KeptFits(tmp_path / "not" / "there"), cut(0, 2, 3)
    fits.keep(recipe, healed(recipe, 1.0))
    fits.keep_only(())
    assert fits.find(recipe) is None and not (tmp_path / "not").exists()


def test_half_of_it_counts_for_nothing(fits: KeptFits, tmp_path: Path) -> None:
    recipe = cut(0, 2, 3)
    fits.keep(recipe, healed(recipe, 1.0))
    side = tmp_path / "fits" / f"{schema.content_hash(recipe)}.safetensors"
    whole = side.read_bytes()
    side.write_bytes(whole[: len(whole) // 2])
    assert fits.find(recipe) is None
    fits.keep(recipe, healed(recipe, 2.0))
    found = fits.find(recipe)
    assert found is not None and found.fitted[1]["mlp.down_proj.weight"][0, 0] == 2.0
    side.unlink()
    assert fits.find(recipe) is None


@pytest.mark.parametrize("error", [UserError("A full disk."), PermissionError()])
def test_no_room_for_it(error: Exception, fits: KeptFits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(schema, "write_tensors", full)
    recipe = cut(0, 2, 3)
    fits.keep(recipe, healed(recipe, 1.0))
    assert fits.find(recipe) is None and not list((tmp_path / "fits").iterdir())
