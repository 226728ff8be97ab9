"""The report's part about a plan: the puzzle at every depth, the scores of the layers, the ladder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from intarsia.pruning.ladder import Ladder
from intarsia.pruning.step import mlp_pieces, of_experts, step_words
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe
from intarsia.reporting.blocks import Block, Figure, Measured, Origin, Section, Subject, Table, Tile
from intarsia.reporting.figures import Axis, Point, Series, chart, heat, layers_axis
from intarsia.reporting.puzzle import pieces_of, puzzle_section
from intarsia.reporting.wording import model_name, pairs_of, run_command, short, text_name, text_of

_SCORES = {
    "scores": "score of the method",
    "similarities": "similarity to the next layer",
    "losses": "calibration loss without the layer",
}
_LONG_TABLE = 12
_BROKEN = 100.0  # times the least perplexity of a chart; larger values are cut off


@dataclass(frozen=True, kw_only=True)
class PlanRun:
    """The content of a plan's run folder."""

    settings: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    # The recorded facts of the calibration text.
    calibration: Mapping[str, Any]
    # Recipes by depth, deepest first, without fitted tensors.
    recipes: Mapping[int, Recipe]
    # The progress of an unfinished plan; None if it is finished.
    unfinished: str | None = None

    @property
    def evidence(self) -> Mapping[str, Any]:
        """Scores of the whole model, from the first step."""
        return self.log[0]["evidence"] if self.log else {}

    @property
    def provenance(self) -> Mapping[str, Any]:
        """How the recipes were made."""
        return next(iter(self.recipes.values())).provenance if self.recipes else {}

    @property
    def text(self) -> str:
        """The calibration text in words."""
        return text_name(str(self.calibration.get("text") or self.settings["calibration"]))


def is_plan_run(path: Path) -> bool:
    """Whether a folder is the run folder of a plan (that of `heal` has other settings)."""
    try:
        settings = Ladder(path).settings()
    except (OSError, ValueError):
        return False
    return "method" in settings and "calibration" in settings


def load_run(path: Path) -> PlanRun:
    """Read the run folder of a plan, finished or not.

    Raises:
        UserError: a file of it is damaged.
    """
    run = Ladder.existing(path)
    log = run.log()
    recipes = {int(step["layers"]): schema.load(run.recipe_path(int(step["layers"]))) for step in log}
    return PlanRun(
        settings=run.settings(),
        log=log,
        calibration=run.run.pinned("calibration") if (path / "calibration.json").is_file() else {},
        recipes={layers: replace(recipe, fitted={}) for layers, recipe in recipes.items()},
        unfinished=run.unfinished(),
    )


def read(path: Path) -> Subject:
    """Read a run folder as a subject.

    Raises:
        UserError: it is damaged.
    """
    run = load_run(path)
    model, method, tokens = model_name(str(run.settings["model"])), run.settings["method"], run.settings["tokens"]
    notes = []
    if not run.log:
        notes.append("This run is not finished: no step is done yet, so there is nothing to draw.")
    elif run.unfinished is not None:
        notes.append(f"This run is not finished: {run.unfinished}. The report shows the steps so far.")
    return Subject(
        title=f"{model}, {method}",
        subtitle=f"A plan, calibrated on {run.text if 'tokens' in run.text else f'{tokens:,} tokens of {run.text}'}",
        base=(str(run.settings.get("sha256", "")), model),
        tiles=_tiles(run),
        notes=notes,
        sections=[*puzzle_sections(run), score_section(run), steps_section(run), _origin(run, path.name)],
        ladders=ladders(run),
    )


def puzzle_sections(run: PlanRun) -> list[Section]:
    """The puzzle picture of every depth."""
    if not run.recipes:
        return []
    return [puzzle_section(run.recipes, pieces_of(*run.recipes.values()), run.log)]


def score_section(run: PlanRun) -> Section:
    """The scores of the original layers and of their pieces."""
    evidence, fate = run.evidence, _fate(run)
    figures: list[Block] = []
    if evidence.get("influence"):
        caption = "The angle by which each layer turns the residual stream."
        figures.append(_by_layer(evidence["influence"], "block influence", caption, fate))
    if evidence.get("span_scores"):
        label = "loss when skipped" if evidence.get("span_choice") == "sleb" else "span influence"
        values = {int(start): value for start, value in evidence["span_scores"].items()}
        caption = "For each layer and the next together; the spans of least influence are merged first."
        figures.append(_by_layer([values.get(layer) for layer in range(max(values) + 1)], label, caption, {}))
    for key, label in _SCORES.items():
        if evidence.get(key) and run.settings["method"] != "reverse":
            figures.append(_by_layer(evidence[key], label, "The score that decides which layers are dropped.", fate))
    if evidence.get("distances"):
        svg = heat(evidence["distances"], title="distance over n layers", across="first layer of the block", down="n")
        caption = "Angle between input and output of every block of n layers; paler means smaller."
        figures.append(Figure(svg=svg, caption=caption))
    mlp = "experts" if of_experts(run.provenance) else "MLP channels"
    for key, name, order in (("kv_groups", "KV groups", "in order"), ("channels", mlp, "from least to most sensitive")):
        if rows := (evidence.get("sensitivity") or {}).get(key):
            svg = heat(rows, title=f"sensitivity of {name}", across=f"{name}, {order}")
            caption = f"Sensitivity of {name}; stronger colour means more sensitive."
            figures.append(Figure(svg=svg, caption=caption))
    intro = "Measured on the whole model, before the first step."
    return Section(title="Scores of the original layers", blocks=figures, intro=intro)


def _by_layer(values: Sequence[float | None], label: str, caption: str, fate: Mapping[int, str]) -> Figure:
    """Values by layer: a line, with points that show the fate of each layer."""
    known = [(layer, value) for layer, value in enumerate(values) if value is not None]
    log = all(value > 0 for _, value in known) and max(v for _, v in known) > 8 * min(v for _, v in known)
    line = Series(name="", points=[Point(x=x, y=y) for x, y in known], hue=7, dots=False, listed=False)
    kinds = [
        Series(
            name=name,
            hue=hue,
            line=False,
            marker="o",
            points=[
                Point(x=x, y=y, title=f"layer {x}: {label} {y:.4g}") for x, y in known if fate.get(x, "kept") == name
            ],
        )
        for name, hue in (("kept", 7), ("joined", 0), ("dropped", 1))
    ]
    x, y = Axis(label="layer", whole=True), Axis(label=label, log=log)
    return Figure(svg=chart([line, *kinds], x=x, y=y, title=f"{label} by layer"), caption=caption)


def _fate(run: PlanRun) -> dict[int, str]:
    """The fate of every original layer at the last depth."""
    if not run.recipes:
        return {}
    recipe = run.recipes[min(run.recipes)]
    fate = dict.fromkeys(range(recipe.depth), "dropped")
    for op in recipe.layers:
        for source in op.sources:
            fate[source.layer] = "kept" if len(op.sources) == 1 else "joined"
    return fate


def ladders(run: PlanRun) -> list[Measured]:
    """The calibration perplexity by depth, if the method measures it."""
    points = [(int(step["layers"]), math.exp(step["loss"])) for step in run.log if step.get("loss") is not None]
    key, method = str(run.calibration.get("sha256")), str(run.settings["method"])
    found = Measured(name=method, measure="calibration perplexity", text=run.text, text_key=key, points=points)
    return [found] if points else []


def ladder_figure(found: Sequence[Measured]) -> Figure:
    """Measures by depth on one text, in one chart."""
    series = [
        Series(
            name=ladder.name,
            points=[Point(x=x, y=y, title=f"{ladder.name}, {x} layers: {y:.4g}") for x, y in ladder.points],
            hue=number,
        )
        for number, ladder in enumerate(found)
    ]
    x = layers_axis(x for ladder in found for x, _ in ladder.points)
    measure, values = found[0].measure, [y for ladder in found for _, y in ladder.points]
    # A broken model would compress the scale of the others.
    most = _BROKEN * min(values, default=1.0)
    note = "arrow: outside the chart" if any(value > most for value in values) else ""
    svg = chart(series, x=x, y=Axis(label=measure, log=True, most=most), title=f"{measure} by depth", note=note)
    return Figure(svg=svg, caption=f"On {found[0].text}.")


def steps_section(run: PlanRun) -> Section:
    """The ladder as a figure and a table."""
    blocks: list[Block] = [ladder_figure([ladder]) for ladder in ladders(run)]
    mlp = mlp_pieces(of_experts(run.provenance))
    rows = [
        {
            "layers": str(step["layers"]),
            "at layer": str(step["merged"][0]),
            "step": step_words(step, mlp),
            "loss": "" if step.get("loss") is None else f"{step['loss']:.4f}",
            "layer-forwards": short(step["layer_forwards"]),
            "time": text_of("seconds", step["seconds"]),
            "recipe": str(step["hash"])[:12],
        }
        for step in run.log
    ]
    if rows:
        folded = len(rows) > _LONG_TABLE
        blocks.append(Table(rows=rows, words=("step", "recipe"), caption=f"All {len(rows)} steps", folded=folded))
    return Section(title="The ladder", blocks=blocks, intro="Every depth can still be built from this run.")


def _tiles(run: PlanRun) -> list[Tile]:
    if not run.log:
        return []
    last, depth = run.log[-1], next(iter(run.recipes.values())).depth
    forwards = sum(step["layer_forwards"] for step in run.log)
    tiles = [Tile(name="layers", before=str(depth), now=str(last["layers"]))]
    if last.get("loss") is not None:
        tiles.append(Tile(name="calibration perplexity", now=short(math.exp(last["loss"]))))
    return [
        *tiles,
        Tile(name="layer-forwards", now=short(forwards), change=f"{forwards / depth:.1f} passes of the model"),
        Tile(name="time", now=text_of("seconds", sum(step["seconds"] for step in run.log))),
    ]


def _origin(run: PlanRun, folder: str) -> Section:
    """Settings, hashes, and the command to reproduce the run."""
    # The run folder has the model's whole config.
    facts = pairs_of({name: value for name, value in run.settings.items() if name not in ("planner", "config")})
    facts += pairs_of(run.settings.get("planner") or {}, before="planner: ")
    last = run.log[-1] if run.log else {}
    facts += pairs_of(
        {"calibration tokens, sha256": run.calibration.get("sha256"), "last recipe, sha256": last.get("hash")}
    )
    facts += pairs_of(run.provenance.get("versions", {}))
    words = ["--run", folder, *(["--layers", str(last["layers"])] if last else [])]
    origin = Origin(commands=[run_command("plan", run.settings, *words)], facts=facts)
    return Section(title="How to reproduce it", blocks=[origin])
