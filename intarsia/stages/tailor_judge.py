"""Judging what a search has found on what it never saw: the rest of each objective's source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from intarsia.evaluation.likelihood import positions_of
from intarsia.progress import Progress
from intarsia.recipe.recipe import Recipe
from intarsia.stages.setup import load_tokenizer
from intarsia.tailoring.family import Family
from intarsia.tailoring.family_file import FamilyFile, ObjectiveSpec, Range
from intarsia.tailoring.objective_sources import read_objectives

EXAMPLES = 1000
_WINDOW = 128  # as of the windows that the evaluator draws


def rest_of(split: Range) -> Range | None:
    """The larger of the two parts of a source that a split leaves out; None where it leaves out nothing."""
    before, behind = (0.0, split[0]), (split[1], 1.0)
    part = behind if behind[1] - behind[0] >= before[1] - before[0] else before
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
            kept.append(replace(objective, split=part))
    return replace(file, objectives=tuple(kept)), tuple(without)


def examples_there(file: FamilyFile, family: Family, most: int, progress: Progress) -> int:
    """How many examples the largest objective has, up to `most`.

    Raises:
        UserError: an objective's rest cannot be read.
    """
    checkpoint = family.checkpoints()[family.names[0]]
    objectives = read_objectives(
        file.objectives,
        load_tokenizer(checkpoint),
        windows=most,
        seq_len=_WINDOW,
        max_length=positions_of(SimpleNamespace(**checkpoint.config)),
        seed=file.search.seed,
        progress=progress,
    )
    return min(most, max(len(objective.examples) for objective in objectives))


def judge(
    evaluator: Any, models: Mapping[str, Recipe], *, examples: int, without: tuple[str, ...], progress: Progress
) -> dict[str, Any]:
    """What recipes cost on unseen items.

    Args:
        models: the first one is what the others are held against.

    Returns:
        `rows`: for each model its name and its cost in each objective, `value` with `stderr`; where objectives ask
        questions, `accuracy` of each of those, and behind the first model `kept`, which is accuracy as a share of the
        first's, with the mean of these as `mean_kept`. `examples` by objective; `without`: objectives whose source the
        search saw whole.
    """
    budget = min(examples, evaluator.most)
    rows: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    with progress.task("judging on unseen items", len(models)) as task:
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
    """Of objectives that ask questions. What is kept of nothing is not told."""
    if not found:
        return {}
    told: dict[str, Any] = {
        "accuracy": {name: {"value": value, "stderr": error} for name, (value, error) in found.items()}
    }
    if first is not None:
        before = {name: first["accuracy"][name]["value"] for name in found}
        kept = {name: value / before[name] for name, (value, _) in found.items() if before[name]}
        told |= {"kept": kept, "mean_kept": sum(kept.values()) / len(kept)} if kept else {}
    return told
