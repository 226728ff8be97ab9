"""The report's part about a search over a family: front, final scores, puzzle, trials.

Costs are on the examples of the search; final scores are on unseen ones.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from intarsia.errors import few
from intarsia.recipe.recipe import Recipe, Variant
from intarsia.reporting.blocks import Block, Figure, Origin, Section, Subject, Table, Tile
from intarsia.reporting.figures import Axis, Point, Series, chart
from intarsia.reporting.puzzle import pieces_of, puzzle_section, puzzle_svg, sources_in_words
from intarsia.reporting.wording import change, model_name, pairs_of, short, text_of
from intarsia.tailoring.run import FAMILY, Front, TailorRun, Trial

_MOST_PAIRS, _MOST_PICTURES = 6, 4


def read(path: Path) -> Subject:
    """Read the folder of a search as a subject.

    Raises:
        UserError: it is damaged.
    """
    run = TailorRun(path)
    members, space = run.settings["members"], run.settings["space"]
    base = next(iter(members.values()))
    names = [model_name(base["model"]), *list(members)[1:]]
    return Subject(
        title=f"{' + '.join(names)}, {space['depth']} → {space['target']} layers",
        subtitle=f"A search over a family: {len(run.made)} trials by {run.settings['engine']}, on up to "
        f"{max(run.settings['budgets'])} examples of each of {', '.join(run.objectives)}",
        base=(str(base.get("sha256") or ""), str(base["model"])),
        tiles=_tiles(run),
        notes=_notes(run),
        sections=[_front(run), _final(run), *_puzzle(run), _search(run), _origin(run)],
    )


def _notes(run: TailorRun) -> list[str]:
    made = len(run.made)
    notes = []
    if made < run.wanted:
        notes.append(f"This search is not finished: {made} of {run.wanted} trials are done.")
    if run.front is None:
        notes.append("No trial has succeeded yet, so there is nothing to draw.")
    elif not run.front.top:
        examples = f"{run.front.budget} examples"
        notes.append(f"No trial at the greatest budget has succeeded yet; the front shows trials on {examples}.")
    if failed := [str(trial.reason) for trial in run.trials if trial.status == "failed"]:
        reasons = few(list(dict.fromkeys(failed)), 3, between="; ")
        notes.append(f"Failed trials, without a cost: {len(failed)} ({reasons}).")
    return notes


def _tiles(run: TailorRun) -> list[Tile]:
    space = run.settings["space"]
    tiles = [
        Tile(name="layers", before=str(space["depth"]), now=str(space["target"])),
        Tile(name="trials", now=str(len(run.made)), change=f"of about 10^{space['log10_size']:.0f} candidates"),
    ]
    if run.front is None:
        return tiles
    knee = f"trial {run.front.knee.number} is the knee"
    tiles.append(Tile(name="trials of the front", now=str(len(run.front.points)), change=knee))
    for at, name in enumerate(run.objectives):
        best, base = _costs(run.front.best(name))[at], run.base.get(name)
        moved = f"{change(base, best)} against the base model" if base else ""
        before = "" if base is None else short(base)
        tiles.append(Tile(name=f"{name}, least cost", before=before, now=short(best), change=moved))
    return tiles


def _front(run: TailorRun) -> Section:
    """The Pareto front: objectives against each other, and a table."""
    front, title = run.front, "The Pareto front"
    if front is None:
        return Section(title=title, blocks=[])
    pairs = list(combinations(range(len(run.objectives)), 2))[:_MOST_PAIRS]
    # With one objective, all trials of the front are equally good.
    rows = [
        {
            "trial": str(row["trial"]),
            **{name: short(row[name]) for name in run.objectives},
            "best in": row["best"],
            "engine": row["engine"],
            "origin": row["origin"],
        }
        for row in (front.rows() if pairs else front.rows()[:1])
    ]
    table = Table(rows=rows, words=("best in", "engine", "origin"), caption="The trials of the front")
    intro = (
        f"Costs on {front.budget} examples of each objective; lower is better. No trial is better than one of the "
        "front in every objective. The knee is the best under equal weights; the search builds it."
    )
    return Section(title=title, blocks=[*(_pair(run, front, *pair) for pair in pairs), table], intro=intro)


def _pair(run: TailorRun, front: Front, first: int, second: int) -> Figure:
    """Two objectives against each other."""
    across, up = run.objectives[first], run.objectives[second]

    def point(trial: Trial) -> Point:
        costs = _costs(trial)
        values = ", ".join(f"{name} {short(cost)}" for name, cost in zip(run.objectives, costs, strict=True))
        return Point(x=costs[first], y=costs[second], title=f"trial {trial.number}: {values}")

    others = [t for t in run.trials if t.costs is not None and t.budget == front.budget and t not in front.points]
    # Distant trials would squeeze the front into a corner.
    far = 2.0 * max(max(_costs(trial)[at] for trial in front.points) for at in (first, second))
    near = [trial for trial in others if all(_costs(trial)[at] <= far for at in (first, second))]
    kept = [trial for trial in front.points if trial is not front.knee]
    series = [
        Series(name="other trials", points=[point(t) for t in near], hue=11, line=False, dashed=True, marker="o"),
        Series(name="front", points=[point(t) for t in kept], hue=0, line=False, marker="o"),
        Series(name="knee", points=[point(front.knee)], hue=1, line=False, marker="D"),
    ]
    if across in run.base and up in run.base:
        base = Point(x=run.base[across], y=run.base[up], title="the base model")
        series.append(Series(name="base model", points=[base], hue=2, line=False, marker="s"))
    omitted = f" Outside the chart: {len(others) - len(near)} trials." if len(others) > len(near) else ""
    svg = chart(series, x=Axis(label=across), y=Axis(label=up), title=f"{up} against {across}")
    return Figure(svg=svg, caption=f"{up} against {across}, at {front.budget} examples.{omitted}")


def _final(run: TailorRun) -> Section:
    """The final scores on unseen examples."""
    final, title = run.final, "Final scores"
    if final is None:
        return Section(title=title, blocks=[])
    rows = []
    for row in final["rows"]:
        cells = {"model": str(row["model"]), "layers": str(row["layers"])}
        cells |= {name: _measure(row[name]) for name in run.objectives if name in row}
        accuracies = row.get("accuracy") or {}
        cells |= {f"{name}, accuracy": _measure(value, percent=True) for name, value in accuracies.items()}
        if row.get("mean_kept") is not None:
            cells["accuracy kept"] = f"{row['mean_kept']:.1%}"
        rows.append(cells)
    counts = ", ".join(f"{count} of {name}" for name, count in final["examples"].items())
    without = final.get("without") or []
    more = f" There are no unseen examples of {', '.join(without)}." if without else ""
    intro = f"On examples unseen by the search ({counts}); ± one standard error.{more}"
    return Section(title=title, blocks=[Table(rows=rows, words=("model",))], intro=intro)


def _measure(value: Mapping[str, Any], *, percent: bool = False) -> str:
    error, (digits, few_digits) = value.get("stderr"), (".1%", ".1%") if percent else (".4g", ".2g")
    return f"{value['value']:{digits}}" + ("" if error is None else f" ± {error:{few_digits}}")


def _puzzle(run: TailorRun) -> list[Section]:
    """The interactive picture of the knee, and those of the best trial in each objective."""
    recipe = None if run.front is None else _of_all(run, run.front.knee)
    if run.front is None or recipe is None:
        return []
    healed = (
        f" The output projections of {len(recipe.fitted)} layers were healed in closed form." if recipe.fitted else ""
    )
    summary = f"Trial {run.front.knee.number}, the knee of the front. {sources_in_words(recipe)}{healed}"
    section = puzzle_section({len(recipe.layers): recipe}, pieces_of(recipe), summary=summary)
    figures = []
    for objective in run.objectives[:_MOST_PICTURES]:
        best = run.front.best(objective)
        other = None if best is run.front.knee else _of_all(run, best)
        if other is not None:
            caption = f"Trial {best.number}, the best in {objective}. {sources_in_words(other)}"
            figures.append(Figure(svg=puzzle_svg(other, pieces_of(other)), caption=caption))
    return [replace(section, blocks=[*section.blocks, *figures])]


def _of_all(run: TailorRun, trial: Trial) -> Recipe | None:
    """A trial's recipe with all members of the family, so that a member has the same colour in all pictures."""
    recipe, members = run.recipe(trial), run.settings["members"].items()
    variants = tuple(Variant(name=name, model=str(member["model"])) for name, member in members)
    return None if recipe is None else replace(recipe, variants=variants)


def _search(run: TailorRun) -> Section:
    """Trials by engine and budget, and the least costs so far."""
    blocks: list[Block] = [] if run.front is None else [_progress(run, run.front)]
    groups: dict[tuple[str, int], list[Trial]] = {}
    for trial in run.trials:
        groups.setdefault((trial.engine, trial.budget), []).append(trial)
    rows = [
        {
            "engine": engine,
            "examples": str(budget),
            "trials": str(len(found)),
            "failed": str(sum(trial.status == "failed" for trial in found)),
            "layer-forwards per trial": short(sum(t.layer_forwards for t in found) / len(found)),
            "time per trial": text_of("seconds", sum(trial.seconds for trial in found) / len(found)),
        }
        for (engine, budget), found in sorted(groups.items())
    ]
    if rows:
        blocks.append(Table(rows=rows, words=("engine",), caption="Trials by engine and budget"))
    return Section(title="The search", blocks=blocks)


def _progress(run: TailorRun, front: Front) -> Figure:
    """The least cost of each objective so far, against trials."""
    series = []
    relative = all(run.base.get(name) for name in run.objectives)
    for at, name in enumerate(run.objectives):
        points, best = [], float("inf")
        for count, trial in enumerate(run.made, start=1):
            if trial.costs is not None and trial.budget == front.budget:
                best = min(best, trial.costs[at])
            if best < float("inf"):
                points.append(Point(x=count, y=best / run.base[name] if relative else best))
        series.append(Series(name=name, points=points, hue=at, dots=False))
    label = "least cost / base model's" if relative else "least cost"
    rules = [(1.0, "base model")] if relative else []
    svg = chart(series, x=Axis(label="trials", whole=True), y=Axis(label=label), title="least cost so far", rules=rules)
    return Figure(svg=svg, caption=f"The least cost of each objective so far, among trials at {front.budget} examples.")


def _origin(run: TailorRun) -> Section:
    """Commands, the family file, settings and hashes."""
    folder, settings = shlex.quote(run.path.resolve().name), run.settings
    commands = [
        f"intarsia tailor {FAMILY} -o {folder} --trials {max(run.wanted, 1)}",
        f"intarsia build {folder} --knee -o OUT",
        *(f"intarsia build {folder} --best {shlex.quote(name)} -o OUT" for name in run.objectives),
    ]
    facts = pairs_of(
        {name: settings[name] for name in ("space", "budgets", "engine", "seed", "heal", "device", "dtype")}
    )
    for name, member in settings["members"].items():
        facts.append((f"member {name}", f"{member['model']}, sha256 {member.get('sha256') or 'not recorded'}"))
    for entry in settings["objectives"]:
        measure = entry.get("metric") or entry["kind"]
        examples = f"{measure} on {entry['source']}, examples' sha256 {entry['sha256']}"
        facts.append((f"objective {entry['name']}", examples))
    facts += pairs_of(settings.get("versions", {}))
    texts = ["\n".join(commands), *([run.family.rstrip()] if run.family else [])]
    return Section(title="How to reproduce it", blocks=[Origin(commands=texts, facts=facts)])


def _costs(trial: Trial) -> tuple[float, ...]:
    """The costs of a successful trial."""
    assert trial.costs is not None
    return trial.costs
