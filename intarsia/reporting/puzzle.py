"""The puzzle picture: which pieces of which original layers an output model is made of.

Original layers stand in one row (or column), output layers in another; a ribbon leads from a layer to where its
pieces went, and is as wide as their share. One SVG without scripts or outside references.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Literal, Protocol

from intarsia.anatomy.spec import Part
from intarsia.planning.told import mlp_pieces
from intarsia.recipe.ops import Concat, LayerRef, Merge, Op
from intarsia.recipe.recipe import Recipe

# Woods, from light to dark: neighbours differ enough to tell pieces of adjacent layers apart.
_WOODS = ("#d9a05b", "#8c5a2b", "#c4713b", "#6b4423", "#e3bd7d", "#a8763e")
_DROPPED = "#c9c9c9"
_TEXT = "#6e6e6e"
_BLOCK = 22.0
_STEP = 30.0
_GAP = 110.0
_MARGIN = 16.0
_LABEL = 74.0


class Sizes(Protocol):
    """How many pieces a layer has; an `Anatomy` knows."""

    @property
    def n_kv_heads(self) -> int:
        """KV groups of attention."""

    @property
    def n_mlp_pieces(self) -> int:
        """Channels of the MLP, or experts of a mixture."""

    def is_mixture(self, part: Part) -> bool:
        """Whether the pieces of a part are experts."""


@dataclass(frozen=True, kw_only=True)
class Ribbon:
    """Pieces of original layer `source` of a variant that lie in output layer `output`, as shares of a layer.

    They leave the source's edge between `out_of` and fill the output's edge between `into`.
    """

    source: int
    variant: str
    output: int
    out_of: tuple[float, float]
    into: tuple[float, float]
    title: str


def ribbons(recipe: Recipe, anatomy: Sizes) -> list[Ribbon]:
    """Every ribbon of the picture. A share is the mean of the shares of KV groups and of MLP channels."""
    left: dict[LayerRef, float] = {}
    found: list[Ribbon] = []
    for output, op in enumerate(recipe.layers):
        filled = 0.0
        for source, share, title in _shares(op, anatomy):
            start = left.get(source, 0.0)
            found.append(
                Ribbon(
                    source=source.layer,
                    variant=source.variant,
                    output=output,
                    out_of=(start, min(start + share, 1.0)),
                    into=(filled, filled + share),
                    title=title,
                )
            )
            left[source] = start + share
            filled += share
    return found


def puzzle_svg(recipe: Recipe, anatomy: Sizes, *, direction: Literal["down", "right"] = "down") -> str:
    """The picture as SVG text: originals above outputs (`down`), or left of them (`right`)."""
    pieces = ribbons(recipe, anatomy)
    used = {ribbon.source for ribbon in pieces}
    long = _LABEL + max(recipe.depth, len(recipe.layers)) * _STEP + _MARGIN
    across = 2 * _MARGIN + 2 * _BLOCK + _GAP
    indent = (recipe.depth - len(recipe.layers)) * _STEP / 2

    def first(layer: int) -> float:
        return _LABEL + layer * _STEP

    def second(layer: int) -> float:
        return _LABEL + indent + layer * _STEP

    def point(along: float, deep: float) -> str:
        return f"{along:.1f} {deep:.1f}" if direction == "down" else f"{deep:.1f} {along:.1f}"

    def box(along: float, deep: float, length: float, colour: str, title: str) -> str:
        x, y = (along, deep) if direction == "down" else (deep, along)
        w, h = (length, _BLOCK) if direction == "down" else (_BLOCK, length)
        return (
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="2" fill="{colour}">'
            f"<title>{escape(title)}</title></rect>"
        )

    def label(along: float, deep: float, text: str, anchor: str = "middle") -> str:
        x, y = (along, deep) if direction == "down" else (deep, along)
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'

    top, bottom = _MARGIN, _MARGIN + _BLOCK + _GAP
    parts = []
    for ribbon in pieces:
        a, b = (first(ribbon.source) + edge * _BLOCK for edge in ribbon.out_of)
        c, d = (second(ribbon.output) + edge * _BLOCK for edge in ribbon.into)
        near, far = top + _BLOCK, bottom
        middle = (near + far) / 2
        path = (
            f"M {point(a, near)} C {point(a, middle)}, {point(c, middle)}, {point(c, far)} "
            f"L {point(d, far)} C {point(d, middle)}, {point(b, middle)}, {point(b, near)} Z"
        )
        parts.append(
            f'<path d="{path}" fill="{_wood(ribbon.source)}" fill-opacity="0.62">'
            f"<title>{escape(ribbon.title)}</title></path>"
        )
        parts.append(box(c, bottom, d - c, _wood(ribbon.source), ribbon.title))
    for layer in range(recipe.depth):
        colour = _wood(layer) if layer in used else _DROPPED
        parts.append(box(first(layer), top, _BLOCK, colour, f"layer {layer}" + ("" if layer in used else ", dropped")))
        parts.append(label(first(layer) + _BLOCK / 2, top - 4 if direction == "down" else top - 10, str(layer)))
    if direction == "down":
        parts.append(label(_MARGIN, top + _BLOCK * 0.7, f"{recipe.depth} layers", "start"))
        parts.append(label(_MARGIN, bottom + _BLOCK * 0.7, f"{len(recipe.layers)} layers", "start"))
    width, height = (long, across) if direction == "down" else (across, long)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="10" fill="{_TEXT}">'
        f"<title>{recipe.depth} layers become {len(recipe.layers)}</title>{''.join(parts)}</svg>\n"
    )


def _wood(layer: int) -> str:
    return _WOODS[layer % len(_WOODS)]


def _shares(op: Op, anatomy: Sizes) -> list[tuple[LayerRef, float, str]]:
    if isinstance(op, Merge):
        sizes = [abs(weight) for weight in op.weights]
        total = sum(sizes) or 1.0
        return [
            (source, size / total, f"layer {source.layer}, whole, times {weight:.3g}")
            for source, size, weight in zip(op.sources, sizes, op.weights, strict=True)
            if size > 0
        ]
    if not isinstance(op, Concat):
        return [(op.source, 1.0, f"layer {op.source.layer}, whole")]
    name = mlp_pieces(anatomy.is_mixture("mlp"))
    return [
        (
            cut.source,
            (len(cut.kv_groups) / anatomy.n_kv_heads + len(cut.channels) / anatomy.n_mlp_pieces) / 2,
            f"layer {cut.source.layer}: {len(cut.kv_groups)} of {anatomy.n_kv_heads} KV groups, "
            f"{len(cut.channels)} of {anatomy.n_mlp_pieces} {name}",
        )
        for cut in op.cuts
    ]
