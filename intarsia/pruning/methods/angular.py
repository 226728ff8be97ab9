"""Angular: drop the block of adjacent layers over which the residual stream turns least.

Source: Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887: to drop n layers, the
block l .. l+n-1 with the least E[arccos(cos(H^l, H^{l+n}))] / pi over the last token of each sequence. No deviation.
Distances are measured once, on the whole model. The best block is chosen for each n, so it need not contain the smaller
one before it: the ladder's recipes are not nested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from intarsia.pruning.step import Planner, Step
from intarsia.recipe.recipe import LayerRef, Select
from intarsia.registry import planner

if TYPE_CHECKING:
    from intarsia.pruning.intermediate import Intermediate


@planner("angular", paper="2403.17887")
class Angular(Planner):
    """Drop the contiguous block over which the residual stream turns least."""

    def decide(self, model: Intermediate, target: int, history: Sequence[Mapping[str, Any]]) -> Step | None:
        """The best block that is one layer longer than the current one."""
        table: list[list[float]] = history[0]["distances"] if history else distances(model)
        depth = len(table) + 1
        count = depth - model.depth + 1
        found = table[count - 1]
        variant = model.ops[0].sources[0].variant
        free = [index for index in range(len(found)) if model.may_become([*range(index), *range(index + count, depth)])]
        if not free:
            return None
        start = min(free, key=lambda index: (found[index], index))
        kept = [layer for layer in range(depth) if not start <= layer < start + count]
        evidence: dict[str, Any] = {"dropped": [start, start + count], "distance": found[start]}
        if not history:
            evidence["distances"] = table
        return Step(
            start=start,
            count=count,
            op=None,
            whole=tuple(Select(source=LayerRef(variant=variant, layer=layer)) for layer in kept),
            evidence=evidence,
        )


def distances(model: Intermediate) -> list[list[float]]:
    """For n = 1 .. L-1 dropped layers: the distance over the block at each start 0 .. L-n."""
    from torch.nn.functional import normalize

    from intarsia.activations.statistics import last_real
    from intarsia.pruning.scores import angular_distance

    keep_NT = last_real(model.corpus.input_ids, model.corpus.mask)
    units = [normalize(model.tokens_at(depth, keep_NT).double(), dim=1) for depth in range(model.depth + 1)]

    def distance(first: int, last: int) -> float:
        cosine = (units[first] * units[last]).sum(dim=1).clamp(-1.0, 1.0)
        return float(angular_distance(cosine).mean())

    return [
        [distance(start, start + count) for start in range(model.depth - count + 1)] for count in range(1, model.depth)
    ]
