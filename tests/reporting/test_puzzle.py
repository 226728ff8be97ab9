"""The puzzle picture says exactly what the recipe says."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from intarsia.architecture.detect import detect
from intarsia.recipe.recipe import Concat, Cut, LayerRef, Merge, Mix, Op, Recipe, Select, Variant, derive_spans
from intarsia.reporting.puzzle import (
    Pieces,
    made_of,
    pieces_of,
    pieces_of_architecture,
    puzzle_file,
    puzzle_svg,
    ribbons,
    sources_in_words,
)
from tests.reporting.runs import CHANNELS, GROUPS, JOINED, MERGED, ladder, of
from tests.reporting.runs import recipe as family_recipe

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def pieces() -> Pieces:
    config = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 8}
    return pieces_of_architecture(
        detect({**config, "num_key_value_heads": 4, "intermediate_size": 40, "vocab_size": 64})
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


def test_ribbons_are_as_wide_as_the_share_of_pieces(recipe: Recipe, pieces: Pieces) -> None:
    found = {(ribbon.source.layer, ribbon.output): ribbon for ribbon in ribbons(recipe, pieces)}
    assert found[0, 0].into == (0.0, 1.0)
    assert found[1, 1].into == pytest.approx((0.0, (1 / 4 + 30 / 40) / 2))
    assert found[2, 1].into == pytest.approx((0.5, 1.0))
    assert set(found) == {(0, 0), (1, 1), (2, 1)}


def test_sizes(recipe: Recipe, pieces: Pieces) -> None:
    assert pieces == Pieces(n_kv_heads=4, n_mlp_pieces=40, heads_per_group=2)
    assert pieces_of(replace(recipe, layers=recipe.layers[:1]), recipe) == Pieces(n_kv_heads=4, n_mlp_pieces=40)
    assert pieces_of(replace(recipe, layers=recipe.layers[:1])) == Pieces(n_kv_heads=1, n_mlp_pieces=1)
    experts = replace(pieces, experts=True)
    assert ribbons(recipe, experts)[1].title == "layer 1: 1 of 4 KV groups, 30 of 40 experts"
    assert "30 of 40 experts" in puzzle_svg(recipe, experts)


def test_a_source_used_twice_gives_two_pieces_of_its_edge(pieces: Pieces) -> None:
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
    assert [ribbon.out_of for ribbon in ribbons(recipe, pieces) if ribbon.source.layer == 0] == [(0.0, 0.5), (0.5, 1.0)]


def test_the_file_is_well_formed_and_complete(recipe: Recipe, pieces: Pieces) -> None:
    text = puzzle_file(recipe, pieces)
    tree = ElementTree.fromstring(text)
    titles = [element.text for element in tree.iter(f"{SVG}title")]
    assert titles[0] == "4 layers become 2"
    assert "layer 3: dropped" in titles
    assert "layer 1: 1 of 4 KV groups, 30 of 40 channels" in titles
    assert len(list(tree.iter(f"{SVG}path"))) == 3
    assert not list(tree.iter(f"{SVG}script")) and "var(" not in text


def test_the_picture_of_the_page_has_every_layer_and_ribbon() -> None:
    recipe = ladder()[0][0]
    pieces = pieces_of(recipe)
    assert pieces == Pieces(n_kv_heads=GROUPS, n_mlp_pieces=CHANNELS)
    svg = puzzle_svg(recipe, pieces)
    ElementTree.fromstring(svg)
    assert svg.count('data-side="in"') == 6 and svg.count('data-side="out"') == 5
    assert svg.count('class="ribbon"') == 6
    assert len(re.findall(r'fill="var\(--w\d\)" fill-opacity="\.24"', svg)) == 4  # kept whole
    assert 'aria-label="layer 3: in output layer 2"' in svg
    assert "output layer 2: layer 2: 1 of 4 KV groups, 30 of 40 channels; layer 3: 3 of 4 KV groups" in svg
    dropped = puzzle_svg(ladder()[1][0], pieces)
    assert 'aria-label="layer 4: dropped"' in dropped and dropped.count("stroke-dasharray") == 1


def test_what_a_layer_is_made_of() -> None:
    blend = Merge(
        sources=(of(2), of(2, "math")),
        weights=(0.5, 0.5),
        method="linear",
        mlp=Mix(weights=(0.0, 1.0), method="ties", params={"density": 0.2, "lambda": 1.5}),
        base=of(2),
    )
    for op, named, words in (
        (Select(source=of(5, "math")), True, "math:5, whole"),
        (Select(source=of(5)), False, "5, whole"),
        (JOINED, True, "base:3 (KV groups 1, channels 3) + math:4 (KV groups 1, channels 1)"),
        (ladder()[0][1:][1], False, "2 (KV groups 1, channels 30) + 3 (KV groups 3, channels 10)"),
        (MERGED, True, "task_arithmetic of 0.3 × math:1; output times 0.9"),
        (
            blend,
            True,
            "attention: linear of 0.5 × base:2, 0.5 × math:2; MLP: ties of 1 × math:2; density 0.2; lambda 1.5",
        ),
    ):
        assert made_of(op, "channels", named=named) == words


def test_sources_in_words(recipe: Recipe) -> None:
    assert sources_in_words(recipe) == (
        "2 layers: 1 kept whole, 1 joined from pieces. 1 of the 4 original layers is dropped."
    )
    family = family_recipe(Select(source=of(0)), MERGED, JOINED, Select(source=of(5, "math")))
    assert sources_in_words(family).startswith("4 layers: 1 of base, 1 of math, 1 merged, 1 joined from pieces.")
