"""The original without one block of adjacent layers, as further starts of the final heal.

Steps are greedy, and their path need not lead to the best model: dropping one block of layers at once can give a better
healed model (dev/LOG.md). The blocks whose angular distance is below the median (arXiv 2403.17887 takes the smallest)
are compared by calibration loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from intarsia.architecture.spec import Architecture
from intarsia.healing.closed_form import Start
from intarsia.progress import current
from intarsia.pruning.estimate import blocks_raced
from intarsia.pruning.race import best_of, mean_loss
from intarsia.pruning.step import Change, without_half_layers
from intarsia.recipe.algebra import half_layers
from intarsia.recipe.recipe import Op, Recipe, identity

if TYPE_CHECKING:
    from intarsia.pruning.intermediate import Intermediate


def best_blocks(model: Intermediate, removed: int, number: int) -> list[dict[str, Any]]:
    """The blocks of `removed` layers whose removal gives the least calibration loss, best first.

    Race the half of the whole-layer blocks with the least angular distance, then the best of them against themselves
    shifted by half a layer either way: a shifted block runs from the MLP of one layer to the attention of a later one.

    Args:
        model: the original, measured.
        number: how many to return.

    Returns:
        The first layer of each (`start`), the layer after its last (`end`), whether it is shifted by half a layer
        (`half`: the attention of the first and the MLP of the last stay), and the loss without it in nats on the text
        that it was raced on (`loss`).
    """
    starts = sorted(model.droppable(removed), key=lambda start: model.span_distance(start, removed, "all-tokens"))
    if not starts:
        return []
    likely = sorted(starts[: blocks_raced(len(starts), number)])
    whole = [Change(start=start, count=removed, ops=()) for start in likely]
    with current().task("", 2) as task:
        found = _raced(model, whole, number, f"dropping {removed} adjacent layers")
        task.advance()
        shifted = {start for block, _ in found for start in (block.start - 1, block.start)}
        halves = [
            Change(start=start, count=removed + 1, ops=(op,))
            for start in sorted(shifted.intersection(range(model.depth - removed)))
            if (op := without_half_layers(model, start, removed + 1)) is not None
        ]
        if halves:
            both = [*(block for block, _ in found), *halves]
            found = _raced(model, both, number, f"dropping {removed} layers, shifted by half a layer")
    return [
        {"start": block.start, "end": block.start + block.count, "half": bool(block.ops), "loss": loss}
        for block, loss in found
    ]


def _raced(model: Intermediate, blocks: Sequence[Change], number: int, title: str) -> list[tuple[Change, float]]:
    """The blocks of least loss, best first, each with the loss without it on the text that it was raced on."""
    _, sums = model.race(blocks, racing=True, keep=number, title=title)
    return [(blocks[index], mean_loss(sums[index], model.counts_N)) for index in best_of(sums, number)]


def starts_of(recipe: Recipe, blocks: Sequence[Mapping[str, Any]], architecture: Architecture) -> tuple[Start, ...]:
    """The original without each block, where that is not the recipe itself."""
    whole = identity(recipe.variant(recipe.base), recipe.depth).layers
    found: list[Start] = []
    for block in blocks:
        first, end = block["start"], block["end"]
        name = f"the original without layers {first} to {end - 1}"
        joined: tuple[Op, ...] = ()
        if block.get("half"):
            joined = (half_layers(whole[first], whole[end - 1], "fold", architecture),)
            name = f"the original without mlp {first} to attention {end - 1}"
        layers = [*whole[:first], *joined, *whole[end:]]
        if tuple(layers) != tuple(recipe.layers) or recipe.fitted:
            found.append(Start(name=name, recipe=recipe.with_layers(layers)))
    return tuple(found)
