"""Healing what was made of several models: as a cut of what it would be with no layer removed.

Repaired towards one of its members a mixture would lose what it has of the others, so it learns from its own blend
uncut (`intarsia.recipe.uncut`). That model is written into the run folder, and takes the base's place: layers that are
the blend's own become plain selections from it, and healing goes on as with one model. What was fitted then belongs to
the recipe as it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from intarsia.building.materialize import materialize
from intarsia.checkpoint.reader import Checkpoint
from intarsia.disk import full_disk_named
from intarsia.planning.run_folder import UNCUT, RunFolder
from intarsia.progress import Progress
from intarsia.recipe import codec
from intarsia.recipe.ops import LayerRef, Op, Select
from intarsia.recipe.recipe import Recipe, Variant, derive_spans
from intarsia.recipe.uncut import uncut

BLEND = "the same blend with no layer removed"
"""What that teacher is called."""


def over_its_blend(
    recipe: Recipe,
    variants: Mapping[str, Checkpoint],
    run: Path,
    *,
    main: bool,
    barrier: Callable[[], None],
    progress: Progress,
) -> tuple[Recipe, dict[str, Checkpoint]]:
    """The same model as a recipe over its blend, and all checkpoints of that; of one model it stays as it is.

    Args:
        variants: the opened members.
        run: the blend is written to `uncut/` there.
        main: this process writes it; the others wait at `barrier`.

    Raises:
        UserError: it cannot be written, or the run folder is something else.
    """
    if len(recipe.variants) == 1:
        return recipe, dict(variants)
    folder = run / UNCUT / codec.content_hash(recipe)[:16]
    layers = uncut(recipe)
    if main and not folder.exists():
        if not RunFolder(run).is_one():
            RunFolder.offer(run, {})  # nothing is written into what is something else
        progress.say(f"made of several models: it learns from {BLEND}")
        with full_disk_named(run):
            shutil.rmtree(folder.parent, ignore_errors=True)  # of another recipe
            folder.parent.mkdir(parents=True)
        whole = replace(recipe, layers=layers, spans=derive_spans(layers, recipe.depth), fitted={}, provenance={})
        materialize(whole, variants, folder, progress=progress)
    barrier()
    name = UNCUT
    while name in variants:
        name += "_"

    def over(op: Op) -> Op:
        at = op.sources[0].layer
        return Select(source=LayerRef(variant=name, layer=at)) if op == layers[at] else op

    made = replace(
        recipe,
        variants=(Variant(name=name, model=str(folder)), *recipe.variants),
        base=name,
        layers=tuple(over(op) for op in recipe.layers),
    )
    return made, {name: Checkpoint.open(folder, model=str(folder)), **variants}


def back(recipe: Recipe, healed: Recipe) -> Recipe:
    """The recipe as it was, with what was fitted or trained on it over its blend."""
    return replace(recipe, fitted=healed.fitted)


def forget(run: Path) -> None:
    """Delete the blend, when nothing learns from it any more."""
    shutil.rmtree(run / UNCUT, ignore_errors=True)
