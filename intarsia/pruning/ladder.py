"""Climbing down: a planner's steps, one after the other, each recorded before the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from intarsia.healing.settings import ClosedFormSettings
from intarsia.pruning.finalists import settle
from intarsia.pruning.heal_in_loop import Repair
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.methods.angular import Angular
from intarsia.pruning.methods.come import Come
from intarsia.pruning.methods.laco import Laco
from intarsia.pruning.methods.magnitude import PROTECTED, magnitudes
from intarsia.pruning.methods.mka import Mka
from intarsia.pruning.methods.one_shot import OneShot
from intarsia.pruning.methods.reverse import positions
from intarsia.pruning.methods.shortgpt import ShortGpt
from intarsia.pruning.methods.sleb import Sleb
from intarsia.pruning.methods.taylor import LAYERS_A_PASS, saliences
from intarsia.pruning.run_folder import RunFolder, Wanted
from intarsia.pruning.settings import ComeSettings, LacoSettings, Settings, SlebSettings
from intarsia.pruning.step import Planner, Step, describe, repaired, step_line
from intarsia.recipe.recipe import Recipe
from intarsia.recipe.schema import content_hash

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
    "taylor": lambda: OneShot(saliences, passes=1 + LAYERS_A_PASS),
    "taylor+": lambda: OneShot(saliences, passes=1 + LAYERS_A_PASS, protect=PROTECTED),
    "magnitude": lambda: OneShot(magnitudes, passes=0),
    "magnitude+": lambda: OneShot(magnitudes, passes=0, protect=PROTECTED),
    "reverse": lambda: OneShot(positions, passes=0),
}
_OTHERS: Mapping[str, Callable[[], Planner]] = {"shortgpt": ShortGpt, "mka": Mka, "angular": Angular}


def settings_of(method: str, given: Settings | None) -> Settings | None:
    """What a method is set to: what is given if it is this method's, else its defaults; None if it has no settings."""
    kinds: Mapping[str, type[Settings]] = {
        "come": ComeSettings,
        "come-p": ComeSettings,
        "sleb": SlebSettings,
        "laco": LacoSettings,
    }
    if method not in kinds:
        return None
    kind = kinds[method]
    return given if isinstance(given, kind) else kind()


def progressive_methods() -> list[str]:
    """Methods that measure the model anew after every step."""
    return [method for method in METHODS if planner_of(method).progressive]


def planner_of(method: str, settings: Settings | None = None) -> Planner:
    """The planner of that name (one of `METHODS`), with its own settings or their defaults."""
    if method in _ONE_SHOT:
        return _ONE_SHOT[method]()
    if method in _OTHERS:
        return _OTHERS[method]()
    own = settings_of(method, settings)
    if isinstance(own, LacoSettings):
        return Laco(own)
    if isinstance(own, SlebSettings):
        return Sleb(own)
    assert isinstance(own, ComeSettings), method
    return Come(own, posterior=method == "come-p")


def climb(
    planner: Planner,
    model: Intermediate,
    start: Recipe,
    target: int,
    run: RunFolder,
    *,
    in_loop: ClosedFormSettings | None = None,
) -> str | None:
    """Step down from `start` (the recipe that `model` holds) to `target` layers.

    Steps that the run has logged already are not done again: `start` is then the last logged recipe.

    Args:
        in_loop: repair what each step changes in closed form, before the next; for progressive planners.

    Returns:
        None, or why the planner stopped before the target.
    """
    assert in_loop is None or planner.progressive, "nothing looks at what would be repaired"
    repair = None if in_loop is None else Repair(model, in_loop)
    recipe = start
    log = run.log()
    history = [entry["evidence"] for entry in log]
    first = recipe.depth
    if model.depth > target:
        run.want(Wanted(layers=target))
        if history:
            model.progress.say(f"going on at {model.depth} layers, on the way down to {target}")
    with model.progress.task(f"{first} to {target} layers", first - target) as task:
        task.advance(first - model.depth)
        begun, spent = time.perf_counter(), model.layer_forwards
        if model.depth > target and (planner.progressive or (planner.measures and not history)):
            model.refresh()
            if not history:
                model.progress.say(f"{model.depth} layers: calibration loss {model.loss:.4f}")
        while model.depth > target:
            steps = _steps(planner, model, target, history, repairs=repair is not None)
            if not steps:
                run.want(Wanted(layers=target, stopped=planner.reason()))
                return planner.reason()
            before, step = model.depth, steps[0]
            evidence = step.evidence
            blocks = planner.settings.blocks if isinstance(planner, Come) and planner.posterior else 0
            if repair is not None and (blocks or len(steps) > 1):
                step, found = settle(repair, steps, blocks=blocks)
                evidence = {**step.evidence, "repair": found}
            elif step.whole is not None:
                model.become(step.whole)
            elif repair is not None:
                evidence = {**evidence, "repair": repair.replace(step.start, step.count, step.op)}
            else:
                model.replace(step.start, step.count, step.op, measure=planner.progressive)
            recipe = recipe.with_layers(
                model.ops, fitted={index: tensors for index, tensors in enumerate(model.fitted) if tensors}
            )
            history.append(evidence)
            run.append(
                {
                    "layers": model.depth,
                    "merged": [step.start, step.start + step.count],
                    "op": None if step.op is None else describe(step.op),
                    "evidence": evidence,
                    "loss": model.loss if planner.progressive else None,
                    "layer_forwards": model.layer_forwards - spent,
                    "seconds": time.perf_counter() - begun,
                    "recipe": run.recipe_path(model.depth).name,
                    "hash": content_hash(recipe),
                },
                recipe,
            )
            loss = model.loss if planner.progressive else None
            line = step_line(model.depth, step.start, step.op, loss, mixture=model.architecture.is_mixture("mlp"))
            model.progress.say(line + repaired(evidence))
            task.advance(before - model.depth)
            begun, spent = time.perf_counter(), model.layer_forwards
    return None


def _steps(
    planner: Planner, model: Intermediate, target: int, history: Sequence[Mapping[str, Any]], *, repairs: bool
) -> list[Step]:
    """The next step, or several that are repaired before one of them is chosen; none where nothing is allowed."""
    if repairs and isinstance(planner, Come) and planner.posterior and planner.settings.finalists > 1:
        return planner.steps(model, target, history, planner.settings.finalists)
    step = planner.decide(model, target, history)
    return [] if step is None else [step]
