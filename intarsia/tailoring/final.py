"""What a search has found: any trial as a recipe, and final scores on unseen examples, the rest of each source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from intarsia.architecture.spec import Architecture
from intarsia.options import Runtime
from intarsia.progress import current
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe, Variant
from intarsia.tailoring import warm_start
from intarsia.tailoring.evaluator import Evaluator, open_evaluator
from intarsia.tailoring.family import Family, open_family, read_config_only
from intarsia.tailoring.family_file import FamilyFile, ObjectiveSpec, Range, TargetSpec, read_family_file
from intarsia.tailoring.history import Front, Trial
from intarsia.tailoring.run import FAMILY, TailorRun
from intarsia.tailoring.space import space_of
from intarsia.tailoring.translate import PieceScores, Translator


def rest_of(split: Range) -> Range | None:
    """The larger of the two parts of a source that a split leaves out; None where it leaves out nothing."""
    before, after = (0.0, split[0]), (split[1], 1.0)
    part = after if after[1] - after[0] >= before[1] - before[0] else before
    return part if part[1] - part[0] > 1e-9 else None


def unseen(file: FamilyFile) -> tuple[FamilyFile, tuple[str, ...]]:
    """The family file with each objective on what the search did not see, and the objectives that have no such rest."""
    kept: list[ObjectiveSpec] = []
    without: list[str] = []
    for objective in file.objectives:
        part = rest_of(objective.split)
        if part is None:
            without.append(objective.name)
        else:
            kept.append(objective.model_copy(update={"split": part}))
    return file.model_copy(update={"objectives": tuple(kept)}), tuple(without)


def final_scores(
    file: FamilyFile, family: Family, models: Mapping[str, Recipe], runtime: Runtime, *, examples: int
) -> dict[str, Any] | None:
    """What the base and some recipes cost on unseen items; None where the search saw everything there is.

    Args:
        examples: items of each objective, at most.

    Returns:
        `rows`: for each model its name and its cost in each objective, `value` with `stderr`; where objectives ask
        questions, `accuracy` of each of those, and after the base `kept`, which is accuracy as a share of the base's,
        with the mean of these as `mean_kept`. `examples` by objective; `without`: objectives whose source the search
        saw whole.
    """
    rest, without = unseen(file)
    if not rest.objectives:
        current().say("No final scores: the search sees all of every objective's source; give them a split.")
        return None
    evaluator = open_evaluator(family, rest, runtime, examples=examples, probe=False)
    rows: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    try:
        with current().task("final scores on unseen items", len(models) + 1) as task:
            for name, recipe in {"base": evaluator.uncut, **models}.items():
                task.note(name)
                outcome = evaluator.evaluate(recipe, min(examples, evaluator.most))
                costs = zip(evaluator.objectives, outcome.costs, outcome.details["stderr"], strict=True)
                measures = {objective: {"value": cost, "stderr": stderr} for objective, cost, stderr in costs}
                row = {"model": name, "layers": len(recipe.layers), **measures}
                rows.append(row | _accuracies(outcome.details["accuracy"], rows[0] if rows else None))
                counts = dict(zip(evaluator.objectives, outcome.examples, strict=True))
                task.advance()
    finally:
        evaluator.close()
    return {"rows": rows, "examples": counts, "without": list(without)}


def _accuracies(found: Mapping[str, tuple[float, float]], base: Mapping[str, Any] | None) -> dict[str, Any]:
    """Of objectives that ask questions. What is kept of nothing is left out."""
    if not found:
        return {}
    row: dict[str, Any] = {
        "accuracy": {name: {"value": value, "stderr": error} for name, (value, error) in found.items()}
    }
    if base is not None:
        before = {name: base["accuracy"][name]["value"] for name in found}
        kept = {name: value / before[name] for name, (value, _) in found.items() if before[name]}
        row |= {"kept": kept, "mean_kept": sum(kept.values()) / len(kept)} if kept else {}
    return row


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
