"""Which output layers heal stages change, and what a fit of them takes.

An output layer gets the original's hidden states before its span and should give those after it: H^start and H^stop of
`recipe.spans`. So a teacher needs the base's depth, width and vocabulary; by default it is the base itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from intarsia.activations.batches import Batches
from intarsia.activations.hidden_store import MemoryBudget
from intarsia.activations.loop import Loop, Passed, Path
from intarsia.activations.loss import TOP, Likeliest
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

if TYPE_CHECKING:
    import pathlib


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
    """Passes of the whole model that a fit with the default parts takes, whatever was pruned: 3 for most families.

    The teacher runs once; each layer that is kept once, and for one projection; each changed one for two more, and
    there are no more changed layers than removed ones.
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


def fit(
    recipe: Recipe,
    teacher: TeacherStates,
    *,
    settings: ClosedFormSettings | None = None,
    unseen: Collection[int] = (),
    memory_budget: MemoryBudget | None = None,
) -> tuple[Recipe, list[dict[str, Any]]]:
    """A recipe with fitted output projections, and a report for every one of them.

    Args:
        recipe: any recipe over the teacher's resident model; what is fitted on it already is the starting point.
        teacher: its hidden states on the calibration text, shared with other fits or not; the fit adds depths.
        unseen: sequences of the text that the fit must not see: neither fitted on nor used to choose the strength.
        memory_budget: what hidden states may take in memory.
    """
    work = _Work(recipe, teacher, settings or ClosedFormSettings(), frozenset(unseen), memory_budget or MemoryBudget())
    try:
        with torch.inference_mode():
            fitted, fits = work.run()
    finally:
        work.student.close()
    merged = {index: {**recipe.fitted.get(index, {}), **tensors} for index, tensors in fitted.items()}
    return replace(recipe, fitted={**recipe.fitted, **merged}), [asdict(entry) for entry in fits]


def spool_of(resident: LoadedModel, memory_budget: MemoryBudget) -> Path | None:
    """Where fitted tensors are kept in files: what is fitted on all layers of a streamed model takes more memory than
    one layer does. None: in memory."""
    return (memory_budget.folder or Path(tempfile.gettempdir())) if resident.streams else None


class _Work:
    """One fit under way: the teacher's hidden states, and the student's stream."""

    def __init__(
        self,
        recipe: Recipe,
        teacher: TeacherStates,
        settings: ClosedFormSettings,
        unseen: frozenset[int],
        memory_budget: MemoryBudget,
    ) -> None:
        self.recipe, self.teacher, self.settings = recipe, teacher, settings
        self.resident, self.batches = teacher.resident, teacher.batches
        self.loop = Loop(self.resident, self.batches, memory_budget=memory_budget)
        self.parts = fitted_parts(recipe, settings, self.resident.architecture)
        self.sequences = _seen(len(self.batches.corpus), unseen)
        self.student = self.loop.store()
        self.spool = spool_of(self.resident, memory_budget)

    def run(self) -> tuple[dict[int, dict[str, npt.NDArray[np.float32]]], list[LayerFit]]:
        fitted: dict[int, dict[str, npt.NDArray[np.float32]]] = {}
        fits: list[LayerFit] = []
        if not self.parts:
            return fitted, fits
        last = max(self.parts)
        modules = RecipeLayers(self.resident, self.recipe.layers[: last + 1], self.recipe.fitted).modules
        first = self._first(modules)
        # Spans of layers with a target do not overlap: no two have the same last layer.
        targets = {index: self.recipe.spans[index][1] for index in self.parts}
        self.teacher.learn({first, *targets.values()})
        with current().task("closed form", last + 1 - first) as task:
            for rows, _, _ in self.batches.over():
                self.student.put(0, rows.start, self.teacher.at(first, rows))
            if first not in targets.values():
                self.teacher.forget(first)
            for index, module in enumerate(self.resident.walk(modules[first:], ahead=False), first):
                task.note(f"layer {index + 1} of {len(self.recipe.layers)}")
                if index in targets:
                    module, tensors, reports = self.batches.whole(partial(self._fit, index, module))
                    fits += reports
                    if tensors:
                        fitted[index] = tensors
                layer = Placed(module, self.recipe.layers[index].sources[0].layer)
                self.loop.layer(layer, self.loop.reader(self.student), self._put)
                if index in targets:
                    self.teacher.forget(targets[index])
                task.advance()
        return fitted, fits

    def _fit(
        self, index: int, unfitted: nn.Module
    ) -> tuple[nn.Module, dict[str, npt.NDArray[np.float32]], list[LayerFit]]:
        module = twin(unfitted)  # fitting must leave the original model alone
        text = LayerText(
            loop=self.loop,
            inputs=self.loop.reader(self.student),
            targets=partial(self.teacher.at, self.recipe.spans[index][1]),
            source=self.recipe.layers[index].sources[0].layer,
            sequences=self.sequences,
        )
        parts, settings = self.parts[index], self.settings
        return module, *fit_layer(module, parts, text, index=index, settings=settings, spool=self.spool)

    def _first(self, modules: Sequence[nn.Module]) -> int:
        """The first layer that is not the teacher's own, or is fitted: before it the student's hidden states are the
        teacher's."""
        start, layers = min(self.parts), self.teacher.layers
        own = zip(modules[:start], layers, strict=False)  # of a stack, there are more of ours
        differs = (index for index, (ours, theirs) in enumerate(own) if ours is not theirs)
        return next(differs, min(start, len(layers)))

    def _put(self, passed: Passed) -> None:
        self.student.put(0, passed.rows.start, passed.after)


def _seen(sequences: int, unseen: Collection[int]) -> list[slice]:
    """The runs of sequences between those that a fit must not see."""
    ends = sorted({-1, *unseen, sequences})
    return [slice(before + 1, end) for before, end in pairwise(ends) if end > before + 1]


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
