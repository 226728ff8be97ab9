"""SLEB: remove, one after the other, the layer without which the calibration loss is least.

Source: Song et al., arXiv 2402.09025. No deviation; each candidate is run from the kept hidden states before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from intarsia.planning.intermediate import Intermediate
from intarsia.planning.planner import Step


class Sleb:
    """Greedy removal by calibration loss."""

    progressive = True
    measures = True

    def decide(self, model: Intermediate, target: int, history: Sequence[Mapping[str, Any]]) -> Step | None:
        """Try the model without each layer."""
        losses: list[float] = []
        with model.progress.task(f"skipping each of {model.depth} layers", model.depth) as task:
            for start in range(model.depth):
                sums_N = model.losses_with(start, 1, [])
                losses.append(float(sums_N.sum() / model.counts_N.sum()))
                task.advance()
        start = min(range(model.depth), key=lambda index: (losses[index], index))
        return Step(start=start, count=1, op=None, evidence={"losses": losses, "dropped": str(model.ops[start])})

    def reason(self) -> str:
        """Never asked: a layer can always be dropped."""
        return "no layer is left"
