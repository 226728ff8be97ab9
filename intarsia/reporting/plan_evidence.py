"""What a plan has measured on the whole model, layer by layer, as a part of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from intarsia.planning.told import of_experts
from intarsia.reporting.blocks import Figure, Section
from intarsia.reporting.chart import Point, Series, chart
from intarsia.reporting.heat import heat_svg
from intarsia.reporting.plan_folder import PlanRun, provenance_of
from intarsia.reporting.scale import Axis

_SCORES = {
    "scores": "score of the method",
    "similarities": "similarity to the next layer",
    "losses": "calibration loss without the layer",
}


def evidence_sections(run: PlanRun) -> list[Section]:
    """What the layers of the whole model measured, by layer."""
    fate = _fate(run)
    figures: list[Any] = []
    influence = run.evidence.get("influence")
    if influence:
        figures.append(_by_layer(influence, "block influence", "How far each layer turns the residual stream.", fate))
    spans = run.evidence.get("span_scores")
    if spans:
        label = "loss when skipped" if run.evidence.get("span_choice") == "sleb" else "span influence"
        values = {int(start): value for start, value in spans.items()}
        ordered = [values.get(layer) for layer in range(max(values) + 1)]
        figures.append(_by_layer(ordered, label, "Of each layer and the next together: the least is joined first.", {}))
    for key, label in _SCORES.items():
        scores = run.evidence.get(key)
        if scores and run.settings["method"] != "reverse":
            figures.append(_by_layer(scores, label, "What the method decides on.", fate))
    if run.evidence.get("distances"):
        rows = run.evidence["distances"]
        svg = heat_svg(rows, title="distance over n layers", across="first layer of the block", of="n")
        figures.append(Figure(svg=svg, caption="Angle between the ends of every block of n layers; light is small."))
    figures += _sensitivity(run)
    if not figures:
        return []
    return [Section(title="What was measured", blocks=figures, intro="On the whole model, before the first step.")]


def _by_layer(values: Sequence[float | None], label: str, caption: str, fate: Mapping[int, str]) -> Figure:
    """Values by layer: a line, and points that tell what became of the layer."""
    known = [(layer, value) for layer, value in enumerate(values) if value is not None]
    log = all(value > 0 for _, value in known) and max(v for _, v in known) > 8 * min(v for _, v in known)
    line = Series(name="", points=[Point(x=x, y=y) for x, y in known], hue=7, dots=False, listed=False)
    kinds = [
        Series(
            name=name,
            hue=hue,
            line=False,
            sign="circle",
            points=[
                Point(x=x, y=y, title=f"layer {x}: {label} {y:.4g}") for x, y in known if fate.get(x, "kept") == name
            ],
        )
        for name, hue in (("kept", 7), ("joined", 0), ("dropped", 1))
    ]
    present = [each for each in kinds if each.points]
    svg = chart(
        [line, *present], x=Axis(label="layer", whole=True), y=Axis(label=label, log=log), title=f"{label} by layer"
    )
    return Figure(svg=svg, caption=caption)


def _fate(run: PlanRun) -> dict[int, str]:
    """What became of every original layer at the last depth."""
    if not run.recipes:
        return {}
    recipe = run.recipes[min(run.recipes)]
    fate = dict.fromkeys(range(recipe.depth), "dropped")
    for op in recipe.layers:
        for source in op.sources:
            fate[source.layer] = "kept" if len(op.sources) == 1 else "joined"
    return fate


def _sensitivity(run: PlanRun) -> list[Figure]:
    """Heat maps of piece scores, where the run has kept them."""
    kept = run.evidence.get("sensitivity") or {}
    mlp = "experts" if of_experts(provenance_of(run)) else "MLP channels"
    figures = []
    for key, across in (
        ("kv_groups", "KV groups, in order"),
        ("channels", f"{mlp}, from least to most sensitive"),
    ):
        rows = kept.get(key)
        if rows:
            svg = heat_svg(rows, title=f"sensitivity of {across}", across=across)
            figures.append(Figure(svg=svg, caption=f"Sensitivity of {across.split(',')[0]}; dark is sensitive."))
    return figures
