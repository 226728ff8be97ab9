"""The puzzle picture of every depth as a part of a report, with its table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from intarsia.recipe.recipe import Recipe
from intarsia.reporting.blocks import Picture, Pictures, Section, table
from intarsia.reporting.layer_facts import made_of, picture_data
from intarsia.reporting.picture import Pieces, picture_svg, pieces_of
from intarsia.reporting.plan_folder import PlanRun


def picture_sections(run: PlanRun, *, pieces: Pieces | None = None) -> list[Section]:
    """The puzzle picture of every depth."""
    if not run.recipes:
        return []
    last = min(run.recipes)
    sizes = pieces or next(
        (found for found in map(pieces_of, run.recipes.values()) if found.n_channels > 1), pieces_of(run.recipes[last])
    )
    spans = {int(start): value for start, value in (run.evidence.get("span_scores") or {}).items()}
    data = picture_data(run.recipes, sizes, influence=run.evidence.get("influence") or (), spans=spans, steps=run.steps)
    return [puzzle_section(run.recipes, sizes, data, name=str(run.path.name))]


def puzzle_section(recipes: Mapping[int, Recipe], pieces: Pieces, data: Mapping[str, Any], *, name: str) -> Section:
    """The picture at every depth, and below it the shallowest recipe as a table."""
    last = min(recipes)
    recipe = recipes[last]
    rows = [
        {
            "output layer": str(index),
            "stands for": str(first) if stop - first == 1 else f"{first} to {stop - 1}",
            "made of": made_of(op, pieces.mlp),
        }
        for index, (op, (first, stop)) in enumerate(zip(recipe.layers, recipe.spans, strict=True))
    ]
    pictures = [Picture(layers=layers, svg=picture_svg(each, pieces)) for layers, each in recipes.items()]
    return Section(
        title="The puzzle",
        intro="A ribbon is as wide as the share of a layer's pieces that it carries. Point at a layer to see its heads "
        f"and {pieces.mlp}; pale ribbons are layers kept whole, empty frames are layers that were dropped.",
        blocks=[
            Pictures(
                name=name, depth=recipe.depth, chosen=last, pictures=pictures, data=data, summary=_summary(recipe)
            ),
            table(rows, text_columns=("stands for", "made of"), caption=f"All {last} layers", folded=True),
        ],
    )


def _summary(recipe: Recipe) -> str:
    whole = sum(len(op.sources) == 1 for op in recipe.layers)
    joined = [op for op in recipe.layers if len(op.sources) > 1]
    sources = {source for op in recipe.layers for source in op.sources}
    parts = [f"{whole} of the {len(recipe.layers)} layers are original ones, kept whole"]
    if joined:
        among = len({source for op in joined for source in op.sources})
        parts.append(f"{len(joined)} {'is' if len(joined) == 1 else 'are'} joined from pieces of {among} others")
    left = recipe.depth - len({source.layer for source in sources})
    parts.append(f"of {left} nothing is left" if left else "of every original layer something is left")
    return "; ".join(parts) + "."
