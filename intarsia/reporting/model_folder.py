"""A model folder that intarsia has built as a part of a report: its recipe, how it was healed and what it measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intarsia.anatomy.detect import detect
from intarsia.anatomy.spec import Anatomy
from intarsia.building.materialize import RECIPE_FILE
from intarsia.checkpoint.multimodal import text_config
from intarsia.disk import damage_named, read_json, write_whole
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe
from intarsia.reporting.blocks import Code, Facts, Section, Subject, Tile, Written
from intarsia.reporting.commands import compress_command
from intarsia.reporting.layer_facts import picture_data
from intarsia.reporting.model_quality import healing_section, quality_sections
from intarsia.reporting.picture import Pieces
from intarsia.reporting.plan_evidence import evidence_sections
from intarsia.reporting.plan_folder import PlanRun, is_plan_run, load_run
from intarsia.reporting.plan_ladder import ladders, steps_section
from intarsia.reporting.puzzle_section import puzzle_section
from intarsia.reporting.wording import change, measure, model_name, plain_value, written

MEASURES_FILE = RECIPE_FILE.with_name("measures.json")
"""What `compress` has measured, beside the recipe."""

_TILES = (
    ("layers", "layers"),
    ("perplexity", "perplexity"),
    ("parameters", "parameters"),
    ("bytes", "weights"),
    ("decode_per_s", "tokens/s written"),
    ("prefill_per_s", "tokens/s read"),
)


def keep_measures(out: Path, facts: Mapping[str, Any]) -> None:
    """Lay what a compression measured beside the recipe of what it built.

    Args:
        facts: `model`, `before`, `after` (measures as `Measures.to_dict` gives them), and what is known of `healed`,
            `evaluation` (`text`, `sha256`, `windows`, `seq_len`), `layer_forwards`, `seconds`, `run` (its folder's
            name, which is looked for beside the model).
    """
    write_whole(out / MEASURES_FILE, json.dumps(facts, indent=2) + "\n")


def is_model_folder(path: Path) -> bool:
    """Whether a folder is a model with a recipe."""
    return (path / RECIPE_FILE).is_file()


def read(path: Path, *, generations: Sequence[Written] = ()) -> Subject:
    """The model as a subject.

    Args:
        generations: what it and the original wrote.

    Raises:
        UserError: its recipe or what was measured is damaged.
    """
    recipe = schema.load(path / RECIPE_FILE)
    facts = _measures(path / MEASURES_FILE)
    run = _run(path, facts, recipe)
    anatomy = _anatomy(path)
    variant = recipe.variant(recipe.base)
    provenance = recipe.provenance
    method = str(provenance.get("method") or "a recipe by hand")
    healed = healing_section(provenance.get("heal") or {})
    sections = [
        _puzzle(path, recipe, anatomy, run),
        *quality_sections(facts),
        *([healed] if healed else []),
        *([Section(title="Written by both", blocks=list(generations), intro=_WRITTEN)] if generations else []),
        *([] if run is None else [*evidence_sections(run), steps_section(run)]),
        _origin(path, recipe, facts, run),
    ]
    evaluation = facts.get("evaluation") or {}
    return Subject(
        path=path,
        title=f"{model_name(variant.model)}, {recipe.depth} → {len(recipe.layers)} layers",
        subtitle=f"Made with {method}" + (f", judged on {evaluation['text']}" if evaluation.get("text") else ""),
        base=(variant.sha256 or "", model_name(variant.model)),
        tiles=_tiles(facts, recipe),
        notes=_notes(facts),
        sections=sections,
        ladders=[] if run is None else ladders(run),
        texts={evaluation["sha256"]: evaluation["text"]} if evaluation.get("sha256") else {},
    )


_WRITTEN = "The likeliest token at every place, so that nothing is left to chance."


def _puzzle(path: Path, recipe: Recipe, anatomy: Anatomy, run: PlanRun | None) -> Section:
    depth = len(recipe.layers)
    pieces = Pieces(
        n_kv_heads=anatomy.n_kv_heads,
        n_channels=anatomy.n_mlp_pieces,
        experts=anatomy.is_mixture("mlp"),
        heads_per_group=anatomy.heads_per_group,
    )
    fits: dict[int, list[Mapping[str, Any]]] = {}
    for row in (recipe.provenance.get("heal") or {}).get("read_outs") or []:
        fits.setdefault(int(row["layer"]), []).append(row)
    recipes = {depth: recipe}
    influence: Sequence[float] = ()
    spans: dict[int, float] = {}
    steps: Mapping[int, Mapping[str, Any]] = {}
    if run is not None:
        recipes = {layers: each for layers, each in run.recipes.items() if layers > depth} | recipes
        influence = run.evidence.get("influence") or ()
        spans = {int(start): value for start, value in (run.evidence.get("span_scores") or {}).items()}
        steps = run.steps
    data = picture_data(recipes, pieces, influence=influence, spans=spans, steps=steps, fits=fits, fitted_depth=depth)
    return puzzle_section(recipes, pieces, data, name=path.name)


def _origin(path: Path, recipe: Recipe, facts: Mapping[str, Any], run: PlanRun | None) -> Section:
    provenance = recipe.provenance
    blocks: list[Any] = []
    if run is not None and facts:
        heal = "closed-form" if provenance.get("heal") else "none"
        blocks.append(Code(text=compress_command(run.settings, out=path.name, layers=len(recipe.layers), heal=heal)))
    pairs = [("recipe, sha256", schema.content_hash(recipe))]
    for variant in recipe.variants:
        revision = f", revision {variant.revision}" if variant.revision else ""
        pairs.append((f"weights of {model_name(variant.model)}{revision}, sha256", variant.sha256 or "not recorded"))
    for name, value in provenance.items():
        if name == "heal" or value is None:
            continue
        pairs += (
            [(f"{name}: {key.replace('_', ' ')}", written(part)) for key, part in value.items()]
            if isinstance(value, Mapping)
            else [(name, written(value))]
        )
    if facts.get("evaluation"):
        pairs += [(f"evaluation: {name.replace('_', ' ')}", written(v)) for name, v in facts["evaluation"].items()]
    for name in ("layer_forwards", "seconds", "peak_memory_bytes"):
        if facts.get(name) is not None:
            pairs.append((name.replace("_", " "), measure(name, facts[name])))
    return Section(title="Where this comes from", blocks=[*blocks, Facts(pairs=pairs)])


def _tiles(facts: Mapping[str, Any], recipe: Recipe) -> list[Tile]:
    before, after = facts.get("before") or {}, facts.get("after") or {}
    if not after:
        return [Tile(name="layers", before=str(recipe.depth), now=str(len(recipe.layers)))]
    return [
        Tile(
            name=name,
            before=measure(key, plain_value(before.get(key))),
            now=measure(key, plain_value(after.get(key))),
            change="" if key == "layers" else change(before.get(key), after.get(key)),
        )
        for key, name in _TILES
        if after.get(key) is not None
    ]


def _notes(facts: Mapping[str, Any]) -> list[str]:
    healed = facts.get("healed") or {}
    if healed and not healed.get("taken", True):
        return ["The closed form did not lower the loss of held-out text, so the model stayed as it was cut."]
    return []


def _anatomy(path: Path) -> Anatomy:
    where = path / "config.json"
    config = read_json(where, expected="the config of a model", remedy="Build the model again.")
    return detect(text_config(config, where=str(where)), where=str(where))


def _measures(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with damage_named(path, expected="JSON", remedy="Delete it: the rest is shown without it."):
        found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _run(path: Path, facts: Mapping[str, Any], recipe: Recipe) -> PlanRun | None:
    """The run that planned the model, if it still stands beside it and passed through the same recipe's depth."""
    name = facts.get("run")
    beside = None if not name else path.parent / Path(str(name)).name
    if beside is None or not is_plan_run(beside):
        return None
    run = load_run(beside)
    ours = run.recipes.get(len(recipe.layers))
    return run if ours is not None and ours.layers == recipe.layers else None
