"""The step loop: take a planner's steps, and record each before the next.

With `--heal-in-loop`, every layer that is new after a step, or whose span has grown, is fitted in closed form before
the next step is chosen: its inputs are the hidden states of the healed layers before it, its target the original's
after its span. If the held-out loss rises, the fit is rejected.

Tensors fitted on a layer that is merged again are dropped: ops stay flat over original layers. If only a layer's span
has grown, its fitted tensors are the starting point.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from intarsia.activations.loop import Path
from intarsia.building.loaded_model import twin
from intarsia.healing.closed_form import spool_of
from intarsia.healing.layer_fit import LayerFit, LayerText, fit_layer
from intarsia.healing.settings import ClosedFormSettings, trainable
from intarsia.healing.teacher import TeacherStates
from intarsia.progress import current
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.ladder import Ladder, Wanted
from intarsia.pruning.step import Planner, Step, describe, mlp_pieces, step_line
from intarsia.recipe.recipe import Op, Recipe, derive_spans
from intarsia.recipe.schema import content_hash


def prune(
    planner: Planner, model: Intermediate, start: Recipe, target: int, ladder: Ladder, *, spent: float | None = None
) -> str | None:
    """Step down from `start` (the recipe that `model` holds) to `target` layers.

    Steps already in the ladder are not repeated: `start` is then the last one.

    Args:
        spent: layer-forwards before the first step (default: all so far).

    Returns:
        None, or why the planner stopped before the target.
    """
    healer = None if planner.in_loop is None else StepHealer(model, planner.in_loop)
    report = current()
    recipe, first = start, start.depth
    history = [entry["evidence"] for entry in ladder.log()]
    planner.journal = ladder.run.log("search")
    if model.depth > target:
        ladder.want(Wanted(layers=target))
        if history:
            report.say(f"resuming at {model.depth} layers, on the way down to {target}")
    with report.task(f"{first} to {target} layers", first - target) as task:
        task.advance(first - model.depth)
        started, spent = time.perf_counter(), model.layer_forwards if spent is None else spent
        if model.depth > target and (planner.progressive or (planner.measures and not history)):
            model.refresh()
            if not history:
                report.say(f"{model.depth} layers: calibration loss {model.loss:.4f}")
        while model.depth > target:
            step = planner.decide(model, target, history)
            if step is None:
                reason = planner.reason()
                if model.architecture.removal_only and not model.droppable():
                    reason = "every layer is the last of its kind, or the config cannot describe the model without it"
                ladder.want(Wanted(layers=target, stopped=reason))
                return reason
            before = model.depth
            evidence = dict(step.evidence)
            if healer is not None:
                evidence["heal"] = healer.take(step)
            elif step.whole is not None:
                model.become(step.whole)
                if planner.progressive:
                    model.refresh()
            else:
                model.replace(step.start, step.count, step.op, measure=planner.progressive)
            recipe = recipe.with_layers(
                model.ops, fitted={index: tensors for index, tensors in enumerate(model.fitted) if tensors}
            )
            history.append(evidence)
            entry = {
                "layers": model.depth,
                "merged": [step.start, step.start + step.count],
                "op": None if step.op is None else describe(step.op),
                "evidence": evidence,
                "loss": model.loss if planner.progressive else None,
                "layer_forwards": model.layer_forwards - spent,
                "seconds": time.perf_counter() - started,
                "recipe": ladder.recipe_path(model.depth).name,
                "hash": content_hash(recipe),
            }
            ladder.append(entry, recipe)
            report.say(step_line(entry, mlp_pieces(model.architecture.is_mixture("mlp"))))
            task.advance(before - model.depth)
            started, spent = time.perf_counter(), model.layer_forwards
    return None


class StepHealer:
    """Heals the layers that a step changes."""

    def __init__(self, model: Intermediate, settings: ClosedFormSettings) -> None:
        self.model = model
        self.settings = settings

    def take(self, step: Step) -> dict[str, Any]:
        """Change the model by the step, with the fit if that lowers the held-out loss.

        Returns:
            As plain data: the fitted output projections, whether the fit is accepted, the held-out loss without and
            with it, and the layer-forwards without those of measuring the model.
        """
        model, original = self.model, self.model.original()  # kept while the measured model is the whole one
        spent, tokens = model.layer_forwards, max(int(model.counts_N[self.held_out].sum()), 1)
        first, due = self.exchange(step.start, step.count, step.op)
        modules, unhealed = list(model.modules), list(model.fitted)
        before = after = float(losses_after(model, first, self.held_out).sum())
        fits: list[LayerFit] = []
        reached = first
        for index, depth in due.items():
            if index > reached:
                model.measure(reached, index)
                reached = index
            fits += self._fit(index, original, depth)
        if any(new is not old for new, old in zip(model.fitted, unhealed, strict=True)):
            after = float(losses_after(model, first, self.held_out).sum())
        taken = after < before
        if not taken:
            model.modules, model.fitted = modules, unhealed
        spent = model.layer_forwards - spent
        model.measure(first)
        return {
            "output_projections": [asdict(fit) for fit in fits],
            "taken": taken,
            "held_out_loss": [before / tokens, after / tokens] if fits else None,
            "layer_forwards": spent,
        }

    @property
    def held_out(self) -> list[int]:
        """The sequences excluded from fitting."""
        return list(range(0, self.model.rows.stop, self.settings.held_out))

    def exchange(self, start: int, count: int, op: Op | None) -> tuple[int, dict[int, int]]:
        """Make the change.

        Returns:
            The first layer whose output may change, and the layers to heal, each with the depth of its target: the
            new layer, and one whose span has grown.
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
                sequences=model.rows,
            )
            parts, spool = self.settings.changed, spool_of(model.resident, model.loop.memory_budget)
            tensors, fits = fit_layer(module, parts, text, index=index, settings=self.settings, spool=spool)
        if tensors:
            model.fit(index, {**(model.fitted[index] or {}), **tensors}, module)
        return fits


def losses_after(model: Intermediate, start: int, rows: Sequence[int]) -> Tensor:
    """Summed loss of some sequences with the current layers, from the measured H^start: float64, `[rows]`."""

    def read(part: slice) -> Tensor:
        return model.hidden.rows(start, rows[part], model.resident.device)

    return next(model.loop.some(rows).losses([Path(layers=model.placed(start), read=read)]))
