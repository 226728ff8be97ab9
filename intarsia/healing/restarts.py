"""Closed-form fits of a whole model from several starting points; the best one is kept.

What was fitted inside the progressive loop was fitted to the model of that time. A fit over all layers gains little
upon it, and the same layers with nothing fitted may end at a lower loss (dev/LOG.md): held-out text decides.

Each finished fit is kept in a folder until the best is known, so that a killed job continues after it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from intarsia.activations.hidden_store import MemoryBudget
from intarsia.architecture.spec import PARTS, Architecture
from intarsia.building.layer import tensor_names
from intarsia.building.loaded_model import LoadedModel
from intarsia.data.corpus import Corpus
from intarsia.disk import full_disk_named
from intarsia.evaluation.perplexity import Chain, perplexity
from intarsia.healing.closed_form import fit
from intarsia.healing.settings import ClosedFormSettings
from intarsia.healing.teacher import TeacherStates
from intarsia.progress import Progress, current
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe

AS_IT_IS = "as it is"


@dataclass(frozen=True, kw_only=True)
class Start:
    """A recipe to start from, and what it is called."""

    name: str
    recipe: Recipe


@dataclass(frozen=True, kw_only=True)
class Best:
    """The fit with the lowest perplexity on held-out text."""

    start: Start
    recipe: Recipe
    fits: list[dict[str, Any]]
    # Of every fit, by the name of its start; the lowest first.
    perplexities: dict[str, float]

    @property
    def perplexity(self) -> float:
        """The lowest of all."""
        return self.perplexities[self.start.name]

    def summary(self) -> str:
        """For a person, the best first."""
        rows = ", ".join(f"{name} {value:.2f}" for name, value in self.perplexities.items())
        return f"held-out perplexity from the recipe {rows}"


def starts(recipe: Recipe, architecture: Architecture) -> list[Start]:
    """The recipe as it is, and where output projections alone are fitted on it, the same with nothing fitted.

    What was trained is not done again by a closed form, so it gives no second start.
    """
    found = [Start(name=AS_IT_IS, recipe=recipe)]
    names = {name for tensors in recipe.fitted.values() for name in tensors}
    if names and names <= _closed_form_names(architecture):
        found.append(Start(name="with nothing fitted", recipe=replace(recipe, fitted={})))
    return found


def best_fit(
    points: Sequence[Start],
    teacher: TeacherStates,
    held_out: Corpus,
    *,
    settings: ClosedFormSettings,
    folder: Path,
    unseen: Collection[int] = (),
    memory_budget: MemoryBudget,
    progress: Progress,
) -> Best:
    """Fit from every start, and keep the best. A fit that is finished is read from the folder; `forget` clears it.

    Args:
        teacher: its hidden states on the calibration text, which all fits share.
        held_out: text whose perplexity decides.
        unseen: sequences of the calibration text that no fit sees.

    Raises:
        UserError: activations are not finite, or the disk is full.
    """
    several = len(points) > 1

    def fitted(start: Recipe) -> tuple[Recipe, list[dict[str, Any]]]:
        path = folder / f"{schema.content_hash(start)[:16]}.yaml"
        if several and path.exists():
            found = schema.load(path)
            return found, found.provenance["output_projections"]
        found, fits = fit(
            start, teacher, settings=settings, unseen=unseen, memory_budget=memory_budget, progress=progress
        )
        if several:
            with full_disk_named(folder):
                folder.mkdir(parents=True, exist_ok=True)
                schema.save(replace(found, provenance={"output_projections": fits}), path)
        return found, fits

    def measured(found: Recipe) -> float:
        return held_out_perplexity(teacher.resident, held_out, found, memory_budget=memory_budget)

    best = best_of(points, fitted, measured)
    if several:
        progress.say(f"closed form: {best.summary()}")
    return best


def best_of(
    points: Sequence[Start],
    fit: Callable[[Recipe], tuple[Recipe, list[dict[str, Any]]]],
    measure: Callable[[Recipe], float],
) -> Best:
    """Fit from every start, and keep the best; of equal ones the earlier start's."""
    best: tuple[Start, Recipe, list[dict[str, Any]]] | None = None
    found: dict[str, float] = {}
    with current().task("", len(points)) as task:
        for start in points:
            recipe, fits = fit(start.recipe)
            value = measure(recipe)
            if best is None or value < found[best[0].name]:
                best = start, recipe, fits
            found[start.name] = value
            task.advance()
    assert best is not None, "no start"
    ranked = dict(sorted(found.items(), key=lambda row: row[1]))
    return Best(start=best[0], recipe=best[1], fits=best[2], perplexities=ranked)


def forget(folder: Path) -> None:
    """Delete the fits that were kept."""
    shutil.rmtree(folder, ignore_errors=True)


def held_out_perplexity(resident: LoadedModel, corpus: Corpus, recipe: Recipe, *, memory_budget: MemoryBudget) -> float:
    """The perplexity of a recipe on held-out text.

    Raises:
        UserError: it is not finite.
    """
    return perplexity(Chain(recipe, resident, memory_budget=memory_budget), corpus).value


def _closed_form_names(architecture: Architecture) -> set[str]:
    """The tensors that a closed form fits."""
    if architecture.inspected is not None:
        names = (f"{module}.weight" for module in architecture.inspected.writers or ())
        return {tensor for name in names for tensor in tensor_names(name, architecture)}
    norms = (architecture.norm_after(part) for part in PARTS)
    modules = {architecture.writer(part).module for part in PARTS} | {norm.module for norm in norms if norm is not None}
    return {f"{module}.weight" for module in modules}
