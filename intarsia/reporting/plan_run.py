"""A run folder of `plan` as a part of a report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from intarsia.planning.run_folder import RunFolder
from intarsia.recipe import codec
from intarsia.recipe.recipe import Recipe
from intarsia.reporting.blocks import (
    Code,
    Facts,
    Figure,
    Ladder,
    Picture,
    Pictures,
    Section,
    Subject,
    Tile,
    table,
)
from intarsia.reporting.chart import Point, Series, chart
from intarsia.reporting.commands import plan_command
from intarsia.reporting.heat import heat_svg
from intarsia.reporting.layer_facts import made_of, picture_data
from intarsia.reporting.picture import Pieces, picture_svg, pieces_of
from intarsia.reporting.scale import Axis, layers_axis, short

_SCORES = {
    "scores": "score of the method",
    "similarities": "similarity to the next layer",
    "losses": "calibration loss without the layer",
}


_SPANS = {"sleb": "loss when skipped", "reconstruction": "error when joined"}


@dataclass(frozen=True, kw_only=True)
class PlanRun:
    """What a run folder holds. `recipes` are by depth, the greatest first."""

    path: Path
    settings: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    calibration: Mapping[str, Any]
    recipes: Mapping[int, Recipe]

    @property
    def steps(self) -> dict[int, Mapping[str, Any]]:
        """The log by depth."""
        return {int(step["layers"]): step for step in self.log}

    @property
    def evidence(self) -> Mapping[str, Any]:
        """What the first step was decided on: the whole model's measures."""
        return self.log[0]["evidence"] if self.log else {}


def is_plan_run(path: Path) -> bool:
    """Whether a folder is the run of a plan (that of healing has other settings)."""
    try:
        settings = RunFolder(path).settings()
    except (OSError, ValueError):
        return False
    return "method" in settings and "calibration" in settings


def load_run(path: Path) -> PlanRun:
    """Everything that the folder of a plan holds so far.

    Raises:
        UserError: a file of it is damaged.
    """
    run = RunFolder.existing(path)
    log = run.log()
    pinned = path / "calibration.json"
    return PlanRun(
        path=path,
        settings=run.settings(),
        log=log,
        calibration=json.loads(pinned.read_text(encoding="utf-8")) if pinned.is_file() else {},
        recipes={int(step["layers"]): _bare(codec.load(run.recipe_path(int(step["layers"])))) for step in log},
    )


def _bare(recipe: Recipe) -> Recipe:
    """Without fitted tensors, of which a ladder of a large model has more than memory holds."""
    return replace(recipe, fitted={})


def read(path: Path) -> Subject:
    """The run as a subject of its own."""
    run = load_run(path)
    model, method = str(run.settings["model"]), str(run.settings["method"])
    text = str(run.calibration.get("text") or run.settings["calibration"])
    notes = []
    if not run.log:
        notes.append("This run is not finished: no step is done yet, so there is nothing to draw.")
    elif run.settings.get("target") and run.log[-1]["layers"] > run.settings["target"]:
        notes.append(
            f"This run is not finished: it has come to {run.log[-1]['layers']} of {run.settings['target']} layers. "
            "What there is so far is shown."
        )
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
            "made of": made_of(op),
        }
        for index, (op, (first, stop)) in enumerate(zip(recipe.layers, recipe.spans, strict=True))
    ]
    pictures = [Picture(layers=layers, svg=picture_svg(each, pieces)) for layers, each in recipes.items()]
    return Section(
        title="The puzzle",
        intro="A ribbon is as wide as the share of a layer's pieces that it carries. Point at a layer to see its heads "
        "and channels; pale ribbons are layers kept whole, empty frames are layers that were dropped.",
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


def evidence_sections(run: PlanRun) -> list[Section]:
    """What the layers of the whole model measured, by layer."""
    fate = _fate(run)
    figures: list[Any] = []
    influence = run.evidence.get("influence")
    if influence:
        figures.append(_by_layer(influence, "block influence", "How far each layer turns the residual stream.", fate))
    spans = run.evidence.get("span_scores")
    if spans:
        label = _SPANS.get(str(run.evidence.get("span_choice")), "span influence")
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
    figures = []
    for key, across in (
        ("kv_groups", "KV groups, in order"),
        ("channels", "MLP channels, from least to most sensitive"),
    ):
        rows = kept.get(key)
        if rows:
            svg = heat_svg(rows, title=f"sensitivity of {across}", across=across)
            figures.append(Figure(svg=svg, caption=f"Sensitivity of {across.split(',')[0]}; dark is sensitive."))
    return figures


def steps_section(run: PlanRun) -> Section:
    """The ladder: a figure and a table."""
    blocks: list[Any] = [ladder_figure([ladder]) for ladder in ladders(run)]
    rows = [
        {
            "layers": str(step["layers"]),
            "at": str(step["merged"][0]),
            "what": "dropped" if step["op"] is None else _short(step["op"]),
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


def origin_section(run: PlanRun) -> Section:
    """Settings, hashes, and the command that makes the same again."""
    settings = dict(run.settings)
    planner = settings.pop("planner", None) or {}
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


def provenance_of(run: PlanRun) -> Mapping[str, Any]:
    """How the recipes of the run came to be."""
    return next(iter(run.recipes.values())).provenance if run.recipes else {}


def written(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {written(part)}" for name, part in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(written(part) for part in value)
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def duration(seconds: float) -> str:
    """A time in the two largest units that it has."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _short(op: Mapping[str, Any]) -> str:
    if list(op.values()) == ["whole"]:
        return f"only {next(iter(op)).partition(':')[2]} stays, whole"
    return "joined from " + " + ".join(
        f"{name.partition(':')[2] or name}"
        + (f" ({part['kv_groups']} groups, {part['channels']} channels)" if isinstance(part, Mapping) else f" ({part})")
        for name, part in op.items()
    )
