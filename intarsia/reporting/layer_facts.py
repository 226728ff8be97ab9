"""What is told of a layer of the puzzle picture when it is pointed at, as data for the page's script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from intarsia.recipe.ops import Concat, Merge, Op
from intarsia.recipe.ranges import format_ranges
from intarsia.recipe.recipe import Recipe
from intarsia.reporting.picture import Pieces, wood

_LONGEST = 120  # characters of channel ranges that somebody still reads

Fits = Mapping[int, Sequence[Mapping[str, Any]]]
"""Rows of the closed form by output layer: `module`, `ridge`, `error_before`, `error_after`."""


def picture_data(
    recipes: Mapping[int, Recipe],
    pieces: Pieces,
    *,
    influence: Sequence[float] = (),
    spans: Mapping[int, float] | None = None,
    steps: Mapping[int, Mapping[str, Any]] | None = None,
    fits: Fits | None = None,
    fitted_depth: int | None = None,
) -> dict[str, Any]:
    """Everything that the script shows, by depth.

    Args:
        influence: block influence of every original layer, where it was measured.
        spans: span influence by first layer, of the first step.
        steps: a run's log by depth, to tell when and why layers were joined.
        fits: what the closed form did, at `fitted_depth`.
    """
    any_recipe = next(iter(recipes.values()))
    return {
        "kv": pieces.n_kv_heads,
        "heads": pieces.heads_per_group,
        "channels": pieces.n_channels,
        "mlp": pieces.mlp,
        "influence": [_digits(value) for value in influence],
        "spans": {str(start): _digits(value) for start, value in (spans or {}).items()},
        "variants": [variant.name for variant in any_recipe.variants],
        "depths": {
            str(layers): [
                _output(recipe, index, (fits or {}).get(index, ()) if layers == fitted_depth else (), steps or {})
                for index in range(len(recipe.layers))
            ]
            for layers, recipe in recipes.items()
        },
    }


def made_of(op: Op, mlp: str) -> str:
    """An op in one line; `mlp` is what the pieces of an MLP are called."""
    if isinstance(op, Concat):
        return " + ".join(
            f"{cut.source.layer} ({len(cut.kv_groups)} KV groups, {len(cut.channels)} {mlp})" for cut in op.cuts
        )
    if isinstance(op, Merge):
        return " + ".join(f"{weight:.3g} × {ref.layer}" for ref, weight in zip(op.sources, op.weights, strict=True))
    return f"{op.source.layer}, whole"


def _output(
    recipe: Recipe, index: int, fits: Sequence[Mapping[str, Any]], steps: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    op = recipe.layers[index]
    found: dict[str, Any] = {"span": list(recipe.spans[index]), "parts": _parts(op, recipe)}
    notes = [] if len(op.sources) < 2 else _joined(recipe, index, steps)
    notes += [
        [f"fit of {fit['module']}", f"error {fit['error_before']:.3g} → {fit['error_after']:.3g}"]
        for fit in fits
        if fit.get("ridge") is not None
    ]
    if notes:
        found["notes"] = notes
    return found


def _parts(op: Op, recipe: Recipe) -> list[dict[str, Any]]:
    variants = [variant.name for variant in recipe.variants]

    def part(number: int) -> dict[str, Any]:
        ref = op.sources[number]
        found: dict[str, Any] = {"layer": ref.layer, "wood": wood(ref.layer, ref.variant, variants)}
        if len(variants) > 1:
            found["variant"] = ref.variant
        if isinstance(op, Concat):
            cut = op.cuts[number]
            ranges = format_ranges(cut.channels)
            found |= {"kv": list(cut.kv_groups), "channels": len(cut.channels)}
            if len(ranges) <= _LONGEST:
                found["ranges"] = ranges
        if isinstance(op, Merge):
            found["weight"] = _digits(op.weights[number])
        return found

    return [part(number) for number in range(len(op.sources))]


def _joined(recipe: Recipe, index: int, steps: Mapping[int, Mapping[str, Any]]) -> list[list[str]]:
    """The step that made this layer what it is: the last one that named its sources."""
    sources = {str(source) for source in recipe.layers[index].sources}
    made = [
        (layers, step)
        for layers, step in steps.items()
        if layers >= len(recipe.layers) and step.get("op") and set(step["op"]) == sources
    ]
    if not made:
        return []
    layers, step = min(made, key=lambda entry: entry[0])
    evidence = step.get("evidence") or {}
    notes = [["joined", f"in the step to {layers} layers"]]
    start = str(step["merged"][0])
    if start in (evidence.get("span_scores") or {}):
        notes.append(["score of the span then", f"{evidence['span_scores'][start]:.4g}"])
    if evidence.get("prior_ratios"):
        notes.append(["ratio by block influence", " : ".join(f"{share:.2f}" for share in evidence["prior_ratios"])])
    chosen = [entry for entry in evidence.get("grid") or () if _is_chosen(entry, evidence, step)]
    if chosen:
        best = min(chosen, key=lambda entry: -entry["sequences"])
        notes.append(["ratio by loss", " : ".join(f"{share:.2f}" for share in best["ratios"])])
    if step.get("loss") is not None:
        notes.append(["calibration loss then", f"{step['loss']:.4g}"])
    return notes


def _is_chosen(entry: Mapping[str, Any], evidence: Mapping[str, Any], step: Mapping[str, Any]) -> bool:
    """Whether an entry of the grid is the one that was taken: its loss is the model's, on all sequences."""
    same_start = entry.get("start", step["merged"][0]) == step["merged"][0]
    loss = step.get("loss")
    return same_start and loss is not None and abs(entry["loss"] - loss) < 1e-9


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
