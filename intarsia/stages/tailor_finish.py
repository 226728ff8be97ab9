"""The end of a search: its front written, the incumbent built, and judged on what the search never saw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intarsia.building.materialize import RECIPE_FILE
from intarsia.commands.recipes import build_recipe
from intarsia.errors import UserError
from intarsia.progress import Progress
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe, Variant, identity
from intarsia.stages.tailor_folder import TailorFolder
from intarsia.stages.tailor_judge import examples_there, judge, unseen
from intarsia.stages.tailor_recipe import keep_front, trial_recipe
from intarsia.stages.tailor_scorer import evaluator_of, is_healed
from intarsia.tailoring.family import Family
from intarsia.tailoring.family_file import BASE, FamilyFile
from intarsia.tailoring.pareto import Front
from intarsia.tailoring.trial_heal import KeptFits

if TYPE_CHECKING:
    from intarsia.tailoring.evaluator import Evaluator


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What is there at the end. `front` is None where no trial has succeeded."""

    front: Front | None
    judged: Mapping[str, Any] | None
    best: Path | None


def finish(
    folder: TailorFolder,
    file: FamilyFile,
    family: Family,
    evaluator: Evaluator,
    *,
    build: bool,
    judge_examples: int | None,
    device: str | None,
    dtype: str | None,
    memory_bytes: int | None,
    progress: Progress,
) -> Finished:
    """Write the front with its recipes, build its knee into `best/`, judge it.

    What was done for the same incumbent before is not done again.

    Args:
        judge_examples: on so many unseen items of each objective at most; None for no judging.

    Raises:
        UserError: a folder `best` that is not of the search stands in the way, or a disk is full.
    """
    front = folder.front()
    if front is None:
        return Finished(front=None, judged=None, best=None)
    keep_front(folder, front, evaluator, progress)
    KeptFits(folder.fits).end()
    recipe = trial_recipe(folder, front.knee, progress, evaluator)
    sha256 = schema.content_hash(recipe)
    judged = folder.judged()
    if judged is not None and (judged["recipe"], judged["asked"]) != (sha256, judge_examples):
        judged = None
    folder.write_front(front, judged)
    best = None
    if build:
        best = folder.best
        if not _is_built(best, sha256):
            build_recipe(recipe, best, overwrite=True, progress=progress)
    if judged is None and judge_examples is not None:
        evaluator.close()
        models = {"incumbent": recipe}
        if is_healed(file, front.knee.budget):
            models = {"incumbent as cut": trial_recipe(folder, front.knee, progress, healed=False), **models}
        found = _judged(
            file,
            family,
            models,
            examples=judge_examples,
            device=device,
            dtype=dtype,
            memory_bytes=memory_bytes,
            progress=progress,
        )
        if found is not None:
            judged = {"recipe": sha256, "trial": front.knee.number, "asked": judge_examples, **found}
            folder.write_front(front, judged)
    return Finished(front=front, judged=judged, best=best)


def _is_built(folder: Path, sha256: str) -> bool:
    """Whether a folder holds the model of a recipe."""
    kept = folder / RECIPE_FILE
    if not kept.is_file():
        return False
    try:
        return schema.content_hash(schema.load(kept)) == sha256
    except UserError:
        return False


def _judged(
    file: FamilyFile,
    family: Family,
    models: Mapping[str, Recipe],
    *,
    examples: int,
    device: str | None,
    dtype: str | None,
    memory_bytes: int | None,
    progress: Progress,
) -> dict[str, Any] | None:
    """None where the search saw everything there is."""
    rest, without = unseen(file)
    if not rest.objectives:
        progress.say("nothing to judge by: the objectives show the search all of their sources; give them a split")
        return None
    examples = examples_there(rest, family, examples, progress)
    # Budgets of the search say nothing about how much there is to judge by.
    rest = replace(rest, heal="none", search=replace(rest.search, min_budget=examples, max_budget=examples))
    evaluator = evaluator_of(
        family, rest, device=device, dtype=dtype, memory_bytes=memory_bytes, probe=False, progress=progress
    )
    try:
        base = identity(Variant(name=BASE, model=file.base.model), family.architecture.n_layers)
        return judge(evaluator, {"base": base, **models}, examples=examples, without=without, progress=progress)
    finally:
        evaluator.close()
