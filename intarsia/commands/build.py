"""`intarsia build`: build a model folder with its card from a recipe; other verbs use the same functions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from intarsia.commands.push import push_later
from intarsia.errors import Problems, UserError
from intarsia.flags import Flag, Result
from intarsia.model_name import hub_id
from intarsia.options import NewModel
from intarsia.pruning.ladder import Ladder
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe

if TYPE_CHECKING:
    from intarsia.checkpoint.reader import Checkpoint

PICTURE = "puzzle.svg"


@dataclass(frozen=True, kw_only=True)
class BuildResult(Result):
    """A built model."""

    out: Path
    layers: int
    parameters: int
    # Of the weight files.
    bytes: int
    recipe_sha256: str
    seconds: float
    peak_memory_bytes: int
    # The upload to the hub.
    push: Mapping[str, Any] | None = None


def build(
    source: Annotated[
        Path, Flag(positional=True, metavar="RUN|RECIPE", help="A run folder of plan or tailor, or a recipe.")
    ],
    out: NewModel | str | Path,
    *,
    layers: Annotated[
        int | None, Flag(metavar="N", help="For a plan: the depth to build (default: the smallest).")
    ] = None,
    best: Annotated[str | None, Flag(metavar="NAME", help="For a search: the best trial in this objective.")] = None,
    knee: Annotated[bool, Flag(help="For a search: the knee of its Pareto front (the default).")] = False,
    trial: Annotated[int | None, Flag(metavar="N", help="For a search: the trial with this number.")] = None,
) -> BuildResult:
    """Build the model that a recipe describes: a recipe file, a depth of a plan, or a trial of a search.

    Building a recipe twice gives the same bytes.

    Raises:
        UserError: the recipe cannot be read or does not fit its models, a model has changed since the recipe was
            made, or the output cannot be written.
    """
    from intarsia.checkpoint.resolve import inputs_of
    from intarsia.disk import check_out
    from intarsia.tailoring.recipes import trial_recipe
    from intarsia.tailoring.run import TailorRun, is_tailor_run

    source, out = Path(source), NewModel.of(out)
    read = [source, source.with_suffix(".safetensors")]  # a recipe has a side file
    check_out(out.path, overwrite=out.overwrite, inputs=inputs_of(files=read))
    send_off = push_later(out.push_to, private=out.private)
    if is_tailor_run(source) and layers is None:
        search = TailorRun(source)
        recipe = trial_recipe(search, search.chosen(best=best, knee=knee, trial=trial))
    elif best is not None or knee or trial is not None:
        found = str(source) if layers is None else f"--layers {layers}"
        raise UserError(
            f"--best, --knee and --trial choose a trial of a search, which {found} is not.",
            "Name the run folder of `intarsia tailor`, and leave --layers out.",
        )
    else:
        recipe = read_recipe(source, layers)
    check_out(out.path, overwrite=out.overwrite, inputs=inputs_of(recipe=recipe, files=read))
    result = build_recipe(recipe, out.path, overwrite=out.overwrite, max_shard_bytes=out.shard_bytes)
    return send_off(result, out.path)


def read_recipe(source: Path, layers: int | None = None) -> Recipe:
    """Read the recipe of a file, a built model, or a run folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    from intarsia.building.materialize import RECIPE_FILE

    carried = source / RECIPE_FILE
    if source.is_dir() and not carried.is_file():
        if (source / "config.json").exists():
            raise UserError(
                f"{source} is a model without a recipe.",
                "Give an output of `intarsia compress` or `intarsia build`, or a recipe file.",
            )
        run = Ladder.existing(source)
        depths = run.depths()
        if not depths:
            raise UserError(f"The plan in {source} has no finished step yet.", "Resume it with the same command.")
        wanted, unfinished = run.wanted(), run.unfinished()
        if layers is None and unfinished is not None and wanted is not None and wanted.stopped is None:
            raise UserError(
                f"The plan in {source} is not finished: {unfinished}.",
                "Resume it with the same command, or name one of its depths with --layers: "
                f"{', '.join(map(str, depths))}.",
            )
        return run.recipe(depths[-1] if layers is None else layers)
    if layers is not None:
        raise UserError(f"--layers chooses a depth of a run folder, and {source} is a recipe.", "Leave --layers out.")
    return schema.load(carried if carried.is_file() else source)


def build_recipe(recipe: Recipe, out: Path, *, overwrite: bool, max_shard_bytes: int = 5 * 10**9) -> BuildResult:
    """Build a recipe into a model folder with its card."""
    from intarsia.building.materialize import materialize
    from intarsia.evaluation.speed import peak_memory_bytes
    from intarsia.reporting.card import model_card
    from intarsia.reporting.puzzle import pieces_of_architecture, puzzle_file

    started = time.perf_counter()
    variants = open_variants(recipe)
    base = variants[recipe.base]
    removed = recipe.depth - len(recipe.layers)

    def result(folder: Path) -> BuildResult:
        return BuildResult(
            out=out,
            layers=len(recipe.layers),
            parameters=base.parameters - removed * base.architecture.layer_parameters,
            bytes=sum(file.stat().st_size for file in folder.glob("model*.safetensors")),
            recipe_sha256=schema.content_hash(recipe),
            seconds=time.perf_counter() - started,
            peak_memory_bytes=peak_memory_bytes(),
        )

    def finish(folder: Path) -> None:
        facts = card_facts(recipe, base, result(folder), title=out.name)
        (folder / PICTURE).write_text(puzzle_file(recipe, pieces_of_architecture(base.architecture)), encoding="utf-8")
        (folder / "README.md").write_text(model_card(facts), encoding="utf-8")

    materialize(recipe, variants, out, overwrite=overwrite, max_shard_bytes=max_shard_bytes, finish=finish)
    return result(out)


def open_variants(recipe: Recipe) -> dict[str, Checkpoint]:
    """Open every variant of a recipe, and check that its weights are those of the recipe.

    Raises:
        UserError: one cannot be opened, the recipe does not fit them, or weights have changed.
    """
    from intarsia.checkpoint.adapter import open_variant
    from intarsia.checkpoint.hashing import scan
    from intarsia.recipe.validate import check

    variants: dict[str, Checkpoint] = {}
    # The base first, because adapters are merged into it.
    for variant in sorted(recipe.variants, key=lambda variant: variant.name != recipe.base):
        base = variants.get(recipe.base)
        variants[variant.name] = open_variant(variant.model, revision=variant.revision, base=base)
    check(recipe, {name: checkpoint.architecture for name, checkpoint in variants.items()})
    problems = Problems()
    for variant in recipe.variants:
        found = scan(variants[variant.name])
        if variant.sha256 not in (None, found):
            problems.add(
                f"The weights of variant {variant.name} ({variant.model}) have the sha256 {found}, "
                f"and the recipe was made for {variant.sha256}.",
                "Use these weights, or plan again.",
            )
    problems.raise_any()
    return variants


def card_facts(recipe: Recipe, base: Checkpoint, built: BuildResult, *, title: str) -> dict[str, Any]:
    """The facts of a built recipe for the model card."""
    from intarsia.commands.job import versions

    variant = recipe.variant(recipe.base)
    source_card = base.folder / "README.md"
    provenance = dict(recipe.provenance)
    merged = any(op.sources != op.sources[:1] for op in recipe.layers)
    return {
        "title": title,
        "picture": PICTURE,
        "model": variant.model,
        "revision": variant.revision,
        "base_model": hub_id(variant.model),
        "family": base.architecture.family.title,
        **{key: provenance[key] for key in ("method", "calibration", "settings") if provenance.get(key)},
        "heal": _heal_facts(provenance.get("heal")),
        "merged": merged,
        "before": {"layers": recipe.depth, "parameters": base.parameters, "bytes": base.nbytes},
        "after": {"layers": built.layers, "parameters": built.parameters, "bytes": built.bytes},
        "approximations": base.architecture.approximations if merged else (),
        "recipe_sha256": built.recipe_sha256,
        "versions": provenance.get("versions") or versions(),
        "source_card": source_card.read_text(encoding="utf-8", errors="replace") if source_card.is_file() else None,
    }


def _heal_facts(heal: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A short account of the healing; None if no stage was accepted."""
    stages = [] if heal is None else [row["stage"] for row in heal["stages"][1:] if row.get("taken")]
    if heal is None or not stages:
        return None
    first, last = (heal["stages"][index]["held_out_perplexity"] for index in (0, -1))
    closed_form = heal["settings"].get("closed-form", {}) if "closed-form" in stages else {}
    return {
        "stages": stages,
        **({"start": heal["start"]} if heal.get("from_scratch") else {}),
        "text": heal["text"]["description"],
        "tokens": heal["text"]["tokens"],
        **{key: closed_form[key] for key in ("layers", "weighting") if key in closed_form},
        "perplexity of held-out text before": first,
        "after": last,
    }
