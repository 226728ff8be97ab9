"""The puzzle picture: the pieces of original layers in an output model.

Original layers are in one row, and output layers in another. A ribbon leads from a layer to its pieces, and is as wide
as their share. On a page the rows are columns, and the page's script shows the composition and measures of the layer
under the pointer; in a file beside a model card the rows are above each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from markupsafe import Markup

from intarsia.architecture.spec import Architecture
from intarsia.pruning.scores import digits
from intarsia.pruning.step import mlp_pieces, of_experts
from intarsia.recipe.recipe import Concat, LayerRef, Merge, Op, Recipe, format_ranges
from intarsia.reporting.blocks import Pictures, Section, Table
from intarsia.reporting.figures import WOODS, standalone

_BLOCK, _LABEL, _EDGE, _FILLED = 30.0, 34.0, 24.0, 0.74
_TALL, _LEAST_STEP, _MOST_STEP = 640.0, 13.0, 26.0
_MOST_RANGES = 120  # longest text of channel ranges, in characters


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Number of pieces in a layer."""

    n_kv_heads: int
    # Channels of the MLP, or experts of a mixture.
    n_mlp_pieces: int
    experts: bool = False
    # Query heads of a KV group, if known.
    heads_per_group: int | None = None

    @property
    def mlp(self) -> str:
        """The name of the pieces of the MLP."""
        return mlp_pieces(self.experts)


@dataclass(frozen=True, kw_only=True)
class Ribbon:
    """Pieces of an original layer in an output layer, with their extent on both edges (0 to 1)."""

    source: LayerRef
    output: int
    out_of: tuple[float, float]
    into: tuple[float, float]
    title: str


def pieces_of_architecture(architecture: Architecture) -> Pieces:
    """Return the number of pieces in a layer of a model."""
    return Pieces(
        n_kv_heads=architecture.n_kv_heads,
        n_mlp_pieces=architecture.n_pieces("mlp"),
        experts=architecture.is_mixture("mlp"),
        heads_per_group=architecture.heads_per_group,
    )


def pieces_of(*recipes: Recipe) -> Pieces:
    """Return the number of pieces in a layer, from the joined layers of recipes."""
    experts = any(of_experts(recipe.provenance) for recipe in recipes)
    for op in (op for recipe in recipes for op in recipe.layers if isinstance(op, Concat)):
        kv_groups, channels = (sum(len(getattr(cut, part)) for cut in op.cuts) for part in ("kv_groups", "channels"))
        return Pieces(n_kv_heads=kv_groups, n_mlp_pieces=channels, experts=experts)
    return Pieces(n_kv_heads=1, n_mlp_pieces=1, experts=experts)


def ribbons(recipe: Recipe, pieces: Pieces) -> list[Ribbon]:
    """Return every ribbon of the picture. A share is the mean of the shares of KV groups and of MLP channels."""
    used: dict[LayerRef, float] = {}
    found = []
    for output, op in enumerate(recipe.layers):
        filled = 0.0
        for source, share, title in _shares(op, pieces):
            start = used.get(source, 0.0)
            out_of, into = (start, min(start + share, 1.0)), (filled, filled + share)
            found.append(Ribbon(source=source, output=output, out_of=out_of, into=into, title=title))
            used[source], filled = start + share, filled + share
    return found


def wood(ref: LayerRef, variants: Sequence[str]) -> int:
    """Return the index of a layer's colour: by variant if there are several, else different for neighbours."""
    return (variants.index(ref.variant) if len(variants) > 1 else ref.layer) % WOODS


def puzzle_svg(recipe: Recipe, pieces: Pieces) -> Markup:
    """Draw the picture for a page: original layers on the left, each a button of the page's script."""
    return _Drawing(recipe, pieces, upright=True).svg()


def puzzle_file(recipe: Recipe, pieces: Pieces) -> str:
    """Draw the picture as an SVG file: original layers at the top."""
    return standalone(_Drawing(recipe, pieces, upright=False).svg())


class _Drawing:
    """A picture in coordinates (along, across): along the layers, and across from original to output layers."""

    def __init__(self, recipe: Recipe, pieces: Pieces, *, upright: bool) -> None:
        self.recipe, self.upright = recipe, upright
        self.variants = [variant.name for variant in recipe.variants]
        self.ribbons = ribbons(recipe, pieces)
        self.step = min(_MOST_STEP, max(_LEAST_STEP, _TALL / recipe.depth))
        self.length = max(recipe.depth, len(recipe.layers)) * self.step
        # Output layers are spread over the length of the original ones.
        self.output_step = self.length / len(recipe.layers)
        self.block = self.step * _FILLED
        self.start = _EDGE if upright else 96.0
        self.near = _LABEL if upright else _EDGE
        self.far = self.near + (262.0 if upright else 128.0)

    def svg(self) -> Markup:
        deep, shallow = self.recipe.depth, len(self.recipe.layers)
        width, height = 360.0, self.start + self.length + 4
        if self.upright:
            heads = self._text(self.near, 12, f"{deep} original layers", "start", size=10)
            heads += self._text(width - _LABEL, 12, f"{shallow} layers", "end", size=10)
        else:
            width, height = height, self.far + _BLOCK + _EDGE
            heads = self._text(4, self.near + 0.62 * _BLOCK, f"{deep} layers", "start", size=10)
            heads += self._text(4, self.far + 0.62 * _BLOCK, f"{shallow} layers", "start", size=10)
        parts = [
            *map(self._ribbon, self.ribbons),
            *map(self._original, range(deep)),
            *map(self._output, range(shallow)),
        ]
        title = f"{deep} layers become {shallow}"
        return Markup(
            f'<svg class="puzzle" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
            f'role="group" aria-label="{title}" font-family="system-ui, sans-serif"><title>{title}</title>'
            f"{heads}{''.join(parts)}</svg>"
        )

    def _along(self, layer: int, *, output: bool = False) -> float:
        step = self.output_step if output else self.step
        return self.start + layer * step + (step - self.block) / 2

    def _colour(self, ref: LayerRef) -> str:
        return f"var(--w{wood(ref, self.variants)})"

    def _ribbon(self, ribbon: Ribbon) -> str:
        a, b = (self._along(ribbon.source.layer) + edge * self.block for edge in ribbon.out_of)
        c, d = (self._along(ribbon.output, output=True) + edge * self.block for edge in ribbon.into)
        near, far = self.near + _BLOCK, self.far
        middle = (near + far) / 2

        def at(along: float, across: float) -> str:
            return f"{across:.1f} {along:.1f}" if self.upright else f"{along:.1f} {across:.1f}"

        path = (
            f"M{at(a, near)}C{at(a, middle)} {at(c, middle)} {at(c, far)}"
            f"L{at(d, far)}C{at(d, middle)} {at(b, middle)} {at(b, near)}Z"
        )
        opacity = ".24" if ribbon.into == (0.0, 1.0) else ".8"
        return (
            f'<path class="ribbon" data-in="{ribbon.source.layer}" data-out="{ribbon.output}" d="{path}" '
            f'fill="{self._colour(ribbon.source)}" fill-opacity="{opacity}">'
            f"<title>{escape(ribbon.title)}</title></path>"
        )

    def _original(self, layer: int) -> str:
        outputs = sorted({ribbon.output for ribbon in self.ribbons if ribbon.source.layer == layer})
        look = f'fill="{self._colour(LayerRef(variant=self.recipe.base, layer=layer))}"'
        title = f"layer {layer}: in output layer " + ", ".join(map(str, outputs))
        if not outputs:
            look = 'fill="none" stroke="var(--soft)" stroke-dasharray="2 2" stroke-opacity=".7"'
            title = f"layer {layer}: dropped"
        return self._layer("in", layer, title, self._box(self._along(layer), self.near, self.block, look))

    def _output(self, layer: int) -> str:
        mine = [ribbon for ribbon in self.ribbons if ribbon.output == layer]
        title = f"output layer {layer}: " + "; ".join(ribbon.title for ribbon in mine)
        boxes = ""
        for ribbon in mine:
            start, stop = (self._along(layer, output=True) + edge * self.block for edge in ribbon.into)
            boxes += self._box(start, self.far, stop - start, f'fill="{self._colour(ribbon.source)}"')
        return self._layer("out", layer, title, boxes)

    def _layer(self, side: str, layer: int, title: str, boxes: str) -> str:
        """A layer with its number; on a page, a button large enough for a finger."""
        output = side == "out"
        along, across = self._along(layer, output=output), self.far if output else self.near
        number = across + _BLOCK + 5 if output else across - 5
        middle = along + self.block / 2
        if not self.upright:
            text = self._text(middle, number + (8 if output else 0), str(layer), "middle")
            return f"<g><title>{escape(title)}</title>{boxes}{text}</g>"
        text = self._text(number, middle + 3.5, str(layer), "start" if output else "end")
        step = self.output_step if output else self.step
        touch = 'class="touch" fill="none"'
        area = self._box(middle - step / 2, across - (0 if output else _LABEL), step, touch, across=_LABEL + _BLOCK)
        frame = self._box(along, across, self.block, 'class="frame" fill="none"')
        return (
            f'<g class="layer" data-side="{side}" data-layer="{layer}" tabindex="0" role="button" '
            f'aria-label="{escape(title)}"><title>{escape(title)}</title>{area}{boxes}{frame}{text}</g>'
        )

    def _box(self, along: float, start: float, length: float, look: str, *, across: float = _BLOCK) -> str:
        x, y, width, height = (start, along, across, length) if self.upright else (along, start, length, across)
        return f'<rect {look} x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="1.5"/>'

    def _text(self, x: float, y: float, text: str, anchor: str, *, size: int = 9) -> str:
        return (
            f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
            f'fill="var(--soft)">{escape(text)}</text>'
        )


def _shares(op: Op, pieces: Pieces) -> list[tuple[LayerRef, float, str]]:
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
    return [
        (
            cut.source,
            (len(cut.kv_groups) / pieces.n_kv_heads + len(cut.channels) / pieces.n_mlp_pieces) / 2,
            f"layer {cut.source.layer}: {len(cut.kv_groups)} of {pieces.n_kv_heads} KV groups, "
            f"{len(cut.channels)} of {pieces.n_mlp_pieces} {pieces.mlp}",
        )
        for cut in op.cuts
    ]


def made_of(op: Op, mlp: str, *, named: bool) -> str:
    """The composition of a layer, in one line.

    Args:
        mlp: the name of the pieces of an MLP.
        named: whether to give the variants of sources.
    """

    def name(ref: LayerRef) -> str:
        return str(ref) if named else str(ref.layer)

    if isinstance(op, Concat):
        return " + ".join(
            f"{name(cut.source)} (KV groups {len(cut.kv_groups)}, {mlp} {len(cut.channels)})" for cut in op.cuts
        )
    if not isinstance(op, Merge):
        return f"{name(op.source)}, whole"
    mixes = [op.mix("attention")] if op.mlp is None else [op.mix("attention"), op.mlp]
    words = [
        f"{mix.method} of "
        + ", ".join(f"{w:.3g} × {name(ref)}" for ref, w in zip(op.sources, mix.weights, strict=True) if w)
        + "".join(f"; {key} {value:g}" for key, value in mix.params.items() if key != "seed")
        for mix in mixes
    ]
    text = words[0] if len(words) == 1 else f"attention: {words[0]}; MLP: {words[1]}"
    return text + (f"; output times {op.scale:g}" if op.scale != 1.0 else "")


def sources_in_words(recipe: Recipe) -> str:
    """The numbers of original, merged and joined layers, in words."""
    counts = {variant.name: 0 for variant in recipe.variants}
    merged = joined = 0
    for op in recipe.layers:
        merged += isinstance(op, Merge)
        joined += isinstance(op, Concat)
        if not isinstance(op, (Merge, Concat)):
            counts[op.source.variant] += 1
    several = len(counts) > 1
    parts = [f"{count} of {name}" if several else f"{count} kept whole" for name, count in counts.items() if count]
    parts += [f"{merged} merged"] * (merged > 0) + [f"{joined} joined from pieces"] * (joined > 0)
    dropped = recipe.depth - len({source.layer for op in recipe.layers for source in op.sources})
    return f"{len(recipe.layers)} layers: {', '.join(parts)}. " + (
        f"{dropped} of the {recipe.depth} original layers {'is' if dropped == 1 else 'are'} dropped."
        if dropped
        else f"Each of the {recipe.depth} original layers is part of it."
    )


def puzzle_section(
    recipes: Mapping[int, Recipe],
    pieces: Pieces,
    log: Sequence[Mapping[str, Any]] = (),
    *,
    fits: Sequence[Mapping[str, Any]] = (),
    summary: str = "",
) -> Section:
    """The picture at every depth, deepest first, and the shallowest recipe as a table.

    Args:
        log: the steps of a plan, deepest first.
        fits: rows of the closed form for the shallowest recipe.
    """
    least = min(recipes)
    recipe = recipes[least]
    variants = [variant.name for variant in recipe.variants]
    evidence = log[0]["evidence"] if log else {}
    rows = [
        {
            "output layer": str(index),
            "stands for": str(first) if stop - first == 1 else f"{first} to {stop - 1}",
            "made of": made_of(op, pieces.mlp, named=len(variants) > 1),
        }
        for index, (op, (first, stop)) in enumerate(zip(recipe.layers, recipe.spans, strict=True))
    ]
    data = {
        "kv": pieces.n_kv_heads,
        "heads": pieces.heads_per_group,
        "channels": pieces.n_mlp_pieces,
        "mlp": pieces.mlp,
        "influence": [digits(value) for value in evidence.get("influence") or ()],
        "spans": {str(start): digits(value) for start, value in (evidence.get("span_scores") or {}).items()},
        "depths": {
            str(layers): _outputs(each, log, fits if layers == least else ()) for layers, each in recipes.items()
        },
    }
    board = Pictures(
        depth=recipe.depth,
        pictures={layers: puzzle_svg(each, pieces) for layers, each in recipes.items()},
        data=data,
        summary=summary or sources_in_words(recipe),
        members=variants if len(variants) > 1 else (),
    )
    return Section(
        title="The puzzle",
        intro="The width of a ribbon is its share of a layer's pieces. Pale ribbons are layers kept whole, empty "
        "frames are dropped layers. Point at a layer to see its composition.",
        blocks=[board, Table(rows=rows, words=("stands for", "made of"), caption=f"All {least} layers", folded=True)],
    )


def _outputs(
    recipe: Recipe, log: Sequence[Mapping[str, Any]], fits: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The data of every output layer for the page's script."""
    variants = [variant.name for variant in recipe.variants]
    found: list[dict[str, Any]] = [
        {"span": list(span), "parts": [_part(op, number, variants) for number in range(len(op.sources))]}
        for op, span in zip(recipe.layers, recipe.spans, strict=True)
    ]
    for output, op in zip(found, recipe.layers, strict=True):
        if notes := _how_joined(op, [step for step in log if step["layers"] >= len(recipe.layers)]):
            output["notes"] = notes
    for fit in fits:
        if fit.get("ridge") is not None:
            errors = f"error {fit['error_before']:.3g} → {fit['error_after']:.3g}"
            found[int(fit["layer"])].setdefault("notes", []).append((f"fit of {fit['module']}", errors))
    return found


def _how_joined(op: Op, log: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The last step that joined the sources of a layer, and its measurements; nothing for a layer kept whole."""
    sources = {str(source) for source in op.sources}
    made = [step for step in log if len(sources) > 1 and set(step.get("op") or ()) == sources]
    if not made:
        return []
    step, start = made[-1], made[-1]["merged"][0]
    evidence, loss = step.get("evidence") or {}, step.get("loss")
    grid = [entry for entry in evidence.get("grid") or () if entry.get("start", start) == start]
    chosen = [entry for entry in grid if loss is not None and abs(entry["loss"] - loss) < 1e-9]
    ratios = {
        "ratio by block influence": evidence.get("prior_ratios"),
        "ratio by loss": max(chosen, key=lambda entry: entry["sequences"])["ratios"] if chosen else None,
    }
    numbers = {
        "score of the span": (evidence.get("span_scores") or {}).get(str(start)),
        "calibration loss": loss,
    }
    return [
        ("joined", f"in the step to {step['layers']} layers"),
        *((name, " : ".join(f"{share:.2f}" for share in shares)) for name, shares in ratios.items() if shares),
        *((name, f"{value:.4g}") for name, value in numbers.items() if value is not None),
    ]


def _part(op: Op, number: int, variants: Sequence[str]) -> dict[str, Any]:
    ref = op.sources[number]
    found: dict[str, Any] = {"layer": ref.layer, "wood": wood(ref, variants)}
    if len(variants) > 1:
        found["variant"] = ref.variant
    if isinstance(op, Concat):
        cut = op.cuts[number]
        found |= {"kv": list(cut.kv_groups), "channels": len(cut.channels)}
        ranges = format_ranges(cut.channels)
        if len(ranges) <= _MOST_RANGES:
            found["ranges"] = ranges
    if isinstance(op, Merge):
        found["weight"] = digits(op.weights[number])
    return found
