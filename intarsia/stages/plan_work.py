"""The work of a plan: from the last step that is recorded in a run folder to the depth that is asked for."""

from __future__ import annotations

from collections.abc import Callable

from intarsia.progress import reporting_to
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.ladder import climb, planner_of
from intarsia.pruning.run_folder import RunFolder
from intarsia.recipe.recipe import Recipe
from intarsia.stages.plan_input import Asked
from intarsia.stages.source import Source


def climbed(
    source: Source,
    folder: RunFolder,
    start: Recipe,
    wanted: Asked,
    *,
    behind_final_norm: bool,
    shared: Callable[[], Intermediate] | None,
) -> tuple[float, str | None]:
    """The steps down, recorded in the run folder: what they cost, and why there are no more, where some are missing.

    Args:
        start: what the next step begins with.
        behind_final_norm: whether the last layer's output is measured behind that.
        shared: gives the model, where it is shared with other plans; it is not closed then.

    Raises:
        UserError: the disk is full, or what is measured is not finite.
    """
    planner = planner_of(wanted.method, wanted.settings)
    if shared is None:
        current = Intermediate(
            source.resident,
            source.corpus,
            start.layers,
            fitted=start.fitted,
            batch_tokens=wanted.batch_tokens,
            behind_final_norm=behind_final_norm,
            room=source.placement.room(folder.path),
        )
    else:
        current = shared()
        current.become(start.layers, start.fitted)
    spent = current.layer_forwards
    try:
        with reporting_to(source.progress):
            stopped = climb(planner, current, start, wanted.target, folder, in_loop=wanted.in_loop)
    finally:
        if shared is None:
            current.close()
    if stopped is not None:
        source.progress.say(f"stopped at {current.depth} layers: {stopped}")
    return current.layer_forwards - spent, stopped
