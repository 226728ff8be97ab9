"""What a built model gained and lost as a part of a report: before and after, and how it was healed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from intarsia.reporting.blocks import Figure, Section, table
from intarsia.reporting.chart import Point, Series, chart
from intarsia.reporting.scale import Axis
from intarsia.reporting.wording import change, measure


def quality_sections(facts: Mapping[str, Any]) -> list[Section]:
    """Before and after, as a table."""
    before, after = facts.get("before"), facts.get("after")
    if not before or not after:
        return []
    rows = []
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        if old is None and new is None:
            continue
        rows.append(
            {
                "": key.replace("_per_s", ", tokens/s").replace("_", " "),
                "before": measure(key, old),
                "after": measure(key, new),
                "change": change(old, new),
            }
        )
    evaluation = facts.get("evaluation") or {}
    intro = ""
    if evaluation.get("text"):
        intro = (
            f"Perplexity on {evaluation['text']}: {evaluation.get('windows')} windows of {evaluation.get('seq_len')}"
        )
        intro += " tokens, ± one standard error. Speeds of both models were measured in turns."
    return [Section(title="Before and after", blocks=[table(rows, text_columns=("",))], intro=intro)]


def healing_section(heal: Mapping[str, Any]) -> Section | None:
    """How the cut model was repaired: the stages, and the fit of every read-out."""
    stages = heal.get("stages") or []
    if len(stages) < 2:
        return None
    rows = [
        {name.replace("_", " "): "" if value is None else measure(name, value) for name, value in stage.items()}
        for stage in stages
    ]
    blocks: list[Any] = [table(rows, text_columns=("stage", "taken"))]
    fits = [row for row in heal.get("read_outs") or [] if row.get("ridge") is not None]
    if fits:
        blocks.append(_fit_figure(fits))
    text = heal.get("text") or {}
    intro = f"On {text.get('tokens', 0):,} tokens of {text.get('description', 'text')}." if text else ""
    return Section(title="Healing", blocks=blocks, intro=intro)


def _fit_figure(fits: Sequence[Mapping[str, Any]]) -> Figure:
    """Held-out error of every fitted read-out, before and after its fit."""
    modules = list(dict.fromkeys(str(fit["module"]) for fit in fits))
    series = [
        Series(
            name=f"{module}, {when}",
            points=[
                Point(x=fit["layer"], y=fit[key], title=f"layer {fit['layer']} {module} {when}: {fit[key]:.4g}")
                for fit in fits
                if fit["module"] == module
            ],
            hue=number,
            dashed=key == "error_before",
            line=False,
        )
        for number, module in enumerate(modules)
        for key, when in (("error_before", "before"), ("error_after", "after"))
    ]
    svg = chart(
        series, x=Axis(label="output layer", whole=True), y=Axis(label="relative error", zero=True), title="fit error"
    )
    return Figure(svg=svg, caption="Error of the hidden state on held-out tokens, before and after each fit.")
