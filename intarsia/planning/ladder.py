"""Climbing down: a planner's steps, one after the other, each recorded before the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from intarsia.planning.angular import Angular
from intarsia.planning.come import Come
from intarsia.planning.intermediate import Intermediate
from intarsia.planning.laco import Laco
from intarsia.planning.magnitude import PROTECTED, magnitudes
from intarsia.planning.mka import Mka
from intarsia.planning.one_shot import OneShot
from intarsia.planning.planner import Planner
from intarsia.planning.reverse import positions
from intarsia.planning.run_folder import RunFolder
from intarsia.planning.settings import ComeSettings, LacoSettings, Settings
from intarsia.planning.shortgpt import ShortGpt
from intarsia.planning.sleb import Sleb
from intarsia.planning.taylor import saliences
from intarsia.recipe.codec import content_hash
from intarsia.recipe.ops import Concat, Op
from intarsia.recipe.recipe import Recipe

METHODS = (
    "come",
    "come-p",
    "shortgpt",
    "sleb",
    "taylor",
    "taylor+",
    "magnitude",
    "magnitude+",
    "mka",
    "laco",
    "angular",
    "reverse",
)
_ONE_SHOT: Mapping[str, Callable[[], OneShot]] = {
    "taylor": lambda: OneShot(saliences, measures=True),
    "taylor+": lambda: OneShot(saliences, measures=True, protect=PROTECTED),
    "magnitude": lambda: OneShot(magnitudes, measures=False),
    "magnitude+": lambda: OneShot(magnitudes, measures=False, protect=PROTECTED),
    "reverse": lambda: OneShot(positions, measures=False),
}
_OTHERS: Mapping[str, Callable[[], Planner]] = {"shortgpt": ShortGpt, "sleb": Sleb, "mka": Mka, "angular": Angular}


def settings_of(method: str, given: Settings | None) -> Settings | None:
    """What a method is set to: what is given if it is this method's, else its defaults; None if it has no settings."""
    kind = ComeSettings if method.startswith("come") else LacoSettings if method == "laco" else None
    if kind is None:
        return None
    return given if isinstance(given, kind) else kind()


def planner_of(method: str, settings: Settings | None = None) -> Planner:
    """The planner of that name (one of `METHODS`), with its own settings or their defaults."""
    if method in _ONE_SHOT:
        return _ONE_SHOT[method]()
    if method in _OTHERS:
        return _OTHERS[method]()
    own = settings_of(method, settings)
    if isinstance(own, LacoSettings):
        return Laco(own)
    assert isinstance(own, ComeSettings), method
    return Come(own, posterior=method == "come-p")


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
        if model.depth > target and (planner.progressive or (planner.measures and not history)):
            model.refresh()
            if not history:
                model.progress.say(f"{model.depth} layers: calibration loss {model.loss:.4f}")
        while model.depth > target:
            step = planner.decide(model, target, history)
            if step is None:
                return planner.reason()
            before = model.depth
            if step.whole is None:
                model.replace(step.start, step.count, step.op, measure=planner.progressive)
            else:
                model.become(step.whole)
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
            task.advance(before - model.depth)
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
