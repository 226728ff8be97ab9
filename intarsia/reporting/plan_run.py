"""A run folder of `plan` as a part of a report."""

from __future__ import annotations

import math
from pathlib import Path

from intarsia.reporting.blocks import Code, Facts, Section, Subject, Tile
from intarsia.reporting.commands import plan_command
from intarsia.reporting.plan_evidence import evidence_sections
from intarsia.reporting.plan_folder import PlanRun, load_run, provenance_of
from intarsia.reporting.plan_ladder import ladders, steps_section
from intarsia.reporting.puzzle_section import picture_sections
from intarsia.reporting.scale import short
from intarsia.reporting.wording import duration, model_name, written


def read(path: Path) -> Subject:
    """The run as a subject of its own."""
    run = load_run(path)
    model, method = model_name(str(run.settings["model"])), str(run.settings["method"])
    text = str(run.calibration.get("text") or run.settings["calibration"])
    notes = []
    if not run.log:
        notes.append("This run is not finished: no step is done yet, so there is nothing to draw.")
    elif run.unfinished is not None:
        notes.append(f"This run is not finished: {run.unfinished}. What there is so far is shown.")
    return Subject(
        path=path,
        title=f"{model}, {method}",
        subtitle=f"A plan, calibrated on {run.settings['tokens']:,} tokens of {text}",
        base=(str(run.settings.get("sha256", "")), model),
        tiles=_tiles(run),
        notes=notes,
        sections=[*picture_sections(run), *evidence_sections(run), steps_section(run), origin_section(run)],
        ladders=ladders(run),
        texts={},
    )


def _tiles(run: PlanRun) -> list[Tile]:
    if not run.log:
        return []
    last = run.log[-1]
    depth = next(iter(run.recipes.values())).depth
    tiles = [Tile(name="layers", before=str(depth), now=str(last["layers"]))]
    if last.get("loss") is not None:
        tiles.append(Tile(name="calibration perplexity", now=short(math.exp(last["loss"]))))
    forwards = sum(step["layer_forwards"] for step in run.log)
    tiles.append(Tile(name="layer-forwards", now=short(forwards), change=f"{forwards / depth:.1f} passes of the model"))
    tiles.append(Tile(name="time", now=duration(sum(step["seconds"] for step in run.log))))
    return tiles


def origin_section(run: PlanRun) -> Section:
    """Settings, hashes, and the command that makes the same again."""
    settings = dict(run.settings)
    planner = settings.pop("planner", None) or {}
    settings.pop("config", None)  # the model's own, whole: the run folder has it
    pairs = [(name.replace("_", " "), written(value)) for name, value in settings.items() if value is not None]
    pairs += [(f"planner: {name.replace('_', ' ')}", written(value)) for name, value in planner.items()]
    if run.calibration.get("sha256"):
        pairs.append(("calibration tokens, sha256", str(run.calibration["sha256"])))
    if run.log:
        pairs.append(("last recipe, sha256", str(run.log[-1]["hash"])))
    for name, value in provenance_of(run).get("versions", {}).items():
        pairs.append((name, str(value)))
    target = int(run.log[-1]["layers"]) if run.log else None
    return Section(
        title="Where this comes from",
        blocks=[Code(text=plan_command(run.settings, run=run.path.name, layers=target)), Facts(pairs=pairs)],
    )
