"""The sections of a report about a search: its front, what was judged, and how it went."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from intarsia.reporting.blocks import Figure, Section, table
from intarsia.reporting.chart import Point, Rule, Series, chart
from intarsia.reporting.scale import Axis, short
from intarsia.reporting.tailor_folder import TailorRun
from intarsia.reporting.wording import duration
from intarsia.tailoring.history import Trial
from intarsia.tailoring.pareto import Front

_MOST_PAIRS = 6


def front_sections(run: TailorRun) -> list[Section]:
    """The Pareto front: objectives against each other, and a table."""
    if run.front is None:
        return []
    rows = []
    for trial in run.front.points:
        marks = [name for name in run.objectives if run.front.best(name) is trial]
        marks += ["knee"] * (trial is run.front.knee)
        costs = dict(zip(run.objectives, map(short, costs_of(trial)), strict=True))
        how = {"best in": ", ".join(marks), "engine": trial.engine, "came from": trial.origin}
        rows.append({"trial": str(trial.number), **costs, **how})
    blocks: list[Any] = []
    if len(run.objectives) == 1:
        rows = rows[:1]
    blocks += [_pair(run, run.front, *pair) for pair in list(combinations(range(len(run.objectives)), 2))[:_MOST_PAIRS]]
    blocks.append(table(rows, text_columns=("best in", "engine", "came from"), caption="The trials of the front"))
    return [
        Section(
            title="The Pareto front",
            blocks=blocks,
            intro=f"Costs on {run.front.budget} examples of each objective; less is better. No other trial beats one "
            "of the front in everything. The knee is the best for equal weights, and what the search builds.",
        )
    ]


def _pair(run: TailorRun, front: Front, first: int, second: int) -> Figure:
    """Two objectives against each other."""
    across, up = run.objectives[first], run.objectives[second]

    def point(trial: Trial) -> Point:
        costs = costs_of(trial)
        told = ", ".join(f"{name} {short(cost)}" for name, cost in zip(run.objectives, costs, strict=True))
        return Point(x=costs[first], y=costs[second], title=f"trial {trial.number}: {told}")

    others = [t for t in run.trials if t.costs is not None and t.budget == front.budget and t not in front.points]
    beyond = max(max(costs_of(trial)[at] for trial in front.points) for at in (first, second))
    # Trials that are far off would press the front into a corner.
    near = [trial for trial in others if all(costs_of(trial)[at] <= 2.0 * beyond for at in (first, second))]
    kept = [trial for trial in front.points if trial is not front.knee]
    series = [
        Series(name="other trials", points=[point(t) for t in near], hue=7, line=False, dashed=True, sign="circle"),
        Series(name="front", points=[point(t) for t in kept], hue=0, line=False, sign="circle"),
        Series(name="knee", points=[point(front.knee)], hue=1, line=False, sign="diamond"),
    ]
    if across in run.base and up in run.base:
        whole = Point(x=run.base[across], y=run.base[up], title="the uncut base")
        series.append(Series(name="uncut base", points=[whole], hue=2, line=False, sign="square"))
    left_out = len(others) - len(near)
    more = f" Far outside and not drawn: {left_out}." if left_out else ""
    svg = chart(series, x=Axis(label=across), y=Axis(label=up), title=f"{up} against {across}")
    return Figure(svg=svg, caption=f"{up} against {across}, at {front.budget} examples.{more}")


def judged_sections(run: TailorRun) -> list[Section]:
    """What the incumbent is on items that the search never saw."""
    if run.judged is None:
        return []
    rows = []
    for row in run.judged["rows"]:
        cells = {"model": str(row["model"]), "layers": str(row["layers"])}
        for name in run.objectives:
            if name in row:
                cells[name] = _measure(row[name])
        for name, value in (row.get("accuracy") or {}).items():
            cells[f"{name}, accuracy"] = _measure(value, share=True)
        if row.get("mean_kept") is not None:
            cells["accuracy kept"] = f"{row['mean_kept']:.1%}"
        rows.append(cells)
    counts = ", ".join(f"{count} of {name}" for name, count in run.judged["examples"].items())
    without = run.judged.get("without") or []
    said = f" The search saw all there is of {', '.join(without)}." if without else ""
    intro = f"On examples that the search never saw ({counts}); ± one standard error.{said}"
    return [Section(title="On unseen items", blocks=[table(rows, text_columns=("model",))], intro=intro)]


def _measure(value: Mapping[str, Any], *, share: bool = False) -> str:
    error = value.get("stderr")
    if share:
        return f"{value['value']:.1%}" + ("" if error is None else f" ± {error:.1%}")
    return f"{value['value']:.4g}" + ("" if error is None else f" ± {error:.2g}")


def search_section(run: TailorRun) -> Section:
    """Trials by engine and budget, and the best of them so far against trials."""
    blocks: list[Any] = [] if run.front is None else [_course(run, run.front)]
    groups: dict[tuple[str, int], list[Trial]] = {}
    for trial in run.trials:
        groups.setdefault((trial.engine, trial.budget), []).append(trial)
    rows = [
        {
            "engine": engine,
            "examples": str(budget),
            "trials": str(len(found)),
            "failed": str(sum(trial.status == "failed" for trial in found)),
            "layer-forwards a trial": short(sum(t.layer_forwards for t in found) / len(found)),
            "time a trial": duration(sum(trial.seconds for trial in found) / len(found)),
        }
        for (engine, budget), found in sorted(groups.items())
    ]
    if rows:
        blocks.append(table(rows, text_columns=("engine",), caption="Trials by engine and budget"))
    return Section(title="The search", blocks=blocks)


def _course(run: TailorRun, front: Front) -> Figure:
    """The best of each objective so far, against trials."""
    series = []
    relative = all(run.base.get(name) for name in run.objectives)
    for at, name in enumerate(run.objectives):
        points, best = [], float("inf")
        for count, trial in enumerate(run.made, start=1):
            if trial.costs is not None and trial.budget == front.budget:
                best = min(best, trial.costs[at])
            if best < float("inf"):
                value = best / run.base[name] if relative else best
                points.append(Point(x=count, y=value, title=f"{name}, after {count} trials: {best:.4g}"))
        series.append(Series(name=name, points=points, hue=at, dots=False))
    label = "least cost / the uncut base's" if relative else "least cost so far"
    rules = [Rule(y=1.0, name="uncut base")] if relative else []
    svg = chart(series, x=Axis(label="trials", whole=True), y=Axis(label=label), title="The course of it", rules=rules)
    return Figure(svg=svg, caption=f"The best of each objective so far, among trials at {front.budget} examples.")


def costs_of(trial: Trial) -> tuple[float, ...]:
    """The costs of a trial that succeeded."""
    assert trial.costs is not None
    return trial.costs
