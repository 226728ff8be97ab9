"""SLEB: remove, one after the other, the layer without which the calibration loss is least.

Source: Song et al., arXiv 2402.09025. Deviation: candidates are raced (published, and with `racing` off: all of them
see the whole calibration set). Each is run from the kept hidden states before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from intarsia.architecture.spec import Architecture
from intarsia.healing.settings import ClosedFormSettings
from intarsia.pruning.candidates import Change, losses_of
from intarsia.pruning.heal_in_loop import repair_forwards
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.race import mean_loss, race
from intarsia.pruning.settings import SlebSettings
from intarsia.pruning.step import Step, strides
from intarsia.recipe.ops import sources_of


class Sleb:
    """Greedy removal by calibration loss."""

    progressive = True
    measures = True

    def __init__(self, settings: SlebSettings | None = None) -> None:
        self.settings = settings or SlebSettings()

    def decide(self, model: Intermediate, target: int, history: Sequence[Mapping[str, Any]]) -> Step | None:
        """Try the model without each layer."""
        best, sums = race(
            range(model.depth),
            lambda starts, part: losses_of(
                model, [Change(start=start, count=1, ops=()) for start in starts], sequences=part
            ),
            model.counts_N,
            racing=self.settings.racing,
            progress=model.progress,
            title=f"skipping each of {model.depth} layers",
        )
        evidence = {
            "losses": [mean_loss(sums[start], model.counts_N) for start in range(model.depth)],
            "sequences": [sums[start].numel() for start in range(model.depth)],
            "dropped": sources_of([model.ops[best]]),
        }
        return Step(start=best, count=1, op=None, evidence=evidence)

    def reason(self) -> str:
        """Never asked: a layer can always be dropped."""
        return "no layer is left"

    def forwards_at_most(
        self, architecture: Architecture, target: int, sequences: int, in_loop: ClosedFormSettings | None
    ) -> int:
        """Every layer is tried, at the cost of those after it; then the model is measured."""
        return architecture.n_layers + sum(
            current * (current - 1) // 2 + current - 1 + repair_forwards(architecture, in_loop, current)
            for current, _ in strides(architecture.n_layers, target, 2)
        )
