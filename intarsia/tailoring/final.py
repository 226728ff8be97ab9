"""The final scores of what a search has found, on what it never saw: the rest of each objective's source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from intarsia.options import Runtime
from intarsia.progress import current
from intarsia.recipe.recipe import Recipe, Variant, identity
from intarsia.tailoring.evaluator import Evaluator, examples_there, open_evaluator
from intarsia.tailoring.family import Family
from intarsia.tailoring.family_file import BASE, FamilyFile, ObjectiveSpec, Range


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
        See `scores`.
    """
    rest, without = unseen(file)
    if not rest.objectives:
        current().say("No final scores: the search sees all of every objective's source; give them a split.")
        return None
    count = examples_there(rest, family, examples)
    # Budgets of the search say nothing about how much there is to score on.
    search = rest.search.model_copy(update={"min_budget": count, "max_budget": count})
    rest = rest.model_copy(update={"heal": "none", "search": search})
    evaluator = open_evaluator(family, rest, runtime, probe=False)
    try:
        base = identity(Variant(name=BASE, model=file.base.model), family.architecture.n_layers)
        return scores(evaluator, {"base": base, **models}, examples=count, without=without)
    finally:
        evaluator.close()


def scores(
    evaluator: Evaluator, models: Mapping[str, Recipe], *, examples: int, without: tuple[str, ...]
) -> dict[str, Any]:
    """What recipes cost.

    Args:
        models: the first one is what the others are compared with.

    Returns:
        `rows`: for each model its name and its cost in each objective, `value` with `stderr`; where objectives ask
        questions, `accuracy` of each of those, and after the first model `kept`, which is accuracy as a share of the
        first's, with the mean of these as `mean_kept`. `examples` by objective; `without`: objectives whose source the
        search saw whole.
    """
    budget = min(examples, evaluator.most)
    rows: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    with current().task("final scores on unseen items", len(models)) as task:
        for name, recipe in models.items():
            task.note(name)
            outcome = evaluator.evaluate(recipe, budget)
            errors = outcome.details.get("stderr", [None] * len(outcome.costs))
            measures = {
                objective: {"value": cost, "stderr": stderr}
                for objective, cost, stderr in zip(evaluator.objectives, outcome.costs, errors, strict=True)
            }
            row = {"model": name, "layers": len(recipe.layers), **measures}
            rows.append(row | _accuracies(outcome.details.get("accuracy", {}), rows[0] if rows else None))
            counts = dict(zip(evaluator.objectives, outcome.examples, strict=True))
            task.advance()
    return {"rows": rows, "examples": counts, "without": list(without)}


def _accuracies(found: Mapping[str, tuple[float, float]], first: Mapping[str, Any] | None) -> dict[str, Any]:
    """Of objectives that ask questions. What is kept of nothing is left out."""
    if not found:
        return {}
    row: dict[str, Any] = {
        "accuracy": {name: {"value": value, "stderr": error} for name, (value, error) in found.items()}
    }
    if first is not None:
        before = {name: first["accuracy"][name]["value"] for name in found}
        kept = {name: value / before[name] for name, (value, _) in found.items() if before[name]}
        row |= {"kept": kept, "mean_kept": sum(kept.values()) / len(kept)} if kept else {}
    return row
