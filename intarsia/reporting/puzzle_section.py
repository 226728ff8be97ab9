"""The puzzle picture as a section of a report: the picture at every depth, a table, and the data of the page's script.

The script shows this data when a layer is pointed at: what it is made of, and what a run has measured of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from intarsia.recipe.ops import Concat, Merge, Op, format_ranges
from intarsia.recipe.recipe import Recipe
from intarsia.reporting.blocks import Picture, Pictures, Section, table
from intarsia.reporting.puzzle import Pieces, made_of, puzzle_svg, sources_in_words, wood

_LONGEST = 120  # characters of channel ranges that somebody still reads


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """What a run knows of its layers, apart from its recipes."""

    # Block influence of every original layer.
    influence: Sequence[float] = ()
    # Span influence by first layer, at the first step.
    spans: Mapping[int, float] = field(default_factory=dict)
    # The log of a plan, by depth.
    steps: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    # Rows of the closed form by output layer of the shallowest recipe.
    fits: Mapping[int, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    @classmethod
    def of_plan(cls, evidence: Mapping[str, Any], steps: Mapping[int, Mapping[str, Any]], **more: Any) -> LayerFacts:
        """Return what a plan has measured at its first step, and logged."""
        spans = {int(start): value for start, value in (evidence.get("span_scores") or {}).items()}
        return cls(influence=evidence.get("influence") or (), spans=spans, steps=steps, **more)


def puzzle_section(
    recipes: Mapping[int, Recipe], pieces: Pieces, facts: LayerFacts | None = None, *, summary: str = ""
) -> Section:
    """Return the picture at every depth, and below it the shallowest recipe as a table."""
    least = min(recipes)
    recipe = recipes[least]
    variants = [variant.name for variant in recipe.variants]
    rows = [
        {
            "output layer": str(index),
            "stands for": str(first) if stop - first == 1 else f"{first} to {stop - 1}",
            "made of": made_of(op, pieces, named=len(variants) > 1),
        }
        for index, (op, (first, stop)) in enumerate(zip(recipe.layers, recipe.spans, strict=True))
    ]
    board = Pictures(
        depth=recipe.depth,
        chosen=least,
        pictures=[Picture(layers=layers, svg=puzzle_svg(each, pieces)) for layers, each in recipes.items()],
        data=puzzle_data(recipes, pieces, facts or LayerFacts()),
        summary=summary or sources_in_words(recipe),
        members=variants if len(variants) > 1 else (),
    )
    return Section(
        title="The puzzle",
        intro="A ribbon is as wide as the share of a layer's pieces that it carries. Pale ribbons are layers kept "
        "whole, empty frames are dropped layers. Point at a layer to see what it is made of.",
        blocks=[
            board,
            table(rows, text_columns=("stands for", "made of"), caption=f"All {least} layers", folded=True),
        ],
    )


def puzzle_data(recipes: Mapping[int, Recipe], pieces: Pieces, facts: LayerFacts) -> dict[str, Any]:
    """Return everything that the script shows, by depth."""
    least = min(recipes)
    return {
        "kv": pieces.n_kv_heads,
        "heads": pieces.heads_per_group,
        "channels": pieces.n_mlp_pieces,
        "mlp": pieces.mlp,
        "influence": [_digits(value) for value in facts.influence],
        "spans": {str(start): _digits(value) for start, value in facts.spans.items()},
        "depths": {
            str(layers): [_output(recipe, index, facts, healed=layers == least) for index in range(len(recipe.layers))]
            for layers, recipe in recipes.items()
        },
    }


def _output(recipe: Recipe, index: int, facts: LayerFacts, *, healed: bool) -> dict[str, Any]:
    variants = [variant.name for variant in recipe.variants]
    op = recipe.layers[index]
    parts = [_part(op, number, variants) for number in range(len(op.sources))]
    notes = list(_step_notes(recipe, index, facts.steps)) if len(op.sources) > 1 else []
    notes += [
        (f"fit of {fit['module']}", f"error {fit['error_before']:.3g} → {fit['error_after']:.3g}")
        for fit in (facts.fits.get(index, ()) if healed else ())
        if fit.get("ridge") is not None
    ]
    found: dict[str, Any] = {"span": list(recipe.spans[index]), "parts": parts}
    return {**found, "notes": notes} if notes else found


def _part(op: Op, number: int, variants: Sequence[str]) -> dict[str, Any]:
    ref = op.sources[number]
    found: dict[str, Any] = {"layer": ref.layer, "wood": wood(ref, variants)}
    if len(variants) > 1:
        found["variant"] = ref.variant
    if isinstance(op, Concat):
        cut = op.cuts[number]
        ranges = format_ranges(cut.channels)
        found |= {"kv": list(cut.kv_groups), "channels": len(cut.channels)}
        found |= {"ranges": ranges} if len(ranges) <= _LONGEST else {}
    if isinstance(op, Merge):
        found["weight"] = _digits(op.weights[number])
    return found


def _step_notes(recipe: Recipe, index: int, steps: Mapping[int, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Describe the step that made this layer: the last one that named its sources."""
    sources = {str(source) for source in recipe.layers[index].sources}
    made = {
        layers: step
        for layers, step in steps.items()
        if layers >= len(recipe.layers) and step.get("op") and set(step["op"]) == sources
    }
    if not made:
        return
    step, evidence = made[min(made)], made[min(made)].get("evidence") or {}
    yield "joined", f"in the step to {min(made)} layers"
    start = str(step["merged"][0])
    if start in (evidence.get("span_scores") or {}):
        yield "score of the span then", f"{evidence['span_scores'][start]:.4g}"
    if evidence.get("prior_ratios"):
        yield "ratio by block influence", _ratio(evidence["prior_ratios"])
    chosen = [entry for entry in evidence.get("grid") or () if _is_chosen(entry, step)]
    if chosen:
        yield "ratio by loss", _ratio(max(chosen, key=lambda entry: entry["sequences"])["ratios"])
    if step.get("loss") is not None:
        yield "calibration loss then", f"{step['loss']:.4g}"


def _is_chosen(entry: Mapping[str, Any], step: Mapping[str, Any]) -> bool:
    """Whether an entry of the grid is the one that was taken: its loss is the model's."""
    same_start = entry.get("start", step["merged"][0]) == step["merged"][0]
    loss = step.get("loss")
    return same_start and loss is not None and abs(entry["loss"] - loss) < 1e-9


def _ratio(shares: Sequence[float]) -> str:
    return " : ".join(f"{share:.2f}" for share in shares)


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
