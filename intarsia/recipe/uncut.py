"""What a candidate would be with none of its layers removed: what the closed form repairs it towards.

A mixture of fine-tunes repaired towards the base would be drawn back to it, and lose what it has of the others. So each
layer of a span is what the span's output layer is, at its own index: the same member's layer, or the same blend of
members. Of a join each layer is that of the member whose pieces were taken from it. For a cut of the base alone
this is the base.
"""

from __future__ import annotations

from dataclasses import replace

from intarsia.recipe.ops import Concat, LayerRef, Merge, Op, Select
from intarsia.recipe.recipe import Recipe


def uncut(recipe: Recipe) -> tuple[Op, ...]:
    """An op for each of the base's layers. Output scales, which make good for removed layers, are left out."""
    found: dict[int, Op] = {}
    for op, (start, stop) in zip(recipe.layers, recipe.spans, strict=True):
        for layer in range(start, stop):
            found[layer] = _at(op, layer)
    assert sorted(found) == list(range(recipe.depth)), "spans tile the depth"
    return tuple(found[layer] for layer in range(recipe.depth))


def _at(op: Op, layer: int) -> Op:
    """What an op is at another layer."""
    if isinstance(op, Concat):
        own = next((cut.source for cut in op.cuts if cut.source.layer == layer), op.cuts[0].source)
        return Select(source=_moved(own, layer))
    if isinstance(op, Merge):
        base = None if op.base is None else _moved(op.base, layer)
        return replace(op, sources=tuple(_moved(ref, layer) for ref in op.sources), base=base, scale=1.0)
    return Select(source=_moved(op.source, layer))


def _moved(ref: LayerRef, layer: int) -> LayerRef:
    return LayerRef(variant=ref.variant, layer=layer)
