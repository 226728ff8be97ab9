"""The section of a report about a search that shows what was found: the knee of the front as a picture to point at."""

from __future__ import annotations

from dataclasses import replace
from html import escape
from typing import Any

from intarsia.recipe.ops import Concat, Merge, Op
from intarsia.recipe.recipe import Recipe, Variant
from intarsia.reporting.blocks import Figure, Picture, Pictures, Section, table
from intarsia.reporting.layer_facts import picture_data
from intarsia.reporting.picture import picture_svg, pieces_of, wood
from intarsia.reporting.tailor_folder import TailorRun

_MOST_PICTURES = 4


def puzzle_sections(run: TailorRun) -> list[Section]:
    """The knee's picture to point at, and how the best of each objective differ from it."""
    recipe = None if run.front is None else _of_all(run, run.recipe(run.front.knee))
    if run.front is None or recipe is None:
        return []
    sizes, layers = pieces_of(recipe), len(recipe.layers)
    data = picture_data({layers: recipe}, sizes)
    picture = Picture(layers=layers, svg=picture_svg(recipe, sizes))
    rows = [
        {
            "output layer": str(index),
            "stands for": str(start) if stop - start == 1 else f"{start} to {stop - 1}",
            "made of": told(op, sizes.mlp),
        }
        for index, (op, (start, stop)) in enumerate(zip(recipe.layers, recipe.spans, strict=True))
    ]
    name = run.path.resolve().name
    blocks: list[Any] = [
        Pictures(
            name=name, depth=recipe.depth, chosen=layers, pictures=[picture], data=data, summary=_summary(run, recipe)
        ),
        *([Figure(svg=_legend(recipe), caption="The colours of the members.")] if len(recipe.variants) > 1 else []),
        table(rows, text_columns=("stands for", "made of"), caption=f"All {layers} layers", folded=True),
    ]
    for objective in run.objectives[:_MOST_PICTURES]:
        best = run.front.best(objective)
        other = None if best is run.front.knee else _of_all(run, run.recipe(best))
        if other is not None:
            svg = picture_svg(other, pieces_of(other))
            blocks.append(Figure(svg=svg, caption=f"Trial {best.number}, the best in {objective}: {_sources(other)}."))
    return [
        Section(
            title="The puzzle",
            blocks=blocks,
            intro="The knee of the front. Pale ribbons are layers kept whole, empty frames layers that were dropped. "
            "Point at a layer to see what it is made of.",
        )
    ]


def _of_all(run: TailorRun, recipe: Recipe | None) -> Recipe | None:
    """The recipe with every member of the family, so that a member has the same colour in all pictures."""
    if recipe is None:
        return None
    members = run.settings["members"].items()
    return replace(recipe, variants=tuple(Variant(name=name, model=str(member["model"])) for name, member in members))


def _legend(recipe: Recipe) -> str:
    """A swatch and a name for every member."""
    names = [variant.name for variant in recipe.variants]
    height = 22 * len(names) + 8
    rows = "".join(
        f'<rect class="w{wood(0, name, names)}" x="8" y="{8 + 22 * row}" width="26" height="14" rx="2"/>'
        f'<text class="tick" x="42" y="{19 + 22 * row}">{escape(name)}</text>'
        for row, name in enumerate(names)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 460 {height}" role="img">'
        f"<title>colours of the members</title>{rows}</svg>"
    )


def _summary(run: TailorRun, recipe: Recipe) -> str:
    """What the recipe takes from whom."""
    assert run.front is not None
    healed = f" {len(recipe.fitted)} layers have read-outs that were fitted in closed form." if recipe.fitted else ""
    return f"Trial {run.front.knee.number}: {_sources(recipe)}.{healed}"


def _sources(recipe: Recipe) -> str:
    """How many layers are whole ones of each member, merged, or joined."""
    whole = {variant.name: 0 for variant in recipe.variants}
    merged = joined = 0
    for op in recipe.layers:
        merged += isinstance(op, Merge)
        joined += isinstance(op, Concat)
        if not isinstance(op, (Merge, Concat)):
            whole[op.source.variant] += 1
    parts = [f"{count} of {name}" for name, count in whole.items() if count]
    parts += [f"{merged} merged"] * (merged > 0) + [f"{joined} joined"] * (joined > 0)
    return ", ".join(parts)


def told(op: Op, mlp: str) -> str:
    """An op of a family in one line, members named; `mlp` is what the pieces of an MLP are called."""
    if isinstance(op, Concat):
        return " + ".join(f"{cut.source} ({len(cut.kv_groups)} KV, {len(cut.channels)} {mlp})" for cut in op.cuts)
    if not isinstance(op, Merge):
        return f"{op.source}, whole"
    parts = [op.mix("attention")] if op.mlp is None else [op.mix("attention"), op.mlp]
    words = [
        f"{mix.method} of "
        + ", ".join(f"{w:.3g} × {ref}" for ref, w in zip(op.sources, mix.weights, strict=True) if w)
        + "".join(f"; {name} {value:g}" for name, value in mix.params.items() if name != "seed")
        for mix in parts
    ]
    text = words[0] if len(words) == 1 else f"attention: {words[0]}; MLP: {words[1]}"
    return text + (f"; output times {op.scale:g}" if op.scale != 1.0 else "")
