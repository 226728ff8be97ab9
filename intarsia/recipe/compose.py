"""A recipe of a recipe becomes one flat recipe; pieces of merged layers become pieces of original layers.

Concatenation is closed under composition: a piece of a merged layer is a piece of some original layer, so merging a
merged layer gives one `Concat` over original layers. The order of pieces inside a layer does not change what the
layer computes, so a flat `Concat` groups its cuts by source.

Parameters that belong to no piece are weighted averages, and a weighted average of weighted averages is one again:
weights multiply along the way down and add up by source. Norms follow the same rule within one norm mode (`fold` of
`fold`, `average` of `average`); the two modes do not mix, and neither does concatenation with `Merge` or with fitted
tensors. Those cases are refused: the inner recipe has to be built first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from intarsia.anatomy.spec import PARTS, Anatomy, Part
from intarsia.errors import Problem, UserError
from intarsia.recipe.ops import Concat, Cut, LayerRef, Merge, NormMode, Op, Select
from intarsia.recipe.recipe import Recipe, Span

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
    op = _join(ops, kept, weights, norm, whole, anatomy, "concatenation")
    return replace(op, fuse=fuse) if isinstance(op, Concat) else op


def merge_of(ops: Sequence[Op], weights: Sequence[float]) -> Op:
    """One flat op that is the weighted sum of whole current layers, each given as an op over original layers.

    A layer of weight 0 contributes nothing.

    Raises:
        UserError: a concatenated layer is among them.
    """
    used = [(op, weight) for op, weight in zip(ops, weights, strict=True) if weight]
    sources, total = _linear([op for op, _ in used], [weight for _, weight in used], "merge")
    return Select(source=sources[0]) if total == (1.0,) else Merge(sources=sources, weights=total)


def compose(outer: Recipe, inner: Recipe, *, variant: str, anatomy: Anatomy | None = None) -> Recipe:
    """The recipe that builds from inner's variants what `outer` builds from the model that `inner` describes.

    Both recipes have passed `check`.

    Args:
        outer: a recipe whose variant `variant` is the model that `inner` builds.
        inner: a recipe over the original variants.
        variant: the name of that variant in `outer`.
        anatomy: lets cuts vanish that have no pieces left and whose weights mean nothing in this family; without
            it they stay, with the same model as the result.

    Raises:
        UserError: with everything that one flat recipe cannot say.
    """
    problems = list(_misfits(outer, inner, variant))
    if problems:
        raise UserError(problems)
    layers: list[Op] = []
    fitted: dict[int, dict[str, npt.NDArray[np.float32]]] = {}
    for index, op in enumerate(outer.layers):
        where = f"layers[{index}]"
        try:
            layers.append(_compose_op(op, inner, anatomy, where))
            carried = inner.fitted.get(_only_layer(op), {})
            replaced = {**carried, **outer.fitted.get(index, {})}
            if replaced:
                fitted[index] = replaced
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return Recipe(
        variants=inner.variants,
        base=inner.base,
        depth=inner.depth,
        layers=tuple(layers),
        spans=tuple(_compose_span(span, inner) for span in outer.spans),
        fitted=fitted,
        provenance={"composed": {"outer": dict(outer.provenance), "inner": dict(inner.provenance)}},
    )


def _misfits(outer: Recipe, inner: Recipe, variant: str) -> list[Problem]:
    """Why the outer recipe does not talk about the inner one's model, before any op is composed."""
    found: list[tuple[str, str, str]] = []
    count = len(inner.layers)
    if outer.depth != count:
        found.append(("depth", f"{count}, the layers that the inner recipe builds", str(outer.depth)))
    if outer.base != variant:
        found.append(("base", f"{variant!r}, the inner recipe's model", repr(outer.base)))
    for index, op in enumerate(outer.layers):
        base_layer = (op.base,) if isinstance(op, Merge) and op.base is not None else ()
        for source in (*op.sources, *base_layer):
            if source.variant != variant or not 0 <= source.layer < count:
                found.append((f"layers[{index}]", f"a layer of {variant!r} from 0 to {count - 1}", str(source)))
    for index, (first, stop) in enumerate(outer.spans):
        if not 0 <= first <= stop <= count:
            found.append((f"spans[{index}]", f"a range within 0..{count}", f"[{first}, {stop}]"))
    return [Problem(where=where, expected=expected, found=what, remedy=_BUILD_FIRST) for where, expected, what in found]


def _only_layer(op: Op) -> int:
    """The inner layer that an op takes whole, with what is fitted on it; -1 where there is none."""
    return op.source.layer if isinstance(op, Select) else -1


def _compose_op(op: Op, inner: Recipe, anatomy: Anatomy | None, where: str) -> Op:
    if isinstance(op, Select):
        whole_layer = inner.layers[op.source.layer]
        return whole_layer if anatomy is None else simplify(whole_layer, anatomy)
    base_layer = (op.base,) if isinstance(op, Merge) and op.base is not None else ()
    for layer in sorted({source.layer for source in (*op.sources, *base_layer)}):
        if inner.fitted.get(layer):
            raise _not_representable(where, "sources without fitted tensors", f"fitted tensors of inner layer {layer}")
    if isinstance(op, Merge):
        return _compose_merge(op, inner, where)
    if not op.cuts:
        return op
    joined = [inner.layers[cut.source.layer] for cut in op.cuts]
    if any(isinstance(other, Concat) and other.fuse for other in joined):
        raise _not_representable(where, "sources without fused pieces", "a fused inner layer")
    if op.fuse and any(isinstance(other, Concat) for other in joined):
        raise _not_representable(where, "whole layers to fuse", "a concatenated inner layer")
    whole = {part: sum(len(cut.pieces(part)) for cut in op.cuts) for part in PARTS}
    flat = _join(
        joined,
        [{part: cut.pieces(part) for part in PARTS} for cut in op.cuts],
        [cut.weights for cut in op.cuts],
        op.norm,
        whole,
        anatomy,
        where,
        keep_empty=True,
    )
    return replace(flat, fuse=op.fuse) if isinstance(flat, Concat) else flat


def _compose_merge(op: Merge, inner: Recipe, where: str) -> Merge:
    if not op.plain:
        return _substituted(op, inner, where)
    sources, weights = _linear([inner.layers[source.layer] for source in op.sources], op.weights, where)
    return replace(op, sources=sources, weights=weights)


def _substituted(op: Merge, inner: Recipe, where: str) -> Merge:
    """A merge that is no plain sum keeps its form; its sources must be whole layers of the inner recipe's models."""
    refs: list[LayerRef] = []
    for source in (*op.sources, *(() if op.base is None else (op.base,))):
        found = inner.layers[source.layer]
        if not isinstance(found, Select):
            raise _not_representable(where, f"whole layers to merge by {op.method}", f"inner layer {source.layer}")
        refs.append(found.source)
    return replace(op, sources=tuple(refs[: len(op.sources)]), base=None if op.base is None else refs[-1])


def _linear(ops: Sequence[Op], weights: Sequence[float], where: str) -> tuple[tuple[LayerRef, ...], tuple[float, ...]]:
    """A linear combination of linear combinations."""
    total: dict[LayerRef, float] = {}
    for op, weight in zip(ops, weights, strict=True):
        if isinstance(op, Concat):
            raise _not_representable(where, "whole layers to merge", "a concatenated layer")
        if isinstance(op, Merge) and not op.plain:
            raise _not_representable(where, "weighted sums of layers", f"a layer merged by {op.method}, or scaled")
        shares = op.weights if isinstance(op, Merge) else (1.0,)
        for original, share in zip(op.sources, shares, strict=True):
            total[original] = total.get(original, 0.0) + weight * share
    return tuple(total), tuple(total.values())


def _compose_span(span: Span, inner: Recipe) -> Span:
    starts = [*(start for start, _ in inner.spans), inner.depth]
    return starts[span[0]], starts[span[1]]


def _join(
    ops: Sequence[Op],
    kept: Sequence[Mapping[Part, Sequence[int]]],
    weights: Sequence[Mapping[Part, float]],
    norm: NormMode,
    whole: Mapping[Part, int],
    anatomy: Anatomy | None,
    where: str,
    keep_empty: bool = False,
) -> Op:
    """`concat_of` by piece counts. `keep_empty`: layers without pieces still count with their weights."""
    used = [
        index
        for index in range(len(ops))
        if any(len(kept[index].get(part, ())) for part in PARTS) or (keep_empty and any(weights[index].values()))
    ]
    if len(used) == 1:
        only = used[0]
        if all(tuple(kept[only].get(part, ())) == tuple(range(whole[part])) for part in PARTS):
            return _simplify(ops[only], whole, anatomy)
    indices: dict[LayerRef, dict[Part, list[int]]] = {}
    shares: dict[LayerRef, dict[Part, float]] = {}
    for index in used:
        for cut in _as_cuts(ops[index], norm, whole, where):
            indices.setdefault(cut.source, {part: [] for part in PARTS})
            share = shares.setdefault(cut.source, dict.fromkeys(PARTS, 0.0))
            for part in PARTS:
                share[part] += weights[index].get(part, 0.0) * cut.weights.get(part, 0.0)
        for part in PARTS:
            owners = _owners(ops[index], part, whole[part])
            for piece in kept[index].get(part, ()):
                if not 0 <= piece < len(owners):
                    raise _not_representable(where, f"{part} pieces from 0 to {len(owners) - 1}", str(piece))
                source, original = owners[piece]
                indices[source][part].append(original)
    for source, by_part in indices.items():
        for part in PARTS:
            if len(set(by_part[part])) < len(by_part[part]):
                raise _not_representable(where, f"every {part} piece of {source} at most once", "one that is twice")
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


def _as_cuts(op: Op, norm: NormMode, whole: Mapping[Part, int], where: str) -> tuple[Cut, ...]:
    """A current layer as cuts of original layers."""
    if isinstance(op, Merge):
        raise _not_representable(where, "pieces of whole or concatenated layers", "pieces of merged layers")
    if isinstance(op, Select):
        groups, channels = tuple(range(whole["attention"])), tuple(range(whole["mlp"]))
        return (Cut(source=op.source, kv_groups=groups, channels=channels, weights=dict.fromkeys(PARTS, 1.0)),)
    if op.norm != norm:
        raise _not_representable(where, f"norm mode {norm!r} throughout", f"an inner layer with {op.norm!r}")
    return op.cuts


def _owners(op: Op, part: Part, whole: int) -> list[tuple[LayerRef, int]]:
    """For every piece of a current layer, in order: the original layer and the index there."""
    if isinstance(op, Concat):
        return [(cut.source, piece) for cut in op.cuts for piece in cut.pieces(part)]
    return [(op.sources[0], piece) for piece in range(whole)]


def _simplify(op: Op, whole: Mapping[Part, int], anatomy: Anatomy | None) -> Op:
    if isinstance(op, Merge):
        whole_layer = op.plain and op.weights == (1.0,) and len(op.sources) == 1
        return Select(source=op.sources[0]) if whole_layer else op
    if isinstance(op, Select):
        return op
    deciding = PARTS if anatomy is None else _parts_that_weigh(anatomy, op.norm)
    cuts = tuple(cut for cut in op.cuts if _has_pieces(cut) or any(cut.weights.get(part, 0.0) for part in deciding))
    if len(cuts) == 1 and all(cuts[0].pieces(part) == tuple(range(whole[part])) for part in PARTS):
        return Select(source=cuts[0].source)
    return op if len(cuts) == len(op.cuts) else replace(op, cuts=_with_unit_weights(cuts))


def _has_pieces(cut: Cut) -> bool:
    return bool(cut.kv_groups or cut.channels)


def _parts_that_weigh(anatomy: Anatomy, norm: NormMode) -> tuple[Part, ...]:
    """The parts in which a family has parameters that belong to no piece and are averaged by weight."""
    return tuple(
        part
        for part in PARTS
        if anatomy.writer(part).bias
        or any(
            found.part == part and found.weight and (found.place == "inside" or norm == "average")
            for found in anatomy.norms
        )
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
    return UserError.of(where=where, expected=expected, found=found, remedy=_BUILD_FIRST)
