"""A recipe of a recipe becomes one flat recipe; pieces of merged layers become pieces of original layers.

Parameters that belong to no piece are weighted averages, and a weighted average of weighted averages is one again:
weights multiply along the way down and add up by source. Norms follow the same rule within one norm mode (`fold` of
`fold`, `average` of `average`); the two modes do not mix, and neither does concatenation with `Merge` or with fitted
tensors. Those cases are refused: the inner recipe has to be built first.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from intarsia.anatomy.spec import PARTS, Anatomy
from intarsia.errors import Problem, UserError
from intarsia.recipe.flatten import BUILD_FIRST, join, linear, not_representable, simplify
from intarsia.recipe.ops import Concat, LayerRef, Merge, Op, Select
from intarsia.recipe.recipe import Recipe, Span


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
    return [Problem(where=where, expected=expected, found=what, remedy=BUILD_FIRST) for where, expected, what in found]


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
            raise not_representable(where, "sources without fitted tensors", f"fitted tensors of inner layer {layer}")
    if isinstance(op, Merge):
        return _compose_merge(op, inner, where)
    if not op.cuts:
        return op
    joined = [inner.layers[cut.source.layer] for cut in op.cuts]
    if any(isinstance(other, Concat) and other.fuse for other in joined):
        raise not_representable(where, "sources without fused pieces", "a fused inner layer")
    if op.fuse and any(isinstance(other, Concat) for other in joined):
        raise not_representable(where, "whole layers to fuse", "a concatenated inner layer")
    whole = {part: sum(len(cut.pieces(part)) for cut in op.cuts) for part in PARTS}
    flat = join(
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
    sources, weights = linear([inner.layers[source.layer] for source in op.sources], op.weights, where)
    return replace(op, sources=sources, weights=weights)


def _substituted(op: Merge, inner: Recipe, where: str) -> Merge:
    """A merge that is no plain sum keeps its form; its sources must be whole layers of the inner recipe's models."""
    refs: list[LayerRef] = []
    for source in (*op.sources, *(() if op.base is None else (op.base,))):
        found = inner.layers[source.layer]
        if not isinstance(found, Select):
            raise not_representable(where, f"whole layers to merge by {op.method}", f"inner layer {source.layer}")
        refs.append(found.source)
    return replace(op, sources=tuple(refs[: len(op.sources)]), base=None if op.base is None else refs[-1])


def _compose_span(span: Span, inner: Recipe) -> Span:
    starts = [*(start for start, _ in inner.spans), inner.depth]
    return starts[span[0]], starts[span[1]]
