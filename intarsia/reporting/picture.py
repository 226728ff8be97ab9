"""The puzzle picture of a report page: original layers at the left, output layers at the right.

Every layer can be pointed at, focused or tapped: the page's script shows what it is made of. Without the script the
picture is the same, and every layer says the same in short as its title. Colours are classes of the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from intarsia.anatomy.spec import Part
from intarsia.planning.told import mlp_pieces, of_experts
from intarsia.recipe.ops import Concat
from intarsia.recipe.recipe import Recipe
from intarsia.reporting.puzzle import Ribbon, ribbons

WOODS = 6
_WIDTH, _BLOCK, _LABEL, _TOP = 360.0, 30.0, 34.0, 24.0
_TALL, _LEAST_STEP, _MOST_STEP = 640.0, 13.0, 26.0
_FILLED = 0.74  # of a step


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """How many pieces a layer has. `n_channels`: or experts, where it is a mixture of `experts`.

    `heads_per_group`: query heads of a KV group, where it is known.
    """

    n_kv_heads: int
    n_channels: int
    experts: bool = False
    heads_per_group: int | None = None

    @property
    def n_mlp_pieces(self) -> int:
        """As an anatomy calls them."""
        return self.n_channels

    def is_mixture(self, part: Part) -> bool:
        """Whether the pieces of a part are experts."""
        return self.experts and part == "mlp"

    @property
    def mlp(self) -> str:
        """What the pieces of the MLP are called."""
        return mlp_pieces(self.experts)


def pieces_of(recipe: Recipe) -> Pieces:
    """The sizes that a recipe itself tells: every joined layer holds as many pieces as an original one."""
    experts = of_experts(recipe.provenance)
    for op in recipe.layers:
        if isinstance(op, Concat):
            return Pieces(
                n_kv_heads=sum(len(cut.kv_groups) for cut in op.cuts),
                n_channels=sum(len(cut.channels) for cut in op.cuts),
                experts=experts,
            )
    return Pieces(n_kv_heads=1, n_channels=1, experts=experts)


def wood(ribbon_source: int, variant: str, variants: list[str]) -> int:
    """The colour of a source: by variant where there are several, else by layer, neighbours differing."""
    return (variants.index(variant) if len(variants) > 1 else ribbon_source) % WOODS


def picture_svg(recipe: Recipe, pieces: Pieces) -> str:
    """The picture as an `<svg>` element for a page."""
    deep, shallow = recipe.depth, len(recipe.layers)
    variants = [variant.name for variant in recipe.variants]
    step = min(_MOST_STEP, max(_LEAST_STEP, _TALL / deep))
    height = max(deep, shallow) * step
    found = ribbons(recipe, pieces)
    layout = _Layout(step=step, output_step=height / shallow, block=step * _FILLED)
    parts = [_ribbon(ribbon, layout, wood(ribbon.source, ribbon.variant, variants)) for ribbon in found]
    parts += [_original(layer, found, layout, recipe.base, variants) for layer in range(deep)]
    parts += [_output(layer, found, layout, variants) for layer in range(shallow)]
    title = f"{deep} layers become {shallow}"
    heads = (
        f'<text class="head" x="{_LABEL:.0f}" y="12">{deep} original layers</text>'
        f'<text class="head" x="{_WIDTH - _LABEL:.0f}" y="12" text-anchor="end">{shallow} layers</text>'
    )
    return (
        f'<svg class="puzzle" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {_TOP + height + 4:.0f}" '
        f'role="group" aria-label="{title}"><title>{title}</title>{heads}{"".join(parts)}</svg>'
    )


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where layers stand. Output layers spread over the height of the original ones."""

    step: float
    output_step: float
    block: float

    def original(self, layer: int) -> float:
        return _TOP + layer * self.step + (self.step - self.block) / 2

    def output(self, layer: int) -> float:
        return _TOP + layer * self.output_step + (self.output_step - self.block) / 2


def _ribbon(ribbon: Ribbon, layout: _Layout, colour: int) -> str:
    a, b = (layout.original(ribbon.source) + edge * layout.block for edge in ribbon.out_of)
    c, d = (layout.output(ribbon.output) + edge * layout.block for edge in ribbon.into)
    left, right = _LABEL + _BLOCK, _WIDTH - _LABEL - _BLOCK
    middle = (left + right) / 2
    whole = " whole" if ribbon.into == (0.0, 1.0) else ""
    path = (
        f"M{left:.0f} {a:.1f}C{middle:.0f} {a:.1f} {middle:.0f} {c:.1f} {right:.0f} {c:.1f}"
        f"V{d:.1f}C{middle:.0f} {d:.1f} {middle:.0f} {b:.1f} {left:.0f} {b:.1f}Z"
    )
    return (
        f'<path class="ribbon w{colour}{whole}" data-in="{ribbon.source}" data-out="{ribbon.output}" d="{path}">'
        f"<title>{escape(ribbon.title)}</title></path>"
    )


def _original(layer: int, found: list[Ribbon], layout: _Layout, base: str, variants: list[str]) -> str:
    goes = sorted({ribbon.output for ribbon in found if ribbon.source == layer})
    told = f"layer {layer}: " + ("goes to " + ", ".join(map(str, goes)) if goes else "dropped")
    x, y = _LABEL, layout.original(layer)
    colour = f"w{wood(layer, base, variants)}" if goes else "dropped"
    box = f'<rect class="{colour}" x="{x:.0f}" y="{y:.1f}" width="{_BLOCK:.0f}" height="{layout.block:.1f}" rx="2"/>'
    touch = _touch(0.0, y, layout.block, layout.step)
    return _handle("in", layer, told, touch + box, x - 5, y + layout.block / 2, "end")


def _output(layer: int, found: list[Ribbon], layout: _Layout, variants: list[str]) -> str:
    mine = [ribbon for ribbon in found if ribbon.output == layer]
    told = f"output layer {layer}: " + "; ".join(ribbon.title for ribbon in mine)
    x, y = _WIDTH - _LABEL - _BLOCK, layout.output(layer)
    boxes = "".join(
        f'<rect class="w{wood(ribbon.source, ribbon.variant, variants)}" x="{x:.0f}" '
        f'y="{y + ribbon.into[0] * layout.block:.1f}" width="{_BLOCK:.0f}" '
        f'height="{(ribbon.into[1] - ribbon.into[0]) * layout.block:.1f}"/>'
        for ribbon in mine
    )
    frame = f'<rect class="frame" x="{x:.0f}" y="{y:.1f}" width="{_BLOCK:.0f}" height="{layout.block:.1f}" rx="2"/>'
    touch = _touch(x, y, layout.block, layout.output_step)
    return _handle("out", layer, told, touch + boxes + frame, x + _BLOCK + 5, y + layout.block / 2, "start")


def _touch(x: float, y: float, block: float, step: float) -> str:
    """What a finger may hit: all of the layer's row, its number included."""
    top = y - (step - block) / 2
    return f'<rect class="touch" x="{x:.0f}" y="{top:.1f}" width="{_LABEL + _BLOCK:.0f}" height="{step:.1f}"/>'


def _handle(side: str, layer: int, told: str, shapes: str, x: float, y: float, anchor: str) -> str:
    label = f'<text class="tick" x="{x:.0f}" y="{y + 3.5:.1f}" text-anchor="{anchor}">{layer}</text>'
    return (
        f'<g class="layer" data-side="{side}" data-layer="{layer}" tabindex="0" role="button" '
        f'aria-label="{escape(told)}"><title>{escape(told)}</title>{shapes}{label}</g>'
    )
