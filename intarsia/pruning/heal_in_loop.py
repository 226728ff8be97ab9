"""The closed form inside the progressive loop: a layer is healed before the next step is chosen.

After a step, every layer that is new or stands for more original layers than before is fitted: its inputs are the
hidden states of the healed layers before it, its target the original's at the end of its span
(`intarsia.healing.closed_form`). The layers after it are run again, and if the loss of held-out sequences rises, the
layers stay as they were. Tensors fitted on a layer that is merged again are dropped: ops stay flat over original
layers. Where only a layer's span has grown, its fitted tensors are the starting point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from intarsia.activations.loop import Path
from intarsia.architecture.spec import Architecture
from intarsia.building.loaded_model import twin
from intarsia.healing.closed_form import spool_of
from intarsia.healing.layer_fit import LayerFit, LayerText, fit_layer, passes
from intarsia.healing.layer_map import trainable
from intarsia.healing.settings import ClosedFormSettings
from intarsia.healing.teacher import TeacherStates
from intarsia.pruning.intermediate import Intermediate
from intarsia.recipe.recipe import Op, derive_spans


def step_heal_forwards(
    architecture: Architecture,
    settings: ClosedFormSettings | None,
    current: int,
    *,
    finalists: int = 1,
) -> int:
    """Layer-forwards that healing one step of a model of `current` layers takes at most; none without settings.

    For each finalist two layers are fitted, the model is measured anew, and the held-out loss is measured twice.
    """
    if settings is None:
        return 0
    fit, held_out = passes(architecture, settings.changed), math.ceil(current / settings.held_out)
    return finalists * (2 * fit + current + 2 * held_out)


class StepHealer:
    """Heals the layers that a step changes."""

    def __init__(self, model: Intermediate, settings: ClosedFormSettings) -> None:
        self.model = model
        self.settings = settings

    def replace(self, start: int, count: int, op: Op | None) -> dict[str, Any]:
        """`Intermediate.replace`, and every layer healed that this changes.

        Returns:
            As plain data: the output projections that were fitted, whether the fit is accepted, the loss of held-out
            sequences without and with them, and how many layer-forwards this cost beside measuring the model.
        """
        model = self.model
        original = model.original()  # held while the whole model is what was measured
        first, due = self.exchange(start, count, op)
        if not due:
            model.measure(first)
            return {"output_projections": [], "taken": False, "held_out_loss": None, "layer_forwards": 0}
        held_out = self.held_out
        before = float(losses_after(model, first, held_out).sum())
        spent = (model.depth - first) * len(held_out) / len(model.corpus)
        unrepaired = {index: model.fitted[index] for index in due}
        fits, reached = self.fit(first, due, original)
        model.measure(reached)
        after = float(losses_after(model, model.depth, held_out).sum())
        changed = [index for index in due if model.fitted[index] is not unrepaired[index]]
        if changed and after >= before:
            for index in changed:
                model.fit(index, unrepaired[index])
            model.measure(first)
            spent += model.depth - first
        tokens = max(int(model.counts_N[held_out].sum()), 1)
        return {
            "output_projections": [asdict(fit) for fit in fits],
            "taken": bool(changed) and after < before,
            "held_out_loss": [before / tokens, after / tokens],
            "layer_forwards": len(due) * passes(model.architecture, self.settings.changed) + spent,
        }

    @property
    def held_out(self) -> list[int]:
        """The sequences that nothing is fitted on."""
        return list(range(0, self.model.rows.stop, self.settings.held_out))

    def fit(self, first: int, due: Mapping[int, int], original: TeacherStates) -> tuple[list[LayerFit], int]:
        """Fit layers towards their depths, in order, and measure those between them.

        Returns:
            What was fitted, and the layer from which on the model is to be measured: `first`, or a later one.
        """
        fits: list[LayerFit] = []
        reached = first
        for index, depth in due.items():
            if index > reached:
                self.model.measure(reached, index)
                reached = index
            fits += self._fit(index, original, depth)
        return fits, reached

    def exchange(self, start: int, count: int, op: Op | None) -> tuple[int, dict[int, int]]:
        """Make the change.

        Returns:
            The first layer whose output may change, and the layers to heal, each with the depth that it is fitted
            toward: the new layer, and one that now stands for more original layers than before.
        """
        model, depth = self.model, self.model.architecture.n_layers
        known = set(zip(model.ops, derive_spans(model.ops, depth), strict=True))
        model.replace(start, count, op, measure=False)
        due: dict[int, int] = {}
        for index, layer in enumerate(zip(model.ops, derive_spans(model.ops, depth), strict=True)):
            put_in = op is not None and index == start
            if trainable(*layer) and (put_in or layer not in known):
                due[index] = layer[1][1]
        return min([start, *due]), due

    @torch.inference_mode()
    def _fit(self, index: int, original: TeacherStates, depth: int) -> list[LayerFit]:
        model = self.model
        with model.resident.awake(model.modules[index]) as awake:
            module = twin(awake)  # fitting must leave the original model alone
            text = LayerText(
                loop=model.loop,
                inputs=partial(model.hidden_at, index),
                targets=partial(original.at, depth),
                source=model.ops[index].sources[0].layer,
                sequences=(model.rows,),
            )
            parts, spool = self.settings.changed, spool_of(model.resident, model.loop.memory_budget)
            tensors, fits = fit_layer(module, parts, text, index=index, settings=self.settings, spool=spool)
        if tensors:
            model.fit(index, {**(model.fitted[index] or {}), **tensors}, module)
        return fits


def losses_after(model: Intermediate, start: int, rows: Sequence[int]) -> Tensor:
    """Summed loss of some sequences as the layers are now, from H^start as it was measured: float64, `[rows]`."""

    def read(part: slice) -> Tensor:
        return model.hidden.rows(start, rows[part], model.resident.device)

    return next(model.loop.some(rows).losses([Path(layers=model.placed(start), read=read)]))
