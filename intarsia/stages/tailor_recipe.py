"""Any trial of a search as a recipe, at any later time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intarsia.architecture.spec import Architecture
from intarsia.errors import UserError
from intarsia.progress import Progress, Silent
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe, Variant
from intarsia.stages.tailor_folder import TailorFolder
from intarsia.stages.tailor_scorer import evaluator_of, is_healed
from intarsia.stages.versions import versions
from intarsia.tailoring import warm_start
from intarsia.tailoring.family import open_family, read_config_only
from intarsia.tailoring.family_file import FamilyFile, read_family_file
from intarsia.tailoring.history import Trial
from intarsia.tailoring.pareto import Front
from intarsia.tailoring.space import space_of
from intarsia.tailoring.translate import PieceScores, Translator

if TYPE_CHECKING:
    from intarsia.tailoring.evaluator import Evaluator


def translator_of(
    file: FamilyFile,
    architecture: Architecture,
    members: Mapping[str, Mapping[str, Any]],
    scores: PieceScores,
) -> Translator:
    """Between candidates and recipes, for the members that `tailor.json` names."""
    variants = tuple(
        Variant(name=name, model=entry["model"], revision=entry["revision"], sha256=entry["sha256"])
        for name, entry in members.items()
    )
    return Translator(
        space=space_of(file, architecture),
        architecture=architecture,
        variants=variants,
        scores=scores,
        seed=file.search.seed,
    )


def chosen_trial(
    folder: TailorFolder, *, best: str | None = None, knee: bool = False, trial: int | None = None
) -> Trial:
    """The trial that is asked for: the best in an objective, the knee of the front, or by its number.

    Raises:
        UserError: not exactly one of them is asked for, there is no such objective or trial, or it has failed.
    """
    asked = sum([best is not None, knee, trial is not None])
    if asked > 1:
        raise UserError.of(
            where="--best, --knee, --trial", expected="one of them", found=str(asked), remedy="Leave the others out."
        )
    if trial is not None:
        return _numbered(folder, trial)
    front = folder.front()
    if front is None:
        raise UserError.of(
            where=str(folder.path),
            expected="a search with at least one trial that succeeded",
            found="none yet",
            remedy="Let `intarsia tailor` go on.",
        )
    if best is None:
        return front.knee
    if best not in front.objectives:
        raise UserError.of(
            where="--best",
            expected=f"one of {', '.join(front.objectives)}",
            found=repr(best),
            remedy="Name an objective of the search.",
        )
    return front.best(best)


def _numbered(folder: TailorFolder, number: int) -> Trial:
    trials = folder.history().trials
    if not 0 <= number < len(trials):
        raise UserError.of(
            where="--trial",
            expected=f"0 to {len(trials) - 1}" if trials else "a search with trials",
            found=str(number),
            remedy="Take the number of a line in trials.jsonl.",
        )
    found = trials[number]
    if found.status == "failed":
        raise UserError.of(
            where="--trial",
            expected="a trial that succeeded",
            found=f"{number}, which failed: {found.reason}",
            remedy="Choose another one.",
        )
    return found


def trial_recipe(
    folder: TailorFolder,
    trial: Trial,
    progress: Progress | None = None,
    evaluator: Evaluator | None = None,
    *,
    healed: bool = True,
) -> Recipe:
    """The recipe of a trial, healed if the trial was.

    Args:
        evaluator: of the search, where it is open; only a healed trial needs one.
        healed: False for the recipe as it was before that.

    Raises:
        UserError: the family file or the models of the search cannot be read.
    """
    kept = folder.recipe_path(trial.number)
    if kept.exists() and healed:
        return schema.load(kept)
    progress = progress or Silent()
    settings = folder.settings()
    file = read_family_file(folder.family)
    _, architecture = read_config_only(file.base.model, file.base.revision, None, progress)
    scores = warm_start.load(folder.sensitivities) if folder.sensitivities.exists() else {}

    recipe = translator_of(file, architecture, settings["members"], scores).recipe(trial.candidate)
    if healed and is_healed(file, trial.budget):
        if evaluator is None:
            evaluator = evaluator_of(
                open_family(file.base, file.variants, progress=progress),
                file,
                device=settings["device"],
                dtype=settings["dtype"],
                memory_bytes=None,
                probe=False,
                progress=progress,
            )
        recipe = evaluator.heal(recipe)
    return with_provenance(recipe, trial, settings)


def keep_front(folder: TailorFolder, front: Front, evaluator: Evaluator, progress: Progress) -> None:
    """Write the recipes of a front's trials, those that are not there yet."""
    for trial in front.points:
        path = folder.recipe_path(trial.number)
        if not path.exists():
            recipe = trial_recipe(folder, trial, progress, evaluator)
            path.parent.mkdir(exist_ok=True)
            schema.save(recipe, path)


def with_provenance(recipe: Recipe, trial: Trial, settings: Mapping[str, Any]) -> Recipe:
    """The recipe, telling which search it is from."""
    names = [entry["name"] for entry in settings["objectives"]]
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
        "versions": versions(),
    }
    return replace(recipe, provenance={**recipe.provenance, **provenance})


def is_tailored(path: Path) -> bool:
    """Whether a folder is that of a search."""
    return TailorFolder(path).is_one()
