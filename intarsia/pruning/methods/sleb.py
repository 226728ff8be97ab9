"""SLEB: remove, one after the other, the layer without which the calibration loss is least.

Source: Song et al., arXiv 2402.09025. Deviation: candidates are raced (published, and with `racing` off: all of them
see the whole calibration text). Each is run from the kept hidden states before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from intarsia.architecture.spec import Architecture
from intarsia.pruning.race import mean_loss, race, share_at_most
from intarsia.pruning.step import Progressive, ProgressiveSettings, Step, strides
from intarsia.recipe.ops import sources_of
from intarsia.registry import planner

if TYPE_CHECKING:
    from intarsia.pruning.intermediate import Intermediate


@dataclass(frozen=True, kw_only=True)
class SlebSettings(ProgressiveSettings):
    """How SLEB decides."""

    # Give a candidate up as soon as it is clearly worse than the best on part of the calibration text.
    racing: bool = True

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {"racing": False}}


@planner("sleb", settings=SlebSettings, paper="2402.09025")
class Sleb(Progressive):
    """Drop the layer without which the calibration loss is least."""

    def __init__(self, settings: SlebSettings) -> None:
        super().__init__(settings)
        self.settings = settings

    def decide(self, model: Intermediate, target: int, history: Sequence[Mapping[str, Any]]) -> list[Step]:
        """Try the model without each layer."""
        from intarsia.pruning.candidates import Change, losses_of

        free = model.droppable()
        if not free:
            return []
        best, sums = race(
            free,
            lambda starts, part: losses_of(
                model, [Change(start=start, count=1, ops=()) for start in starts], sequences=part
            ),
            model.counts_N,
            racing=self.settings.racing,
            title=f"skipping each of {len(free)} layers",
        )
        evidence = {
            "losses": [mean_loss(sums[start], model.counts_N) for start in free],
            "sequences": [sums[start].numel() for start in free],
            "dropped": sources_of([model.ops[best]]),
        }
        return [Step(start=best, count=1, op=None, evidence=evidence)]

    def forwards_at_most(self, architecture: Architecture, target: int, sequences: int) -> float:
        """Every layer is tried, at the cost of those after it; then the model is measured."""
        from intarsia.pruning.heal_in_loop import step_heal_forwards

        return architecture.n_layers + sum(
            share_at_most(current, sequences, racing=self.settings.racing) * current * (current - 1) / 2
            + current
            - 1
            + step_heal_forwards(architecture, self.in_loop, current)
            for current, _ in strides(architecture.n_layers, target, 2)
        )
