"""A beam: the best few models of every depth go on, and not the best one alone.

CoMe-P takes the best next step, and its path is not the best one for that: a choice that is better at 27 layers may
lead to worse neighbours at 25 (dev/LOG.md). Here the N models of least calibration loss are kept at every depth,
distinct, whichever model before them they come from. The ladder holds the best one of each depth, so its recipes need
not contain one another; the others are kept beside it, for a run that goes on.

One model is measured at a time: from one to the next only what lies behind the first layer in which they differ is run
again. A step costs about N times as much.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from intarsia.errors import Problem, UserError
from intarsia.healing.closed_form_settings import ClosedFormSettings
from intarsia.planning.come import Come
from intarsia.planning.intermediate import Intermediate
from intarsia.planning.planner import Step
from intarsia.planning.run_folder import RunFolder, Wanted
from intarsia.planning.settings import ComeSettings, Settings
from intarsia.planning.told import describe, step_line
from intarsia.recipe.recipe import Recipe
from intarsia.recipe.schema import content_hash


@dataclass(frozen=True, kw_only=True)
class _Way:
    """A model one step further down: from the how-manieth of the models before, and by which step."""

    parent: int
    step: Step
    recipe: Recipe
    loss: float


def check_beam(method: str, settings: Settings | None, in_loop: ClosedFormSettings | None) -> None:
    """Refuse a beam where there is nothing to choose from, or where models are repaired on the way.

    Raises:
        UserError: saying which.
    """
    if not isinstance(settings, ComeSettings) or settings.beam == 1:
        return
    problems = []
    if method != "come-p":
        remedy = "Leave --beam out, or choose --method come-p."
        problems.append(Problem(where="--beam", expected="come-p, which tries layers", found=method, remedy=remedy))
    if in_loop is not None:
        problems.append(
            Problem(
                where="--beam",
                expected="no --heal-in-loop, which repairs one path",
                found="both",
                remedy="Leave one of them out; the closed form afterwards goes with either.",
            )
        )
    if problems:
        raise UserError(problems)


def descend(planner: Come, model: Intermediate, start: Recipe, target: int, run: RunFolder) -> str | None:
    """`ladder.climb` with as many models at once as the planner's settings say.

    Returns:
        None, or why none of them could go on to the target.
    """
    number = planner.settings.beam
    history = [entry["evidence"] for entry in run.log()]
    paths = [start, *run.others(len(start.layers))]
    first = start.depth
    with model.progress.task(f"{first} to {target} layers, {number} models at once", first - target) as task:
        task.advance(first - len(start.layers))
        while (before := len(paths[0].layers)) > target:
            begun, spent = time.perf_counter(), model.layer_forwards
            ways = _best(_ways(planner, model, paths, target, history), number)
            if not ways:
                run.want(Wanted(layers=target, stopped=planner.reason()))
                break
            best, paths = ways[0], [way.recipe for way in ways]
            history.append(best.step.evidence)
            depth, step = len(best.recipe.layers), best.step
            entry = {
                "layers": depth,
                "merged": [step.start, step.start + step.count],
                "op": None if step.op is None else describe(step.op),
                "evidence": step.evidence,
                "loss": best.loss,
                "layer_forwards": model.layer_forwards - spent,
                "seconds": time.perf_counter() - begun,
                "recipe": run.recipe_path(depth).name,
                "hash": content_hash(best.recipe),
                "beam": [_told(way) for way in ways],
            }
            run.append(entry, best.recipe, others=paths[1:])
            others = ", ".join(f"{way.loss:.4f}" for way in ways[1:])
            line = step_line(depth, step.start, step.op, best.loss, mixture=model.anatomy.is_mixture("mlp"))
            model.progress.say(line + (f" (others {others})" if others else ""))
            task.advance(before - depth)
    model.become(paths[0].layers)
    return planner.reason() if len(paths[0].layers) > target else None


def _ways(
    planner: Come, model: Intermediate, paths: Sequence[Recipe], target: int, history: Sequence[Any]
) -> list[_Way]:
    """The best steps from each of the models."""
    found: list[_Way] = []
    for parent, path in enumerate(paths):
        model.become(path.layers)
        model.refresh()
        if not history:
            model.progress.say(f"{model.depth} layers: calibration loss {model.loss:.4f}")
        for step in planner.steps(model, target, history, planner.settings.beam):
            assert step.loss is not None, "those that are to be compared have seen the whole calibration set"
            put_in = [] if step.op is None else [step.op]
            layers = [*path.layers[: step.start], *put_in, *path.layers[step.start + step.count :]]
            found.append(_Way(parent=parent, step=step, recipe=path.with_layers(layers), loss=step.loss))
    return found


def _best(ways: Sequence[_Way], number: int) -> list[_Way]:
    """Those of least loss, distinct: of equal models the first."""
    distinct: dict[Any, _Way] = {}
    for way in sorted(ways, key=lambda way: way.loss):
        distinct.setdefault(way.recipe.layers, way)
    return list(distinct.values())[:number]


def _told(way: _Way) -> dict[str, Any]:
    merged = [way.step.start, way.step.start + way.step.count]
    return {"loss": way.loss, "from": way.parent, "merged": merged, "hash": content_hash(way.recipe)}
