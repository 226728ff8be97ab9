"""Closed-form healing: least squares instead of training.

An output layer with span (a, b] should turn the output of the healed layers before it into the original's H^b. Its
output projections (down_proj, o_proj) are fitted by ridge regression on their own inputs toward what is still missing
of H^b, shrunk toward the current weights: down_proj, then o_proj, then down_proj again after the changed
attention.
Unchanged layers after the first merge have down_proj fitted, and o_proj on request: they correct the error that the
layers before them left. With a plain removal and down_proj alone this is the special case of arXiv
2505.02819 without its extra matrix.

The student runs from the first layer that differs from the teacher. Statistics are Gram matrices, accumulated in a
stream: memory is one layer's, whatever the number of tokens. The ridge strength is chosen on held-out sequences, and a
fit that does not lower the held-out error is not taken.

Massive activations: a few tokens (attention sinks) have norms a hundred times the others', and plain least squares
would serve them alone. A token counts with weight 1 / |H^b|^2, as it does to the norm before the next layer.

Fitting o_proj toward the span's summed attention outputs instead was measured and is worse than not fitting it: this
layer's MLP cannot use the outputs of the removed layers' attention (dev/LOG.md, closed form).

An output projection with a norm after it is fitted otherwise (`intarsia.healing.layer_fit`). The experts of a
mixture are not fitted; o_proj is, in their place.

A fit may have several starting points. Tensors fitted inside the progressive loop were fitted to an intermediate model:
the same layers with nothing fitted, or other layers, may come nearer to the original (dev/LOG.md). The best fit has the
least KL to the original's next-token distributions on held-out text, not the least loss: of models with equal loss the
nearer one is better on other text (dev/LOG.md; for removal: arXiv 2410.14649).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from intarsia.activations import loop as loops
from intarsia.activations.batches import Batches
from intarsia.activations.hidden_store import MemoryBudget
from intarsia.activations.loop import Loop
from intarsia.architecture.spec import PARTS, Architecture, Part
from intarsia.building.layer import tensor_names
from intarsia.building.loaded_model import LoadedModel, Placed, RecipeLayers, twin
from intarsia.data.corpus import Corpus
from intarsia.disk import full_disk_named
from intarsia.healing.layer_fit import LayerFit, LayerText, fit_layer, passes
from intarsia.healing.settings import ClosedFormSettings, changed_layers, taught
from intarsia.healing.teacher import TeacherStates
from intarsia.progress import current
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe, identity

AS_IT_IS = "the recipe itself"
MOST_PASSES = 3
"""Passes of the whole model over the tokens that a fit with optional output projections may take."""


def fitted_parts(
    recipe: Recipe, settings: ClosedFormSettings, architecture: Architecture
) -> dict[int, tuple[Part, ...]]:
    """The parts that the closed form fits on each output layer, in order."""
    changed = changed_layers(recipe)
    found = {
        index: settings.changed if index in changed else settings.unchanged[:1]
        for index in taught(recipe, settings.layers)
    }
    left = MOST_PASSES * recipe.depth - _forwards(recipe, found, architecture)
    more = passes(architecture, settings.unchanged) - passes(architecture, settings.unchanged[:1])
    for index in found:
        if index not in changed and more <= left:
            found[index] = settings.unchanged
            left -= more
    return found


def fit_forwards(recipe: Recipe, settings: ClosedFormSettings, architecture: Architecture) -> int:
    """Layer-forwards of a fit: the teacher's, the student's from where it differs, and those of each projection."""
    return _forwards(recipe, fitted_parts(recipe, settings, architecture), architecture)


def fit_passes_at_most(architecture: Architecture) -> int:
    """Passes of the whole model that a fit with the default parts takes at most: 3 for most families.

    The teacher runs once, each kept layer once and once more for its projection, each changed layer twice more; no
    more layers are changed than removed.
    """
    return 1 + 2 * max(passes(architecture, (part,)) for part in PARTS)


def _forwards(recipe: Recipe, parts: dict[int, tuple[Part, ...]], architecture: Architecture) -> int:
    if not parts:
        return 0
    indices = list(parts)
    own = zip(recipe.layers[: indices[0]], identity(recipe.variant(recipe.base), recipe.depth).layers, strict=False)
    differs = (index for index, (op, theirs) in enumerate(own) if op != theirs or index in recipe.fitted)
    first = next(differs, min(indices[0], recipe.depth))
    fits = sum(passes(architecture, some) for some in parts.values())
    return max(recipe.spans[index][1] for index in indices) + indices[-1] + 1 - first + fits


@torch.inference_mode()
def fit(
    recipe: Recipe,
    teacher: TeacherStates,
    *,
    settings: ClosedFormSettings | None = None,
    memory_budget: MemoryBudget | None = None,
) -> tuple[Recipe, list[dict[str, Any]]]:
    """A recipe with fitted output projections, and a report for every one of them.

    Args:
        recipe: any recipe over the teacher's resident model; tensors already fitted in it are the starting point.
        teacher: its hidden states on the calibration text; other fits may share it. The fit adds depths.
        memory_budget: what hidden states may take in memory.
    """
    settings, memory_budget = settings or ClosedFormSettings(), memory_budget or MemoryBudget()
    resident, batches = teacher.resident, teacher.batches
    parts = fitted_parts(recipe, settings, resident.architecture)
    if not parts:
        return recipe, []
    loop, spool = Loop(resident, batches, memory_budget=memory_budget), spool_of(resident, memory_budget)
    last = max(parts)
    modules = RecipeLayers(resident, recipe.layers[: last + 1], recipe.fitted).modules
    # Before the first layer that is not the teacher's own, or is fitted, the student's hidden states are the teacher's.
    own = zip(modules[: min(parts)], teacher.layers, strict=False)  # a stacked model has more layers than the teacher
    differs = (index for index, (ours, theirs) in enumerate(own) if ours is not theirs)
    first = next(differs, min(min(parts), len(teacher.layers)))
    # Spans of layers with a target do not overlap: no two have the same last layer.
    targets = {index: recipe.spans[index][1] for index in parts}
    fitted, fits = dict(recipe.fitted), list[LayerFit]()

    def fit_one(
        index: int, unfitted: nn.Module
    ) -> tuple[nn.Module, dict[str, npt.NDArray[np.float32]], list[LayerFit]]:
        module = twin(unfitted)  # fitting must leave the original model alone
        text = LayerText(
            loop=loop,
            inputs=loop.reader(student),
            targets=partial(teacher.at, targets[index]),
            source=recipe.layers[index].sources[0].layer,
            sequences=slice(None),
        )
        return module, *fit_layer(module, parts[index], text, index=index, settings=settings, spool=spool)

    with closing(loop.store()) as student, current().task("closed form", last + 1 - first) as task:
        teacher.learn({first, *targets.values()})
        for rows, _, _ in batches.over():
            student.put(0, rows.start, teacher.at(first, rows))
        if first not in targets.values():
            teacher.forget(first)
        for index, module in enumerate(resident.walk(modules[first:], ahead=False), first):
            task.note(f"layer {index + 1} of {len(recipe.layers)}")
            if index in targets:
                module, tensors, reports = batches.whole(partial(fit_one, index, module))
                fits += reports
                if tensors:
                    fitted[index] = {**fitted.get(index, {}), **tensors}
            layer = Placed(module, recipe.layers[index].sources[0].layer)
            loop.layer(layer, loop.reader(student), lambda passed: student.put(0, passed.rows.start, passed.after))
            if index in targets:
                teacher.forget(targets[index])
            task.advance()
    return replace(recipe, fitted=fitted), [asdict(entry) for entry in fits]


def spool_of(resident: LoadedModel, memory_budget: MemoryBudget) -> Path | None:
    """The folder for fitted tensors; None keeps them in memory.

    Those of all layers of a streamed model would take far more memory than its one resident layer."""
    return (memory_budget.folder or Path(tempfile.gettempdir())) if resident.streams else None


@dataclass(frozen=True, kw_only=True)
class Start:
    """A recipe to start from, with its name in the log and report."""

    name: str
    recipe: Recipe


class FromStart(NamedTuple):
    """A fit from a start: the recipe, what was fitted, and the divergence from the original on held-out text."""

    start: Start
    recipe: Recipe
    fits: list[dict[str, Any]]
    divergence: float


class NextTokens:
    """The original's next-token distributions on a text, to compare other models with."""

    def __init__(self, teacher: TeacherStates, corpus: Corpus, memory_budget: MemoryBudget) -> None:
        self.resident = teacher.resident
        self.loop = Loop(self.resident, Batches(corpus, self.resident.device), memory_budget=memory_budget)
        real_NT = torch.ones_like(corpus.input_ids, dtype=torch.bool) if corpus.mask is None else corpus.mask
        self.predicted = int((real_NT[:, :-1] & real_NT[:, 1:]).sum())
        layers = [Placed(module, index) for index, module in enumerate(teacher.layers)]
        self.likeliest = self.loop.likeliest(loops.Path(layers=layers))

    def divergence(self, recipe: Recipe) -> float:
        """Mean KL of a recipe's next token from the original's, in nats.

        Raises:
            UserError: it is not finite.
        """
        path = loops.Path(layers=RecipeLayers.of(recipe, self.resident).placed())
        (sums_N,) = self.loop.losses([path], expected=self.likeliest.rows)
        return float(sums_N.sum()) / max(1, self.predicted)


def starts(recipe: Recipe, architecture: Architecture) -> list[Start]:
    """The recipe itself; and, if nothing but output projections is fitted in it, the recipe with nothing fitted.

    A closed form cannot redo training, so a trained recipe has no second start.
    """
    found = [Start(name=AS_IT_IS, recipe=recipe)]
    names = {name for tensors in recipe.fitted.values() for name in tensors}
    if architecture.inspected is not None:
        modules = set(architecture.inspected.writers or ())
    else:
        norms = (architecture.norm_after(part) for part in PARTS)
        modules = {architecture.writer(part).module for part in PARTS} | {norm.module for norm in norms if norm}
    able = {name for module in modules for name in tensor_names(f"{module}.weight", architecture)}
    if names and names <= able:
        found.append(Start(name="the recipe with nothing fitted", recipe=replace(recipe, fitted={})))
    return found


def fit_each(
    points: Sequence[Start],
    teacher: TeacherStates,
    held_out: Corpus,
    *,
    settings: ClosedFormSettings,
    folder: Path,
    memory_budget: MemoryBudget,
) -> list[FromStart]:
    """Fit from every start; sort the fits, best first, ties in the order of the starts.

    Args:
        teacher: its hidden states on the calibration text, which all fits share.
        held_out: text on which the divergence from the original decides.
        folder: where finished fits are kept for a resumed run.

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
                recipe, fits = fit(start.recipe, teacher, settings=settings, memory_budget=memory_budget)
                with full_disk_named(folder):
                    folder.mkdir(parents=True, exist_ok=True)
                    schema.save(replace(recipe, provenance={"output_projections": fits}), path)
            value = original.divergence(recipe)
            found.append(FromStart(start=start, recipe=recipe, fits=fits, divergence=value))
            task.advance()
    found.sort(key=lambda each: each.divergence)
    ranking = ", ".join(f"{each.start.name} {each.divergence:.4f}" for each in found)
    current().say(f"closed form: held-out KL to the original, by starting point: {ranking}")
    return found
