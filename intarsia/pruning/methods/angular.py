"""Angular: drop the block of adjacent layers between whose ends the residual stream turns least.

Source: Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887: to drop n layers, the
block l .. l+n-1 with the least E[arccos(cos(H^l, H^{l+n}))] / pi over the last token of each sequence. No deviation.
Distances are measured once, on the whole model. The best block is chosen anew for every n, so a block need not hold
the smaller one before it: the ladder's recipes are not made from one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from intarsia.activations.statistics import last_real
from intarsia.architecture.spec import Architecture
from intarsia.healing.settings import ClosedFormSettings
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.scores import angular_distance
from intarsia.pruning.step import Step
from intarsia.recipe.ops import LayerRef, Select


class Angular:
    """One contiguous block for every depth."""

    progressive = False
    measures = True

    def decide(self, model: Intermediate, target: int, history: Sequence[Mapping[str, Any]]) -> Step | None:
        """The best block that is one layer longer than what is dropped now."""
        table: list[list[float]] = history[0]["distances"] if history else distances(model)
        depth = len(table) + 1
        count = depth - model.depth + 1
        found = table[count - 1]
        start = min(range(len(found)), key=lambda index: (found[index], index))
        variant = model.ops[0].sources[0].variant
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

    def reason(self) -> str:
        """Never asked: a block can always be dropped."""
        return "no layer is left"

    def forwards_at_most(
        self, architecture: Architecture, target: int, sequences: int, in_loop: ClosedFormSettings | None
    ) -> int:
        """One pass over the whole model."""
        return architecture.n_layers


def distances(model: Intermediate) -> list[list[float]]:
    """For n = 1 .. L-1 dropped layers: the distance between the ends of the block at each start 0 .. L-n."""
    keep_NT = last_real(model.corpus.input_ids, model.corpus.mask)
    units = [
        torch.nn.functional.normalize(model.tokens_at(depth, keep_NT).double(), dim=1)
        for depth in range(model.depth + 1)
    ]

    def distance(first: int, last: int) -> float:
        cosine = (units[first] * units[last]).sum(dim=1).clamp(-1.0, 1.0)
        return float(angular_distance(cosine).mean())

    return [
        [distance(start, start + count) for start in range(model.depth - count + 1)] for count in range(1, model.depth)
    ]
