"""Any trial of a search as a recipe, at any later time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from intarsia.architecture.spec import Architecture
from intarsia.options import Runtime
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe, Variant
from intarsia.tailoring import warm_start
from intarsia.tailoring.family import open_family, read_config_only
from intarsia.tailoring.family_file import FamilyFile, TargetSpec, read_family_file
from intarsia.tailoring.history import Trial
from intarsia.tailoring.pareto import Front
from intarsia.tailoring.run import FAMILY, TailorRun
from intarsia.tailoring.space import space_of
from intarsia.tailoring.translate import PieceScores, Translator

if TYPE_CHECKING:
    from intarsia.tailoring.evaluator import Evaluator

SENSITIVITIES = "sensitivities.safetensors"


def translator_of(
    file: FamilyFile, architecture: Architecture, facts: Mapping[str, Any], scores: PieceScores
) -> Translator:
    """Between candidates and recipes, for the members and the depth that `tailor.json` names."""
    variants = tuple(
        Variant(name=name, model=entry["model"], revision=entry["revision"], sha256=entry["sha256"])
        for name, entry in facts["members"].items()
    )
    settled = file.model_copy(update={"target": TargetSpec(layers=facts["space"]["target"])})
    return Translator(
        space=space_of(settled, architecture),
        architecture=architecture,
        variants=variants,
        scores=scores,
        seed=file.search.seed,
    )


def trial_recipe(run: TailorRun, trial: Trial, evaluator: Evaluator | None = None, *, healed: bool = True) -> Recipe:
    """The recipe of a trial, healed if the trial was.

    Args:
        evaluator: of the search, where it is open; only a healed trial needs one.
        healed: False for the recipe as it was before that.

    Raises:
        UserError: the family file or the models of the search cannot be read.
    """
    kept = run.recipe_path(trial.number)
    if kept.exists() and healed:
        return schema.load(kept)
    file, facts = read_family_file(run.path / FAMILY), run.settings
    _, architecture = read_config_only(file.base.model, file.base.revision)
    path = run.path / SENSITIVITIES
    scores = warm_start.load(path) if path.exists() else {}
    recipe = translator_of(file, architecture, facts, scores).recipe(trial.candidate)
    if healed and file.heals(trial.budget):
        if evaluator is None:
            from intarsia.tailoring.evaluator import open_evaluator

            runtime = Runtime(device=facts["device"], dtype=facts["dtype"])
            evaluator = open_evaluator(open_family(file.members), file, runtime, probe=False)
        recipe = evaluator.heal(recipe)
    return _with_provenance(recipe, trial, facts)


def keep_front(run: TailorRun, front: Front, evaluator: Evaluator) -> None:
    """Write the recipes of a front's trials, those that are not there yet."""
    for trial in front.points:
        path = run.recipe_path(trial.number)
        if not path.exists():
            recipe = trial_recipe(run, trial, evaluator)
            path.parent.mkdir(exist_ok=True)
            schema.save(recipe, path)


def _with_provenance(recipe: Recipe, trial: Trial, facts: Mapping[str, Any]) -> Recipe:
    """The recipe with which search it is from."""
    names = [entry["name"] for entry in facts["objectives"]]
    provenance = {
        "method": "tailor",
        "settings": {
            "engine": trial.engine,
            "trial": trial.number,
            "origin": trial.origin,
            "budget": trial.budget,
            "costs": dict(zip(names, trial.costs or (), strict=True)),
            "seed": trial.seed,
        },
        "versions": facts["versions"],
    }
    return replace(recipe, provenance={**recipe.provenance, **provenance})
