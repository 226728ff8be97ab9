"""The original without one block of adjacent layers, as further starts of the final heal.

Steps are taken one by one, each the best of its time, and their path need not lead to the best model: where one block
of layers is dropped at once, the healed model can be better (dev/LOG.md). All blocks of that length are compared by
calibration loss; arXiv 2403.17887 takes the one across which the residual stream turns least.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from intarsia.healing.restarts import Start
from intarsia.pruning.candidates import Change, losses_of
from intarsia.pruning.race import best_of_groups, mean_loss, race
from intarsia.recipe.recipe import Recipe, identity

if TYPE_CHECKING:
    from intarsia.pruning.intermediate import Intermediate


def best_blocks(model: Intermediate, removed: int, number: int) -> list[dict[str, float]]:
    """The blocks of `removed` layers without which the calibration loss is least, the best first.

    Args:
        model: the original, measured.
        number: how many of them.

    Returns:
        The first layer of each (`start`), the layer after its last (`end`), and the loss without it in nats, as far as
        it was measured (`loss`).
    """
    starts = model.droppable(removed)
    if not starts:
        return []
    _, sums = race(
        starts,
        lambda some, part: losses_of(
            model, [Change(start=start, count=removed, ops=()) for start in some], sequences=part
        ),
        model.counts_N,
        racing=True,
        keep=number,
        title=f"dropping {removed} adjacent layers",
    )
    best = best_of_groups(sums, number)
    return [{"start": start, "end": start + removed, "loss": mean_loss(sums[start], model.counts_N)} for start in best]


def starts_of(recipe: Recipe, blocks: list[dict[str, float]]) -> tuple[Start, ...]:
    """The original without each block, where that is not the recipe itself."""
    whole = identity(recipe.variant(recipe.base), recipe.depth).layers
    found: list[Start] = []
    for block in blocks:
        first, end = int(block["start"]), int(block["end"])
        layers = [*whole[:first], *whole[end:]]
        if tuple(layers) != tuple(recipe.layers) or recipe.fitted:
            start = recipe.with_layers(layers)
            found.append(Start(name=f"that leaves {first} to {end - 1} out of the original", recipe=start))
    return tuple(found)
