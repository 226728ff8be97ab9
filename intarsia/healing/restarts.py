"""Closed-form fits of a whole model from several starting points; the best one is kept.

What was fitted inside the progressive loop was fitted to the model of that time. A fit over all layers gains little
over it, and the same layers with nothing fitted may end nearer to the original (dev/LOG.md): held-out text decides.

The nearest to the original's next-token distributions is the best, not the one of least loss: models of equal loss
differ in it, and the nearer one is the better one on other text (dev/LOG.md; for removal: arXiv 2410.14649).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from intarsia.activations.batches import Batches
from intarsia.activations.hidden_store import MemoryBudget
from intarsia.activations.loop import Loop, Path
from intarsia.activations.loss import TOP, Likeliest
from intarsia.architecture.spec import PARTS, Architecture
from intarsia.building.layer import tensor_names
from intarsia.building.recipe_layers import Placed, RecipeLayers
from intarsia.data.corpus import Corpus
from intarsia.disk import full_disk_named
from intarsia.healing.closed_form import fit
from intarsia.healing.settings import ClosedFormSettings
from intarsia.healing.teacher import TeacherStates
from intarsia.progress import current
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe

if TYPE_CHECKING:
    import pathlib

AS_IT_IS = "as it is"


@dataclass(frozen=True, kw_only=True)
class Start:
    """A recipe to start from, and what it is called."""

    name: str
    recipe: Recipe


class FromStart(NamedTuple):
    """A fit from a start: the recipe, what was fitted, and the divergence from the original on held-out text."""

    start: Start
    recipe: Recipe
    fits: list[dict[str, Any]]
    divergence: float


class NextTokens:
    """The original's next-token distributions on a text, for other models to be compared with."""

    def __init__(self, teacher: TeacherStates, corpus: Corpus, memory_budget: MemoryBudget) -> None:
        self.resident = teacher.resident
        self.loop = Loop(self.resident, Batches(corpus, self.resident.device), memory_budget=memory_budget)
        real_NT = torch.ones_like(corpus.input_ids, dtype=torch.bool) if corpus.mask is None else corpus.mask
        self.predicted = int((real_NT[:, :-1] & real_NT[:, 1:]).sum())
        number, found = min(TOP, self.resident.architecture.vocabulary), dict[int, Likeliest]()

        def look(_: int, rows: slice, ids: Tensor, mask: Tensor | None, h_BTD: Tensor) -> None:
            found[rows.start] = self.loop.stream.likeliest(h_BTD, ids, mask, number)

        with torch.inference_mode():
            self.loop.run([Path(layers=[Placed(module, index) for index, module in enumerate(teacher.layers)])], look)
        parts = zip(*(found[start] for start in sorted(found)), strict=True)
        self.likeliest = Likeliest(*(torch.cat(each) for each in parts))

    def divergence(self, recipe: Recipe) -> float:
        """Mean KL of a recipe's next token from the original's, in nats.

        Raises:
            UserError: it is not finite.
        """
        path = Path(layers=RecipeLayers.of(recipe, self.resident).placed())
        (sums_N,) = self.loop.losses([path], expected=self.likeliest.rows)
        return float(sums_N.sum()) / max(1, self.predicted)


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
    folder: pathlib.Path,
    unseen: Collection[int] = (),
    memory_budget: MemoryBudget,
) -> list[FromStart]:
    """Fit from every start: the best fit comes first, of equal ones the earlier start's.

    Args:
        teacher: its hidden states on the calibration text, which all fits share.
        held_out: text on which the divergence from the original decides.
        folder: where finished fits are kept, and found again.
        unseen: sequences of the calibration text that no fit sees.

    Raises:
        UserError: activations are not finite, or the disk is full.
    """
    found: list[FromStart] = []
    with current().task("", len(points)) as task:
        original = NextTokens(teacher, held_out, memory_budget)
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
            value = original.divergence(recipe)
            found.append(FromStart(start=start, recipe=recipe, fits=fits, divergence=value))
            task.advance()
    found.sort(key=lambda each: each.divergence)
    said = ", ".join(f"{each.start.name} {each.divergence:.4f}" for each in found)
    current().say(f"closed form: held-out KL to the original from the recipe {said}")
    return found


def _closed_form_names(architecture: Architecture) -> set[str]:
    """The tensors that a closed form fits."""
    if architecture.inspected is not None:
        names = (f"{module}.weight" for module in architecture.inspected.writers or ())
        return {tensor for name in names for tensor in tensor_names(name, architecture)}
    norms = (architecture.norm_after(part) for part in PARTS)
    modules = {architecture.writer(part).module for part in PARTS} | {norm.module for norm in norms if norm is not None}
    return {f"{module}.weight" for module in modules}
