"""Climbing down: a planner's steps, one after the other, each recorded before the next."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from intarsia.planning.come import Come
from intarsia.planning.intermediate import Intermediate
from intarsia.planning.planner import Planner
from intarsia.planning.run_folder import RunFolder
from intarsia.planning.settings import ComeSettings
from intarsia.planning.shortgpt import ShortGpt
from intarsia.planning.sleb import Sleb
from intarsia.recipe.codec import content_hash
from intarsia.recipe.ops import Concat, Op
from intarsia.recipe.recipe import Recipe

METHODS = ("come", "come-p", "shortgpt", "sleb")


def planner_of(method: str, settings: ComeSettings) -> Planner:
    """The planner of that name (one of `METHODS`)."""
    if method == "shortgpt":
        return ShortGpt()
    if method == "sleb":
        return Sleb()
    return Come(settings, posterior=method == "come-p")


def climb(planner: Planner, model: Intermediate, start: Recipe, target: int, run: RunFolder) -> str | None:
    """Step down from `start` (the recipe that `model` holds) to `target` layers.

    Steps that the run has logged already are not done again: `start` is then the last logged recipe.

    Returns:
        None, or why the planner stopped before the target.
    """
    recipe = start
    log = run.log()
    history = [entry["evidence"] for entry in log]
    first = recipe.depth
    with model.progress.task(f"{first} to {target} layers", first - target) as task:
        task.advance(first - model.depth)
        begun, spent = time.perf_counter(), model.layer_forwards
        if model.depth > target and (planner.progressive or not history):
            model.measure()
            if not history:
                model.progress.say(f"{model.depth} layers: calibration loss {model.loss:.4f}")
        while model.depth > target:
            step = planner.decide(model, target, history)
            if step is None:
                return planner.reason()
            model.replace(step.start, step.count, step.op, measure=planner.progressive)
            recipe = recipe.with_layers(model.ops)
            history.append(step.evidence)
            run.append(
                {
                    "layers": model.depth,
                    "merged": [step.start, step.start + step.count],
                    "op": None if step.op is None else describe(step.op),
                    "evidence": step.evidence,
                    "loss": model.loss if planner.progressive else None,
                    "layer_forwards": model.layer_forwards - spent,
                    "seconds": time.perf_counter() - begun,
                    "recipe": run.recipe_path(model.depth).name,
                    "hash": content_hash(recipe),
                },
                recipe,
            )
            model.progress.say(_line(model, step.start, step.op, planner))
            task.advance(step.removed)
            begun, spent = time.perf_counter(), model.layer_forwards
    return None


def describe(op: Op) -> Mapping[str, Any]:
    """An op in short, for the log: sources, and how many pieces of each."""
    if isinstance(op, Concat):
        return {str(cut.source): {"kv_groups": len(cut.kv_groups), "channels": len(cut.channels)} for cut in op.cuts}
    return {str(source): "whole" for source in op.sources}


def _line(model: Intermediate, start: int, op: Op | None, planner: Planner) -> str:
    what = "dropped" if op is None else "merged into " + " + ".join(_short(op))
    loss = f", calibration loss {model.loss:.4f}" if planner.progressive else ""
    return f"{model.depth} layers: at {start}, {what}{loss}"


def _short(op: Op) -> list[str]:
    if isinstance(op, Concat):
        return [f"{cut.source.layer} ({len(cut.kv_groups)} groups, {len(cut.channels)} channels)" for cut in op.cuts]
    return [f"{source.layer} (whole)" for source in op.sources]
