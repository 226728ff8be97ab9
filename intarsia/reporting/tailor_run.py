"""The run folder of a search over a family as a part of a report.

Costs are of the examples that the search saw; what was judged on others is told apart from them.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from intarsia.reporting.blocks import Code, Facts, Section, Subject, Tile
from intarsia.reporting.scale import short
from intarsia.reporting.tailor_folder import FAMILY, TailorRun, is_tailor_run, load
from intarsia.reporting.tailor_puzzle import puzzle_sections
from intarsia.reporting.tailor_sections import costs_of, front_sections, judged_sections, search_section
from intarsia.reporting.wording import model_name, written

__all__ = ["is_tailor_run", "read"]


def read(path: Path) -> Subject:
    """The search as a subject.

    Raises:
        UserError: it is damaged.
    """
    run = load(path)
    members = run.settings["members"]
    base = next(iter(members.values()))
    space, made = run.settings["space"], run.made
    names = " + ".join([model_name(base["model"]), *list(members)[1:]])
    return Subject(
        path=path,
        title=f"{names}, {space['depth']} → {space['target']} layers",
        subtitle=f"A search over a family: {len(made)} trials by {run.settings['engine']}, on up to "
        f"{max(run.settings['budgets'])} examples of each of {', '.join(run.objectives)}",
        base=(str(base.get("sha256") or ""), str(base["model"])),
        tiles=_tiles(run),
        notes=_notes(run),
        sections=[
            *front_sections(run),
            *judged_sections(run),
            *puzzle_sections(run),
            search_section(run),
            _origin(run),
        ],
    )


def _notes(run: TailorRun) -> list[str]:
    made = len(run.made)
    notes = []
    if made < run.wanted:
        notes.append(f"This search is not finished: {made} of {run.wanted} trials are made.")
    if run.front is None:
        notes.append("No trial has succeeded yet, so there is nothing to draw.")
    elif not run.front.top:
        notes.append(
            f"No trial at the greatest budget has succeeded yet: the front is of trials on {run.front.budget} examples."
        )
    failed = [trial for trial in run.trials if trial.status == "failed"]
    if failed:
        reasons = list(dict.fromkeys(str(trial.reason) for trial in failed))
        more = f" and {len(reasons) - 3} other reasons" if len(reasons) > 3 else ""
        notes.append(f"Trials that failed: {len(failed)} ({'; '.join(reasons[:3])}{more}). They count as no score.")
    return notes


def _tiles(run: TailorRun) -> list[Tile]:
    space = run.settings["space"]
    tiles = [
        Tile(name="layers", before=str(space["depth"]), now=str(space["target"])),
        Tile(name="trials", now=str(len(run.made)), change=f"of about 10^{space['log10_size']:.0f} candidates"),
    ]
    if run.front is None:
        return tiles
    knee = run.front.knee
    tiles.append(Tile(name="front", now=str(len(run.front.points)), change=f"trial {knee.number} is its knee"))
    for at, name in enumerate(run.objectives):
        best = costs_of(run.front.best(name))[at]
        base = run.base.get(name)
        tiles.append(
            Tile(
                name=f"{name}, best cost",
                before="" if base is None else short(base),
                now=short(best),
                change="" if not base else f"{best / base - 1.0:+.1%} against the uncut base",
            )
        )
    return tiles


def _origin(run: TailorRun) -> Section:
    """Commands, the family file, settings and hashes."""
    folder = run.path.resolve().name
    commands = [
        f"intarsia tailor {FAMILY} -o {shlex.quote(folder)} --trials {max(run.wanted, 1)}",
        f"intarsia build {shlex.quote(folder)} --knee -o OUT",
        *(f"intarsia build {shlex.quote(folder)} --best {shlex.quote(name)} -o OUT" for name in run.objectives),
    ]
    settings = run.settings
    pairs = [("space", f"{written(settings['space'])}"), ("budgets", written(settings["budgets"]))]
    pairs += [(name, written(settings[name])) for name in ("engine", "seed", "heal", "device", "dtype")]
    for name, member in settings["members"].items():
        pairs.append((f"member {name}", f"{member['model']}, sha256 {member.get('sha256') or 'not recorded'}"))
    for entry in settings["objectives"]:
        measure = entry.get("metric") or entry["kind"]
        pairs.append(
            (f"objective {entry['name']}", f"{measure} on {entry['source']}, examples' sha256 {entry['sha256']}")
        )
    pairs += [(name, str(value)) for name, value in settings.get("versions", {}).items()]
    code = [Code(text="\n".join(commands)), *([Code(text=run.family.rstrip())] if run.family else [])]
    return Section(title="Where this comes from", blocks=[*code, Facts(pairs=pairs)])
