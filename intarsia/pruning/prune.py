"""The step loop: take a planner's steps, and record each before the next."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from intarsia import progress
from intarsia.pruning.heal_in_loop import StepHealer
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.ladder import Ladder, Wanted
from intarsia.pruning.step import Planner, Step, describe, healed_words, step_line
from intarsia.recipe.recipe import Recipe
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
    report = progress.current()
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
            steps = planner.decide(model, target, history)
            if not steps:
                reason = planner.reason()
                if model.architecture.removal_only and not model.droppable():
                    reason = "every layer is the last of its kind, or the config cannot describe the model without it"
                ladder.want(Wanted(layers=target, stopped=reason))
                return reason
            before = model.depth
            step, evidence = _take(planner, model, healer, steps)
            recipe = recipe.with_layers(
                model.ops, fitted={index: tensors for index, tensors in enumerate(model.fitted) if tensors}
            )
            loss = model.loss if planner.progressive else None
            history.append(evidence)
            ladder.append(
                {
                    "layers": model.depth,
                    "merged": [step.start, step.start + step.count],
                    "op": None if step.op is None else describe(step.op),
                    "evidence": evidence,
                    "loss": loss,
                    "layer_forwards": model.layer_forwards - spent,
                    "seconds": time.perf_counter() - started,
                    "recipe": ladder.recipe_path(model.depth).name,
                    "hash": content_hash(recipe),
                },
                recipe,
            )
            line = step_line(model.depth, step.start, step.op, loss, mixture=model.architecture.is_mixture("mlp"))
            report.say(line + healed_words(evidence))
            task.advance(before - model.depth)
            started, spent = time.perf_counter(), model.layer_forwards
    return None


def _take(
    planner: Planner, model: Intermediate, healer: StepHealer | None, steps: Sequence[Step]
) -> tuple[Step, dict[str, Any]]:
    """Change the model by the best step; of several finalists, the one that is best after healing."""
    if healer is not None:
        step, found = healer.take(steps)
        return step, {**step.evidence, "heal": found}
    step = steps[0]
    if step.whole is not None:
        model.become(step.whole)
        if planner.progressive:
            model.refresh()
    else:
        model.replace(step.start, step.count, step.op, measure=planner.progressive)
    return step, dict(step.evidence)
