"""Recipe algebra: concatenation flattened to original layers, weighted sums, and the reference of a recipe.

Concatenation is closed under composition: a piece of a merged layer is a piece of some original layer, so merging a
merged layer gives one `Concat` over original layers. The order of pieces inside a layer does not matter, so a
flat `Concat` groups its cuts by source. A weighted sum of weighted sums is a weighted sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from intarsia.architecture.spec import PARTS, Architecture, Norm, Part
from intarsia.errors import UserError
from intarsia.recipe.recipe import Concat, Cut, LayerRef, Merge, NormMode, Op, Recipe, Select

_WEIGHT_TOLERANCE = 1e-9


def concat_of(
    ops: Sequence[Op],
    kept: Sequence[Mapping[Part, Sequence[int]]],
    *,
    weights: Sequence[Mapping[Part, float]],
    norm: NormMode,
    architecture: Architecture,
    fuse: bool = False,
) -> Op:
    """One flat op that joins pieces of current layers, each given as an op over original layers.

    Args:
        kept: for each of them the indices of its kept pieces (a missing part keeps none). A layer without kept pieces
            contributes nothing, whatever its weights.
        weights: for each of them its weight in the parameters that belong to no piece; they need not sum to 1.
        fuse: add discarded pieces to kept ones, starting from the original layers.

    Raises:
        UserError: the result is not a flat concatenation: part of a `Merge` is kept, norm modes are mixed, a piece is
            used twice, or an index does not exist.
    """
    assert len(ops) == len(kept) == len(weights), "one set of kept pieces and weights per layer"
    used = [index for index in range(len(ops)) if any(len(kept[index].get(part, ())) for part in PARTS)]
    if len(used) == 1 and all(tuple(kept[used[0]].get(part, ())) == _whole(architecture, part) for part in PARTS):
        op = simplify(ops[used[0]], architecture)
    else:
        op = _joined([(ops[index], kept[index], weights[index]) for index in used], norm, architecture)
    return replace(op, fuse=fuse) if isinstance(op, Concat) else op


def half_layers(first: Op, last: Op, norm: NormMode, architecture: Architecture) -> Op:
    """The attention of one layer with the MLP of a later one, which removes everything between them.

    Exact if a layer is attention, then MLP.
    """
    kept: list[Mapping[Part, Sequence[int]]] = [{part: _whole(architecture, part)} for part in PARTS]
    return concat_of(
        [first, last], kept, weights=[dict.fromkeys(part, 1.0) for part in kept], norm=norm, architecture=architecture
    )


def merge_of(ops: Sequence[Op], weights: Sequence[float]) -> Op:
    """One flat op that is the weighted sum of whole current layers, each given as an op over original layers.

    A layer of weight 0 contributes nothing.

    Raises:
        UserError: a layer is concatenated, scaled, or merged by a method other than a weighted sum.
    """
    total: dict[LayerRef, float] = {}
    for op, weight in zip(ops, weights, strict=True):
        if not weight:
            continue
        if isinstance(op, Concat):
            raise _not_representable("merge", "whole layers to merge", "a concatenated layer")
        if isinstance(op, Merge) and not op.plain:
            raise _not_representable("merge", "weighted sums of layers", f"a layer merged by {op.method}, or scaled")
        shares = op.weights if isinstance(op, Merge) else (1.0,)
        for original, share in zip(op.sources, shares, strict=True):
            total[original] = total.get(original, 0.0) + weight * share
    if tuple(total.values()) == (1.0,):
        return Select(source=next(iter(total)))
    return Merge(sources=tuple(total), weights=tuple(total.values()))


def simplify(op: Op, architecture: Architecture) -> Op:
    """The simplest op that builds the same layer.

    A cut without pieces is dropped if its weights have no effect: they are zero, or the family has no such
    parameters. The other cuts' weights then sum to 1 again. A concatenation of one whole layer with its pieces in
    order becomes a `Select`, and so does a `Merge` of one layer with weight 1.
    """
    if isinstance(op, Merge):
        whole_layer = op.plain and op.weights == (1.0,) and len(op.sources) == 1
        return Select(source=op.sources[0]) if whole_layer else op
    if isinstance(op, Select):
        return op
    deciding = _parts_that_weigh(architecture, op.norm)
    cuts = tuple(
        cut for cut in op.cuts if cut.kv_groups or cut.channels or any(cut.weights.get(part, 0.0) for part in deciding)
    )
    if len(cuts) == 1 and all(cuts[0].pieces(part) == _whole(architecture, part) for part in PARTS):
        return Select(source=cuts[0].source)
    return op if len(cuts) == len(op.cuts) else replace(op, cuts=with_unit_weights(cuts))


def reference_layers(recipe: Recipe) -> tuple[Op, ...]:
    """The recipe with no layer removed, an op for each of the base's layers: the target of healing.

    Healing toward the base would draw a blend of fine-tunes back to it, and lose what it has from the others. So each
    layer of a span gets the op of the span's output layer at its own index: the same variant's layer, or the same
    blend. In a concatenation, each layer comes from the variant whose pieces were taken from it. For a recipe over the
    base alone this is the base. Output scales, which compensate for removed layers, are dropped.
    """
    found: dict[int, Op] = {}
    for op, (start, stop) in zip(recipe.layers, recipe.spans, strict=True):
        for layer in range(start, stop):
            found[layer] = _at(op, layer)
    assert sorted(found) == list(range(recipe.depth)), "spans tile the depth"
    return tuple(found[layer] for layer in range(recipe.depth))


def _at(op: Op, layer: int) -> Op:
    """An op, moved to another layer."""
    if isinstance(op, Concat):
        own = next((cut.source for cut in op.cuts if cut.source.layer == layer), op.cuts[0].source)
        return Select(source=replace(own, layer=layer))
    if isinstance(op, Merge):
        base = None if op.base is None else replace(op.base, layer=layer)
        return replace(op, sources=tuple(replace(ref, layer=layer) for ref in op.sources), base=base, scale=1.0)
    return Select(source=replace(op.source, layer=layer))


def _joined(
    layers: Sequence[tuple[Op, Mapping[Part, Sequence[int]], Mapping[Part, float]]],
    norm: NormMode,
    architecture: Architecture,
) -> Op:
    """Pieces of several layers, each given with its kept pieces and its weights, as one op over original layers."""
    indices: dict[LayerRef, dict[Part, list[int]]] = {}
    shares: dict[LayerRef, dict[Part, float]] = {}
    for op, kept, weights in layers:
        cuts = _as_cuts(op, norm, architecture)
        for cut in cuts:
            indices.setdefault(cut.source, {part: [] for part in PARTS})
            share = shares.setdefault(cut.source, dict.fromkeys(PARTS, 0.0))
            for part in PARTS:
                share[part] += weights.get(part, 0.0) * cut.weights.get(part, 0.0)
        for part in PARTS:
            owners = [(cut.source, piece) for cut in cuts for piece in cut.pieces(part)]
            for piece in kept.get(part, ()):
                if not 0 <= piece < len(owners):
                    expected = f"{part} pieces from 0 to {len(owners) - 1}"
                    raise _not_representable("concatenation", expected, str(piece))
                source, original = owners[piece]
                indices[source][part].append(original)
    for source, by_part in indices.items():
        for part in PARTS:
            if len(set(by_part[part])) < len(by_part[part]):
                expected = f"every {part} piece of {source} at most once"
                raise _not_representable("concatenation", expected, "a repeated one")
    joined = tuple(
        Cut(
            source=source,
            kv_groups=tuple(by_part["attention"]),
            channels=tuple(by_part["mlp"]),
            weights=shares[source],
        )
        for source, by_part in indices.items()
    )
    return simplify(Concat(cuts=with_unit_weights(joined), norm=norm), architecture)


def _whole(architecture: Architecture, part: Part) -> tuple[int, ...]:
    """All pieces of a part, in order."""
    return tuple(range(architecture.n_pieces(part)))


def _as_cuts(op: Op, norm: NormMode, architecture: Architecture) -> tuple[Cut, ...]:
    """A current layer as cuts of original layers."""
    if isinstance(op, Merge):
        expected = "pieces of whole or concatenated layers"
        raise _not_representable("concatenation", expected, "pieces of merged layers")
    if isinstance(op, Select):
        groups, channels = _whole(architecture, "attention"), _whole(architecture, "mlp")
        return (Cut(source=op.source, kv_groups=groups, channels=channels, weights=dict.fromkeys(PARTS, 1.0)),)
    if op.norm != norm:
        expected = f"norm mode {norm!r} throughout"
        raise _not_representable("concatenation", expected, f"an inner layer with {op.norm!r}")
    return op.cuts


def _parts_that_weigh(architecture: Architecture, norm: NormMode) -> tuple[Part, ...]:
    """The parts in which a family has parameters that belong to no piece and are averaged by weight."""

    def averaged(part: Part, found: Norm) -> bool:
        if found.part != part or found.rows is not None:
            return False
        return (found.place != "before" or norm == "average") and (found.weight or found.bias)

    return tuple(
        part
        for part in PARTS
        if architecture.writer(part).bias
        or any(averaged(part, found) for found in architecture.norms)
        or any(linear.part == part and linear.whole is not None for linear in architecture.linears)
    )


def with_unit_weights(cuts: tuple[Cut, ...]) -> tuple[Cut, ...]:
    """The cuts with weights that sum to 1 for each part; by share of pieces if all weights are zero."""
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
    """The error for a result that one flat op cannot express."""
    return UserError(
        f"{where}: expected {expected}; found {found}.",
        "Build the inner recipe first, and use the built model as the source.",
    )
