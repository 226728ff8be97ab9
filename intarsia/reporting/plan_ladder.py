"""The ladder of a plan as a part of a report: figure and table of its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from intarsia.planning.told import mlp_pieces, of_experts
from intarsia.reporting.blocks import Figure, Ladder, Section, table
from intarsia.reporting.chart import Point, Series, chart
from intarsia.reporting.plan_folder import PlanRun, provenance_of
from intarsia.reporting.scale import Axis, layers_axis, short
from intarsia.reporting.wording import duration


def ladders(run: PlanRun) -> list[Ladder]:
    """The calibration loss by depth, where the method measures it."""
    points = [(int(step["layers"]), math.exp(step["loss"])) for step in run.log if step.get("loss") is not None]
    if not points:
        return []
    key = f"{run.calibration.get('sha256')}"
    return [
        Ladder(
            name=str(run.settings["method"]),
            measure="perplexity of the calibration text",
            text=str(run.calibration.get("text") or run.settings["calibration"]),
            text_key=key,
            points=points,
        )
    ]


def steps_section(run: PlanRun) -> Section:
    """The ladder: a figure and a table."""
    blocks: list[Any] = [ladder_figure([ladder]) for ladder in ladders(run)]
    mlp = mlp_pieces(of_experts(provenance_of(run)))
    rows = [
        {
            "layers": str(step["layers"]),
            "at": str(step["merged"][0]),
            "what": _what(step, mlp),
            "loss": "" if step.get("loss") is None else f"{step['loss']:.4f}",
            "layer-forwards": short(step["layer_forwards"]),
            "time": duration(step["seconds"]),
            "recipe": str(step["hash"])[:12],
        }
        for step in run.log
    ]
    if rows:
        blocks.append(table(rows, text_columns=("what", "recipe"), caption="Step by step", folded=len(rows) > 12))
    return Section(title="The ladder", blocks=blocks, intro="Every depth can be built from this run at any later time.")


def _what(step: Mapping[str, Any], mlp: str) -> str:
    block = step["evidence"].get("block")
    if block is not None:
        return f"{block[0]} to {block[1] - 1} dropped from the original, instead of what was done so far"
    return "dropped" if step["op"] is None else _short(step["op"], mlp)


def ladder_figure(found: Sequence[Ladder]) -> Figure:
    """Ladders on one text in one chart."""
    names = [ladder.name for ladder in found]
    series = [
        Series(
            name=ladder.name,
            points=[Point(x=x, y=y, title=f"{ladder.name}, {x} layers: {y:.4g}") for x, y in ladder.points],
            hue=names.index(ladder.name),
        )
        for ladder in found
    ]
    svg = chart(
        series,
        x=layers_axis(x for ladder in found for x, _ in ladder.points),
        y=Axis(label=found[0].measure, log=True),
        title=f"{found[0].measure} by depth",
    )
    return Figure(svg=svg, caption=f"On {found[0].text}.")


def _short(op: Mapping[str, Any], mlp: str) -> str:
    if list(op.values()) == ["whole"]:
        return f"only {next(iter(op)).partition(':')[2]} stays, whole"
    return "joined from " + " + ".join(
        f"{name.partition(':')[2] or name}"
        + (f" ({part['kv_groups']} groups, {part['channels']} {mlp})" if isinstance(part, Mapping) else f" ({part})")
        for name, part in op.items()
    )
