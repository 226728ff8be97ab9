"""The puzzle picture says exactly what the recipe says."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from intarsia.anatomy.detect import detect
from intarsia.anatomy.spec import Anatomy
from intarsia.recipe.ops import Concat, Cut, LayerRef, Merge, Op, Select
from intarsia.recipe.recipe import Recipe, Variant, derive_spans
from intarsia.reporting.puzzle import puzzle_svg, ribbons

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def anatomy() -> Anatomy:
    return detect(
        {
            "model_type": "llama",
            "num_hidden_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "intermediate_size": 40,
            "vocab_size": 64,
        }
    )


@pytest.fixture
def recipe() -> Recipe:
    def ref(layer: int) -> LayerRef:
        return LayerRef(variant="base", layer=layer)

    half = {"attention": 0.25, "mlp": 0.75}
    rest = {"attention": 0.75, "mlp": 0.25}
    joined = Concat(
        cuts=(
            Cut(source=ref(1), kv_groups=(0,), channels=tuple(range(30)), weights=half),
            Cut(source=ref(2), kv_groups=(1, 2, 3), channels=tuple(range(10)), weights=rest),
        )
    )
    layers: tuple[Op, ...] = (Select(source=ref(0)), joined)
    return Recipe(
        variants=(Variant(name="base", model="<model>"),),
        base="base",
        depth=4,
        layers=layers,
        spans=derive_spans(layers, 4),
    )


def test_ribbons_are_as_wide_as_the_share_of_pieces(recipe: Recipe, anatomy: Anatomy) -> None:
    found = {(ribbon.source, ribbon.output): ribbon for ribbon in ribbons(recipe, anatomy)}
    assert found[0, 0].into == (0.0, 1.0)
    assert found[1, 1].into == pytest.approx((0.0, (1 / 4 + 30 / 40) / 2))
    assert found[2, 1].into == pytest.approx((0.5, 1.0))
    assert set(found) == {(0, 0), (1, 1), (2, 1)}


def test_experts_are_called_so(recipe: Recipe, anatomy: Anatomy) -> None:
    titles = [ribbon.title for ribbon in ribbons(recipe, replace(anatomy, n_experts=40))]
    assert titles[1] == "layer 1: 1 of 4 KV groups, 30 of 40 experts"
    assert "30 of 40 experts" in puzzle_svg(recipe, replace(anatomy, n_experts=40))


def test_a_source_used_twice_gives_two_pieces_of_its_edge(anatomy: Anatomy) -> None:
    source = LayerRef(variant="base", layer=0)
    other = LayerRef(variant="base", layer=1)
    layers: tuple[Op, ...] = (
        Merge(sources=(source, other), weights=(0.5, 0.5)),
        Merge(sources=(source, other), weights=(0.5, 0.5)),
    )
    recipe = Recipe(
        variants=(Variant(name="base", model="m"),),
        base="base",
        depth=4,
        layers=layers,
        spans=derive_spans(layers, 4),
    )
    assert [ribbon.out_of for ribbon in ribbons(recipe, anatomy) if ribbon.source == 0] == [(0.0, 0.5), (0.5, 1.0)]


@pytest.mark.parametrize("direction", ["down", "right"])
def test_the_svg_is_well_formed_and_complete(recipe: Recipe, anatomy: Anatomy, direction: str) -> None:
    tree = ElementTree.fromstring(puzzle_svg(recipe, anatomy, direction="down" if direction == "down" else "right"))
    titles = [element.text for element in tree.iter(f"{SVG}title")]
    assert titles[0] == "4 layers become 2"
    assert "layer 3, dropped" in titles
    assert "layer 1: 1 of 4 KV groups, 30 of 40 channels" in titles
    assert len(list(tree.iter(f"{SVG}path"))) == 3
    assert not list(tree.iter(f"{SVG}script"))
