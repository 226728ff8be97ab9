"""Several layers as one flat op over original layers.

Concatenation is closed under composition: a piece of a merged layer is a piece of some original layer, so merging a
merged layer gives one `Concat` over original layers. The order of pieces inside a layer does not change what the
layer computes, so a flat `Concat` groups its cuts by source. A weighted sum of weighted sums is one again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from intarsia.anatomy.spec import PARTS, Anatomy, Norm, Part
from intarsia.errors import UserError
from intarsia.recipe.ops import Concat, Cut, LayerRef, Merge, NormMode, Op, Select

_BUILD_FIRST = "Build the inner recipe first and use the built model as the source."
_WEIGHT_TOLERANCE = 1e-9


def simplify(op: Op, anatomy: Anatomy) -> Op:
    """The simplest op that builds the same layer.

    A cut vanishes when it has no pieces and its weights decide nothing: they are zero, or the family has no such
    parameters. The other cuts' weights then sum to 1 again. A concatenation that is one whole layer with its
    pieces in order is a `Select`, and so is a `Merge` of one layer with weight 1.
    """
    whole = {part: anatomy.n_pieces(part) for part in PARTS}
    return _simplify(op, whole, anatomy)


def concat_of(
    ops: Sequence[Op],
    kept: Sequence[Mapping[Part, Sequence[int]]],
    *,
    weights: Sequence[Mapping[Part, float]],
    norm: NormMode,
    anatomy: Anatomy,
    fuse: bool = False,
) -> Op:
    """One flat op that joins pieces of current layers, each given as an op over original layers.

    Args:
        ops: the current layers.
        kept: for each of them the indices of its own pieces that are kept (a part that is not named keeps none). A
            layer of which nothing is kept contributes nothing, whatever its weights.
        weights: for each of them how much it counts in the parameters that belong to no piece; they need not sum
            to 1 over the contributing layers.
        norm: the norm mode of the result.
        anatomy: the family's shape.
        fuse: the result adds what it leaves out onto what it keeps, all over again from the original layers.

    Raises:
        UserError: the result is no flat concatenation: a `Merge` contributes part of itself, norm modes are mixed, a
            piece would appear twice, or an index does not exist.
    """
    assert len(ops) == len(kept) == len(weights), "one set of kept pieces and weights a layer"
    whole = {part: anatomy.n_pieces(part) for part in PARTS}
    op = _joined(ops, kept, weights, norm, whole, anatomy)
    return replace(op, fuse=fuse) if isinstance(op, Concat) else op


def merge_of(ops: Sequence[Op], weights: Sequence[float]) -> Op:
    """One flat op that is the weighted sum of whole current layers, each given as an op over original layers.

    A layer of weight 0 contributes nothing.

    Raises:
        UserError: a concatenated layer is among them.
    """
    used = [(op, weight) for op, weight in zip(ops, weights, strict=True) if weight]
    sources, total = _linear([op for op, _ in used], [weight for _, weight in used])
    return Select(source=sources[0]) if total == (1.0,) else Merge(sources=sources, weights=total)


def _joined(
    ops: Sequence[Op],
    kept: Sequence[Mapping[Part, Sequence[int]]],
    weights: Sequence[Mapping[Part, float]],
    norm: NormMode,
    whole: Mapping[Part, int],
    anatomy: Anatomy,
) -> Op:
    used = [index for index in range(len(ops)) if any(len(kept[index].get(part, ())) for part in PARTS)]
    if len(used) == 1:
        only = used[0]
        if all(tuple(kept[only].get(part, ())) == tuple(range(whole[part])) for part in PARTS):
            return _simplify(ops[only], whole, anatomy)
    indices: dict[LayerRef, dict[Part, list[int]]] = {}
    shares: dict[LayerRef, dict[Part, float]] = {}
    for index in used:
        for cut in _as_cuts(ops[index], norm, whole):
            indices.setdefault(cut.source, {part: [] for part in PARTS})
            share = shares.setdefault(cut.source, dict.fromkeys(PARTS, 0.0))
            for part in PARTS:
                share[part] += weights[index].get(part, 0.0) * cut.weights.get(part, 0.0)
        for part in PARTS:
            owners = _owners(ops[index], part, whole[part])
            for piece in kept[index].get(part, ()):
                if not 0 <= piece < len(owners):
                    raise _not_representable("concatenation", f"{part} pieces from 0 to {len(owners) - 1}", str(piece))
                source, original = owners[piece]
                indices[source][part].append(original)
    for source, by_part in indices.items():
        for part in PARTS:
            if len(set(by_part[part])) < len(by_part[part]):
                raise _not_representable(
                    "concatenation", f"every {part} piece of {source} at most once", "one that is twice"
                )
    cuts = tuple(
        Cut(
            source=source,
            kv_groups=tuple(by_part["attention"]),
            channels=tuple(by_part["mlp"]),
            weights=shares[source],
        )
        for source, by_part in indices.items()
    )
    return _simplify(Concat(cuts=_with_unit_weights(cuts), norm=norm), whole, anatomy)


def _linear(ops: Sequence[Op], weights: Sequence[float]) -> tuple[tuple[LayerRef, ...], tuple[float, ...]]:
    """A linear combination of linear combinations."""
    total: dict[LayerRef, float] = {}
    for op, weight in zip(ops, weights, strict=True):
        if isinstance(op, Concat):
            raise _not_representable("merge", "whole layers to merge", "a concatenated layer")
        if isinstance(op, Merge) and not op.plain:
            raise _not_representable("merge", "weighted sums of layers", f"a layer merged by {op.method}, or scaled")
        shares = op.weights if isinstance(op, Merge) else (1.0,)
        for original, share in zip(op.sources, shares, strict=True):
            total[original] = total.get(original, 0.0) + weight * share
    return tuple(total), tuple(total.values())


def _as_cuts(op: Op, norm: NormMode, whole: Mapping[Part, int]) -> tuple[Cut, ...]:
    """A current layer as cuts of original layers."""
    if isinstance(op, Merge):
        raise _not_representable("concatenation", "pieces of whole or concatenated layers", "pieces of merged layers")
    if isinstance(op, Select):
        groups, channels = tuple(range(whole["attention"])), tuple(range(whole["mlp"]))
        return (Cut(source=op.source, kv_groups=groups, channels=channels, weights=dict.fromkeys(PARTS, 1.0)),)
    if op.norm != norm:
        raise _not_representable("concatenation", f"norm mode {norm!r} throughout", f"an inner layer with {op.norm!r}")
    return op.cuts


def _owners(op: Op, part: Part, whole: int) -> list[tuple[LayerRef, int]]:
    """For every piece of a current layer, in order: the original layer and the index there."""
    if isinstance(op, Concat):
        return [(cut.source, piece) for cut in op.cuts for piece in cut.pieces(part)]
    return [(op.sources[0], piece) for piece in range(whole)]


def _simplify(op: Op, whole: Mapping[Part, int], anatomy: Anatomy) -> Op:
    if isinstance(op, Merge):
        whole_layer = op.plain and op.weights == (1.0,) and len(op.sources) == 1
        return Select(source=op.sources[0]) if whole_layer else op
    if isinstance(op, Select):
        return op
    deciding = _parts_that_weigh(anatomy, op.norm)
    cuts = tuple(cut for cut in op.cuts if _has_pieces(cut) or any(cut.weights.get(part, 0.0) for part in deciding))
    if len(cuts) == 1 and all(cuts[0].pieces(part) == tuple(range(whole[part])) for part in PARTS):
        return Select(source=cuts[0].source)
    return op if len(cuts) == len(op.cuts) else replace(op, cuts=_with_unit_weights(cuts))


def _has_pieces(cut: Cut) -> bool:
    return bool(cut.kv_groups or cut.channels)


def _parts_that_weigh(anatomy: Anatomy, norm: NormMode) -> tuple[Part, ...]:
    """The parts in which a family has parameters that belong to no piece and are averaged by weight."""

    def averaged(part: Part, found: Norm) -> bool:
        if found.part != part or found.rows is not None:
            return False
        return (found.place != "before" or norm == "average") and (found.weight or found.bias)

    return tuple(
        part
        for part in PARTS
        if anatomy.writer(part).bias
        or any(averaged(part, found) for found in anatomy.norms)
        or any(linear.part == part and linear.whole is not None for linear in anatomy.linears)
    )


def _with_unit_weights(cuts: tuple[Cut, ...]) -> tuple[Cut, ...]:
    """The cuts with weights that sum to 1 for each part; by share of pieces where all weights are zero."""
    factors: dict[Part, float] = {part: sum(cut.weights.get(part, 0.0) for cut in cuts) for part in PARTS}
    sizes = {part: sum(len(cut.pieces(part)) for cut in cuts) for part in PARTS}

    def weight(cut: Cut, part: Part) -> float:
        if abs(factors[part] - 1.0) <= _WEIGHT_TOLERANCE:
            return cut.weights.get(part, 0.0)
        if factors[part] > 0.0:
            return cut.weights.get(part, 0.0) / factors[part]
        return len(cut.pieces(part)) / sizes[part] if sizes[part] else 1.0 / len(cuts)

    return tuple(replace(cut, weights={part: weight(cut, part) for part in PARTS}) for cut in cuts)


def _not_representable(where: str, expected: str, found: str) -> UserError:
    """The error for what one flat op cannot say."""
    return UserError.of(where=where, expected=expected, found=found, remedy=_BUILD_FIRST)
