"""Where a closed form over all layers may begin, and what each beginning comes to.

What was fitted on the way down was fitted to the model of that time. A fit over all layers gains little upon it, and
the same layers with nothing fitted may come to less loss (dev/LOG.md): which it is, held-out text says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from intarsia.anatomy.spec import PARTS, Anatomy
from intarsia.building.resident import Resident
from intarsia.calibration.corpus import Corpus
from intarsia.calibration.room import Room
from intarsia.evaluation.chain import Chain
from intarsia.evaluation.perplexity import perplexity
from intarsia.progress import Progress
from intarsia.recipe.recipe import Recipe

AS_IT_IS = "as it is"


@dataclass(frozen=True, kw_only=True)
class Start:
    """A recipe to begin with, and what it is called."""

    name: str
    recipe: Recipe


@dataclass(frozen=True, kw_only=True)
class End:
    """What the fits from several starts came to.

    `start`, `recipe` and `fits`: of the one with the least perplexity on held-out text. `perplexities`: of all by the
    start's name, the least first.
    """

    start: Start
    recipe: Recipe
    fits: list[dict[str, Any]]
    perplexities: dict[str, float]

    @property
    def perplexity(self) -> float:
        """The least of all."""
        return self.perplexities[self.start.name]

    def told(self) -> str:
        """For a person, the best first."""
        rows = ", ".join(f"{name} {value:.2f}" for name, value in self.perplexities.items())
        return f"held-out perplexity from the recipe {rows}"


def starts(recipe: Recipe, anatomy: Anatomy) -> list[Start]:
    """The recipe as it is, and where read-outs alone are fitted on it, the same with nothing fitted.

    What was trained is not done again by a closed form, so it is no such second start.
    """
    found = [Start(name=AS_IT_IS, recipe=recipe)]
    names = {name for tensors in recipe.fitted.values() for name in tensors}
    if names and names <= _closed_form_names(anatomy):
        found.append(Start(name="with nothing fitted", recipe=replace(recipe, fitted={})))
    return found


def best_end(
    beginnings: Sequence[Start],
    fit: Callable[[Recipe], tuple[Recipe, list[dict[str, Any]]]],
    judge: Callable[[Recipe], float],
) -> End:
    """Fit from every start, and keep the best end; of equal ones the earlier start's."""
    best: tuple[Start, Recipe, list[dict[str, Any]]] | None = None
    found: dict[str, float] = {}
    for start in beginnings:
        recipe, fits = fit(start.recipe)
        value = judge(recipe)
        if best is None or value < found[best[0].name]:
            best = start, recipe, fits
        found[start.name] = value
    assert best is not None, "no start"
    ranked = dict(sorted(found.items(), key=lambda row: row[1]))
    return End(start=best[0], recipe=best[1], fits=best[2], perplexities=ranked)


def held_out_perplexity(resident: Resident, corpus: Corpus, recipe: Recipe, *, room: Room, progress: Progress) -> float:
    """What a recipe is judged by.

    Raises:
        UserError: it is not finite.
    """
    return perplexity(Chain(recipe, resident, room=room), corpus, progress=progress).value


def _closed_form_names(anatomy: Anatomy) -> set[str]:
    """The tensors that a closed form fits."""
    norms = (anatomy.norm_after(part) for part in PARTS)
    modules = {anatomy.writer(part).module for part in PARTS} | {norm.module for norm in norms if norm is not None}
    return {f"{module}.weight" for module in modules}
