"""Closed-form fits of a whole model from several starting points; the best one is kept.

What was fitted inside the progressive loop was fitted to the model of that time. A fit over all layers gains little
over it, and the same layers with nothing fitted may end at a lower loss (dev/LOG.md): held-out text decides.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

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
from intarsia.progress import current
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe

AS_IT_IS = "as it is"


@dataclass(frozen=True, kw_only=True)
class Start:
    """A recipe to start from, and what it is called."""

    name: str
    recipe: Recipe


class FromStart(NamedTuple):
    """A fit from a start: the recipe, what was fitted, and the perplexity on held-out text."""

    start: Start
    recipe: Recipe
    fits: list[dict[str, Any]]
    perplexity: float


def starts(recipe: Recipe, architecture: Architecture) -> list[Start]:
    """The recipe as it is, and where output projections alone are fitted on it, the same with nothing fitted.

    What was trained is not done again by a closed form, so it gives no second start.
    """
    found = [Start(name=AS_IT_IS, recipe=recipe)]
    names = {name for tensors in recipe.fitted.values() for name in tensors}
    if names and names <= _closed_form_names(architecture):
        found.append(Start(name="with nothing fitted", recipe=replace(recipe, fitted={})))
    return found


def fit_each(
    points: Sequence[Start],
    teacher: TeacherStates,
    held_out: Corpus,
    *,
    settings: ClosedFormSettings,
    folder: Path,
    unseen: Collection[int] = (),
    memory_budget: MemoryBudget,
) -> list[FromStart]:
    """Fit from every start: the best fit comes first, of equal ones the earlier start's.

    Args:
        teacher: its hidden states on the calibration text, which all fits share.
        held_out: text whose perplexity decides.
        folder: where finished fits are kept, and found again.
        unseen: sequences of the calibration text that no fit sees.

    Raises:
        UserError: activations are not finite, or the disk is full.
    """
    found: list[FromStart] = []
    with current().task("", len(points)) as task:
        for start in points:
            path = folder / f"{schema.content_hash(start.recipe)[:16]}.yaml"
            if path.exists():
                recipe = schema.load(path)
                fits = recipe.provenance["output_projections"]
            else:
                recipe, fits = fit(start.recipe, teacher, settings=settings, unseen=unseen, memory_budget=memory_budget)
                with full_disk_named(folder):
                    folder.mkdir(parents=True, exist_ok=True)
                    schema.save(replace(recipe, provenance={"output_projections": fits}), path)
            value = held_out_perplexity(teacher.resident, held_out, recipe, memory_budget=memory_budget)
            found.append(FromStart(start=start, recipe=recipe, fits=fits, perplexity=value))
            task.advance()
    found.sort(key=lambda each: each.perplexity)
    said = ", ".join(f"{each.start.name} {each.perplexity:.2f}" for each in found)
    current().say(f"closed form: held-out perplexity from the recipe {said}")
    return found


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
