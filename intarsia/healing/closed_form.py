"""Closed-form healing: least squares instead of training.

An output layer with span (a, b] should turn the output of the healed layers before it into the original's H^b. Its
output projections (down_proj, o_proj) are fitted by ridge regression on their own inputs toward what is still missing
of H^b, and shrink toward the weights as they are: down_proj, then o_proj, then down_proj again after the changed
attention.
Layers after the first merge that stand for themselves alone have down_proj fitted, and o_proj where that is asked for:
they correct what those before left. With a plain removal and down_proj alone this is the special case of arXiv
2505.02819 without its extra matrix.

The student starts where it differs from the teacher. Statistics are Gram matrices, accumulated in a stream: memory is
one layer's, whatever the number of tokens. The ridge strength is chosen on held-out sequences, and a fit that does not
lower the held-out error is not taken.

Massive activations: a few tokens (attention sinks) have norms a hundred times the others', and plain least squares
would serve them alone. A token counts with weight 1 / |H^b|^2, as it does to the norm before the next layer.

Fitting o_proj toward the span's summed attention outputs instead was measured and is worse than leaving it alone: what
the removed layers' attention read is not what this layer's MLP can use (dev/LOG.md, closed form).

An output projection with a norm after it is fitted otherwise (`intarsia.healing.layer_fit`). The experts of a
mixture are not fitted; o_proj is, in their place.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from intarsia.activations.hidden_store import MemoryBudget
from intarsia.activations.loop import Loop, Passed
from intarsia.building.loaded_model import LoadedModel, twin
from intarsia.building.recipe_layers import Placed, RecipeLayers
from intarsia.healing.layer_fit import LayerFit, LayerText, fit_layer
from intarsia.healing.layer_map import fitted_parts
from intarsia.healing.settings import ClosedFormSettings
from intarsia.healing.teacher import TeacherStates
from intarsia.progress import current
from intarsia.recipe.recipe import Recipe


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
