"""Spans tile the original depth, whatever the ops are, and compose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.anatomy.spec import Anatomy
from intarsia.recipe.compose import compose
from intarsia.recipe.ops import LayerRef, Op, Select
from intarsia.recipe.recipe import Recipe, Span, Variant, derive_spans, identity

BASE = Variant(name="base", model="demo")


def selects(*layers: int) -> list[Op]:
    return [Select(source=LayerRef(variant="base", layer=layer)) for layer in layers]


def tiles(spans: tuple[Span, ...], depth: int) -> bool:
    ends = [0, *(stop for _, stop in spans)]
    return [first for first, _ in spans] == ends[:-1] and ends == sorted(ends) and ends[-1] == depth


def test_identity() -> None:
    assert identity(BASE, 3).spans == ((0, 1), (1, 2), (2, 3))


@pytest.mark.parametrize(
    ("layers", "spans"),
    [
        ([0, 1, 4], ((0, 1), (1, 4), (4, 6))),
        ([2, 5], ((0, 5), (5, 6))),
        ([5], ((0, 6),)),
        ([0, 3, 1, 5], ((0, 3), (3, 3), (3, 5), (5, 6))),
        ([0, 0, 1], ((0, 0), (0, 1), (1, 6))),
        ([0, 9], ((0, 6), (6, 6))),
    ],
)
def test_removed_layers_belong_to_the_one_before(layers: list[int], spans: tuple[Span, ...]) -> None:
    assert derive_spans(selects(*layers), 6) == spans


def test_with_layers_derives_spans_and_forgets_fitted() -> None:
    recipe = identity(BASE, 6).with_layers(selects(0, 3), provenance={"why": "test"})
    assert recipe.spans == ((0, 3), (3, 6))
    assert recipe.fitted == {}
    assert recipe.provenance == {"why": "test"}


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 10))
def test_derived_spans_tile(layers: list[int], depth: int) -> None:
    assert tiles(derive_spans(selects(*layers), depth), depth)


def test_composed_spans_cover_what_both_removed() -> None:
    inner = identity(BASE, 8).with_layers(selects(0, 1, 4, 5, 6))
    outer = identity(Variant(name="cut", model="x"), 5)
    outer = outer.with_layers([Select(source=LayerRef(variant="cut", layer=layer)) for layer in (1, 3)])
    composed = compose(outer, inner, variant="cut")
    assert composed.layers == tuple(selects(1, 5))
    assert outer.spans == ((0, 3), (3, 5))
    assert composed.spans == ((0, 5), (5, 8))


def test_composed_spans_tile(anatomy: Anatomy, recipes_over: Callable[..., st.SearchStrategy[Recipe]]) -> None:
    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        inner = data.draw(recipes_over(anatomy))
        count = len(inner.layers)
        layers = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=6))
        outer = identity(Variant(name="cut", model="x"), count)
        outer = outer.with_layers([Select(source=LayerRef(variant="cut", layer=layer)) for layer in layers])
        assert tiles(compose(outer, inner, variant="cut").spans, inner.depth)

    run()
