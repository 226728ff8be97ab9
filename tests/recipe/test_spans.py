"""Spans tile the original depth, whatever the ops are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.recipe.ops import LayerRef, Op, Select
from intarsia.recipe.recipe import Span, Variant, derive_spans, identity

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
