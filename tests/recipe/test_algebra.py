"""Composing layers equals building twice, seen on pieces that carry labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.architecture.spec import PARTS, Architecture, Part
from intarsia.errors import UserError
from intarsia.recipe.algebra import concat_of, merge_of, simplify
from intarsia.recipe.recipe import (
    Concat,
    Cut,
    LayerRef,
    Merge,
    Mix,
    NormMode,
    Op,
    Recipe,
    Select,
    Span,
    Variant,
    derive_spans,
    identity,
)
from intarsia.recipe.validate import check

Recipes = Callable[..., st.SearchStrategy[Recipe]]
# A layer by hand: for each part the labels of its pieces in order, and how much each original layer counts in what
# belongs to no piece.
Layer = dict[Part, tuple[list[tuple[LayerRef, int]], Counter[LayerRef]]]
EQUAL: dict[Part, float] = {"attention": 0.5, "mlp": 0.5}
NONE: dict[Part, Sequence[int]] = {}


def ref(layer: int, variant: str = "base") -> LayerRef:
    return LayerRef(variant=variant, layer=layer)


def select(layer: int, variant: str = "base") -> Select:
    return Select(source=ref(layer, variant))


def cut(layer: int, kv_groups: Sequence[int], channels: Sequence[int], weight: float, variant: str = "base") -> Cut:
    weights: dict[Part, float] = {"attention": weight, "mlp": weight}
    return Cut(source=ref(layer, variant), kv_groups=tuple(kv_groups), channels=tuple(channels), weights=weights)


def original(source: LayerRef, architecture: Architecture) -> Layer:
    return {
        part: ([(source, piece) for piece in range(architecture.n_pieces(part))], Counter({source: 1.0}))
        for part in PARTS
    }


def build(op: Op, model: Callable[[LayerRef], Layer]) -> Layer:
    """What an op makes of labelled layers, by the definition of each op."""
    if isinstance(op, Select):
        return model(op.source)
    assert isinstance(op, Concat)
    made: Layer = {}
    for part in PARTS:
        pieces: list[tuple[LayerRef, int]] = []
        weights: Counter[LayerRef] = Counter()
        for found in op.cuts:
            labels, shares = model(found.source)[part]
            pieces += [labels[index] for index in found.pieces(part)]
            for source, share in shares.items():
                weights[source] += found.weights[part] * share  # type: ignore[assignment]
        made[part] = pieces, weights
    return made


def grouped(layer: Layer) -> dict[Part, dict[LayerRef, list[int]]]:
    """Pieces by the layer they come from, in order: all that decides what a layer computes."""
    return {
        part: {source: [piece for owner, piece in pieces if owner == source] for source, _ in pieces}
        for part, (pieces, _) in layer.items()
    }


def assert_same(found: Layer, expected: Layer) -> None:
    assert grouped(found) == grouped(expected)
    for part in PARTS:
        sources = {*found[part][1], *expected[part][1]}
        for source in sources:
            assert found[part][1][source] == pytest.approx(expected[part][1][source], abs=1e-9)


@pytest.mark.parametrize("norm", ["fold", "average"])
def test_concatenation_is_closed_under_composition(
    architecture: Architecture, architecture_with: Callable[..., Architecture], recipes_over: Recipes, norm: NormMode
) -> None:
    weighing = architecture_with(attention_bias=True, mlp_bias=True)

    @settings(deadline=None)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        inner = data.draw(recipes_over(architecture, norm=norm, merges=False))
        outer = data.draw(
            recipes_over(architecture, depth=len(inner.layers), norm=norm, merges=False, variants=("cut",))
        )
        once = [build(op, lambda source: original(source, architecture)) for op in inner.layers]
        for op in outer.layers:
            if not isinstance(op, Concat):
                continue
            expected = build(op, lambda source: once[source.layer])
            ops = [inner.layers[found.source.layer] for found in op.cuts]
            kept = [{part: found.pieces(part) for part in PARTS} for found in op.cuts]
            weights = [found.weights for found in op.cuts]
            if any(len(set(pieces)) < len(pieces) for pieces, _ in expected.values()):
                with pytest.raises(UserError, match="at most once"):
                    concat_of(ops, kept, weights=weights, norm=norm, architecture=architecture)
                continue
            flat = concat_of(ops, kept, weights=weights, norm=norm, architecture=weighing)
            check(replace(inner, layers=(flat,), spans=((0, 6),)), {"base": weighing, "math": weighing})
            assert grouped(build(flat, lambda source: original(source, architecture))) == grouped(expected)
            if all(found.kv_groups or found.channels for found in op.cuts):
                assert_same(build(flat, lambda source: original(source, architecture)), expected)
            # With an architecture whose weights mean nothing, only the weights may differ.
            lean = concat_of(ops, kept, weights=weights, norm=norm, architecture=architecture)
            assert grouped(build(lean, lambda source: original(source, architecture))) == grouped(expected)
            if norm == "fold" and isinstance(lean, Concat):
                assert all(found.kv_groups or found.channels for found in lean.cuts)

    run()


def test_concat_of_concat_by_hand(architecture: Architecture) -> None:
    first = Concat(cuts=(cut(0, [0, 2], range(5), 0.6), cut(1, [1], range(5, 8), 0.4)))
    flat = concat_of(
        [first, select(2)],
        [{"attention": [0, 2], "mlp": [0, 1, 6]}, {"attention": [1], "mlp": [3, 4, 5, 6, 7]}],
        weights=[EQUAL, EQUAL],
        norm="fold",
        architecture=architecture,
    )
    assert flat == Concat(cuts=(cut(0, [0], [0, 1], 0.3), cut(1, [1], [6], 0.2), cut(2, [1], range(3, 8), 0.5)))


def test_pieces_of_one_layer_from_two_current_layers_become_one_cut(architecture: Architecture) -> None:
    first = Concat(cuts=(cut(0, [0, 1], range(4), 0.5), cut(1, [2], range(4, 8), 0.5)))
    second = Concat(cuts=(cut(0, [2], range(4, 8), 0.5), cut(1, [0, 1], range(4), 0.5)))
    pieces: dict[Part, Sequence[int]] = {"attention": [0, 1], "mlp": range(4)}
    rest: dict[Part, Sequence[int]] = {"attention": [0], "mlp": range(4)}
    flat = concat_of([first, second], [pieces, rest], weights=[EQUAL, EQUAL], norm="fold", architecture=architecture)
    # All of layer 0, in order, and layer 1 has nothing left that a Llama without biases would average.
    assert flat == select(0)


def test_full_share_is_a_drop(architecture: Architecture) -> None:
    everything: dict[Part, Sequence[int]] = {"attention": np.arange(3), "mlp": np.arange(8)}  # type: ignore[dict-item]
    weights: list[dict[Part, float]] = [{"attention": 0.9, "mlp": 0.9}, {"attention": 0.1, "mlp": 0.1}]
    ops: list[Op] = [select(3), select(4)]
    for norm in ("fold", "average"):
        assert concat_of(ops, [everything, NONE], weights=weights, norm=norm, architecture=architecture) == select(3)
        assert concat_of(ops, [NONE, everything], weights=weights, norm=norm, architecture=architecture) == select(4)


def test_whole_merge_alone_stays_a_merge(architecture: Architecture) -> None:
    merge = Merge(sources=(ref(0), ref(1)), weights=(0.5, 0.5))
    everything: dict[Part, Sequence[int]] = {"attention": range(3), "mlp": range(8)}
    weights = [EQUAL, EQUAL]
    assert (
        concat_of([merge, select(2)], [everything, NONE], weights=weights, norm="fold", architecture=architecture)
        == merge
    )
    assert concat_of(
        [merge, select(2)], [NONE, everything], weights=weights, norm="fold", architecture=architecture
    ) == select(2)


def test_unequal_weights_are_kept_by_part(architecture: Architecture) -> None:
    flat = concat_of(
        [select(0), select(1)],
        [{"attention": [0], "mlp": range(6)}, {"attention": [1, 2], "mlp": [6, 7]}],
        weights=[{"attention": 0.2, "mlp": 0.7}, {"attention": 0.8, "mlp": 0.3}],
        norm="fold",
        architecture=architecture,
    )
    assert isinstance(flat, Concat)
    assert [found.weights for found in flat.cuts] == [{"attention": 0.2, "mlp": 0.7}, {"attention": 0.8, "mlp": 0.3}]


def test_weights_of_all_zero_become_shares_of_pieces(architecture: Architecture) -> None:
    nothing: dict[Part, float] = {"attention": 0.0, "mlp": 0.0}
    kept: list[dict[Part, Sequence[int]]] = [{"attention": [0], "mlp": range(6)}, {"attention": [1, 2], "mlp": [6, 7]}]
    flat = concat_of([select(0), select(1)], kept, weights=[nothing, nothing], norm="fold", architecture=architecture)
    assert isinstance(flat, Concat)
    assert flat.cuts[0].weights == {"attention": pytest.approx(1 / 3), "mlp": 0.75}


@pytest.mark.parametrize(
    ("first", "kept", "norm", "message"),
    [
        (Merge(sources=(ref(0), ref(1)), weights=(0.5, 0.5)), range(2), "fold", "merged"),
        (Concat(cuts=(cut(0, [0, 1, 2], range(8), 1.0),), norm="average"), range(2), "fold", "norm mode"),
        (Concat(cuts=(cut(0, [0, 1, 2], range(8), 1.0),), norm="fold"), range(2), "average", "norm mode"),
        (select(2), [0, 2], "fold", "at most once"),
        (select(0), [1, 3], "fold", "from 0 to 2"),
        (select(0), [1, -1], "fold", "from 0 to 2"),
    ],
)
def test_what_one_concatenation_cannot_say(
    architecture: Architecture, first: Op, kept: Sequence[int], norm: NormMode, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        concat_of(
            [first, select(2)],
            [{"attention": kept, "mlp": range(4)}, {"attention": [2], "mlp": range(4, 8)}],
            weights=[EQUAL, EQUAL],
            norm=norm,
            architecture=architecture,
        )
    assert "Build the inner recipe first" in str(caught.value)


# simplify


def test_whole_layer_in_order_is_a_select(architecture: Architecture) -> None:
    assert simplify(Concat(cuts=(cut(4, range(3), range(8), 1.0),)), architecture) == select(4)
    permuted = Concat(cuts=(cut(4, [1, 0, 2], range(8), 1.0),))
    assert simplify(permuted, architecture) == permuted
    assert simplify(Merge(sources=(ref(4),), weights=(1.0,)), architecture) == select(4)
    scaled = Merge(sources=(ref(4),), weights=(0.5,))
    assert simplify(scaled, architecture) == scaled


def test_cut_without_pieces_vanishes_where_its_weights_mean_nothing(
    architecture: Architecture, architecture_with: Callable[..., Architecture]
) -> None:
    op = Concat(cuts=(cut(0, [0, 1], range(5), 0.5), cut(1, [2], range(5, 8), 0.3), cut(2, [], [], 0.2)))
    simple = simplify(op, architecture)
    assert isinstance(simple, Concat)
    assert [found.source.layer for found in simple.cuts] == [0, 1]
    assert simple.cuts[0].weights == {"attention": pytest.approx(0.625), "mlp": pytest.approx(0.625)}
    # Biases of o_proj and down_proj, QK-norms and averaged norms still hold some of layer 2.
    assert simplify(op, architecture_with(attention_bias=True)) == op
    assert simplify(op, architecture_with(model_type="qwen3", head_dim=8)) == op
    assert simplify(replace(op, norm="average"), architecture) == replace(op, norm="average")
    weightless = Concat(cuts=(cut(0, [0, 1], range(5), 0.5), cut(1, [2], range(5, 8), 0.5), cut(2, [], [], 0.0)))
    assert simplify(weightless, architecture_with(attention_bias=True)) == replace(weightless, cuts=weightless.cuts[:2])


# merge_of


def test_merges_of_merges_are_linear() -> None:
    merge = Merge(sources=(ref(0), ref(1)), weights=(0.5, 0.5))
    assert merge_of([merge, select(1)], [0.5, 2.0]) == Merge(sources=(ref(0), ref(1)), weights=(0.25, 2.25))
    assert merge_of([select(3), merge], [1.0, 0.0]) == select(3)


@pytest.mark.parametrize("change", [{"scale": 0.5}, {"mlp": Mix(weights=(1.0,))}, {"method": "task_arithmetic"}])
def test_only_plain_sums_of_layers_add_up(change: dict[str, Any], architecture: Architecture) -> None:
    merged = replace(Merge(sources=(ref(0),), weights=(1.0,)), **change)
    assert simplify(merged, architecture) == merged
    with pytest.raises(UserError, match="weighted sums of layers"):
        merge_of([merged, select(1)], [0.5, 0.5])
    with pytest.raises(UserError, match="a concatenated layer"):
        merge_of([Concat(cuts=(cut(0, [0, 1, 2], range(8), 1.0),)), select(1)], [0.5, 0.5])


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
