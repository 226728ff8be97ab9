"""SLEB: remove, one after the other, the layer whose removal changes the next-token distribution least.

Source: Song et al., arXiv 2402.09025. Deviations: candidates are compared by KL to the original (published, and with
`criterion` 'loss': by calibration loss), and raced (published, and with `racing` off: all of them run on the whole
calibration text). Each runs from the kept hidden states before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from intarsia.architecture.spec import Architecture
from intarsia.pruning.race import mean_loss, share_at_most
from intarsia.pruning.step import (
    Change,
    Criterion,
    Progressive,
    ProgressiveSettings,
    Step,
    strides,
    without_half_layers,
)
from intarsia.recipe.recipe import sources_of
from intarsia.registry import planner

if TYPE_CHECKING:
    from intarsia.pruning.intermediate import Intermediate


@dataclass(frozen=True, kw_only=True)
class SlebSettings(ProgressiveSettings):
    """How SLEB decides."""

    # Eliminate candidates that are clearly worse than the best on part of the calibration text.
    racing: bool = True
    # Also try to drop the MLP of each layer with the attention of the next one.
    half_layers: bool = False
    # Compare candidates and blocks by their loss, or by KL(original || candidate) of the next token.
    criterion: Criterion = "kl"

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"racing": False, "half_layers": False, "criterion": "loss"}
    }


@planner("sleb", settings=SlebSettings, paper="2402.09025")
class Sleb(Progressive):
    """Drop the layer whose removal changes the next-token distribution least."""

    def __init__(self, settings: SlebSettings) -> None:
        super().__init__(settings)
        self.settings = settings

    def decide(self, model: Intermediate, target: int, history: Sequence[Mapping[str, Any]]) -> Step | None:
        """Try the model without each layer and, on request, without each MLP and the attention after it."""
        tried = [Change(start=start, count=1, ops=()) for start in model.droppable()]
        if not tried:
            return None
        whole = len(tried)
        for start in range(model.depth - 1) if self.settings.half_layers else ():
            half = without_half_layers(model, start, 2)
            tried += [] if half is None else [Change(start=start, count=2, ops=(half,))]
        title = f"skipping each of {whole} layers"
        best, sums = model.race(tried, racing=self.settings.racing, title=title)
        losses = [mean_loss(sums[index], model.counts_N) for index in range(len(tried))]
        halves = {str(each.start): loss for each, loss in zip(tried, losses, strict=True) if each.ops}
        change = tried[best]
        evidence = {
            "losses": losses[:whole],
            **({"half_losses": halves} if halves else {}),
            "sequences": [sums[index].numel() for index in range(len(tried))],
            "dropped": sources_of(model.ops[change.start : change.start + 1]),
        }
        op = change.ops[0] if change.ops else None
        if op is not None:
            evidence["dropped"] = f"mlp {change.start} and attention {change.start + 1}"
        return Step(start=change.start, count=change.count, op=op, evidence=evidence)

    def forwards_at_most(self, architecture: Architecture, target: int, sequences: int) -> float:
        """Each removal re-runs the layers after it; then the model is measured."""
        tried = 2 if self.settings.half_layers else 1
        return architecture.n_layers + sum(
            tried * share_at_most(tried * current, sequences, racing=self.settings.racing) * current * (current - 1) / 2
            + current
            - 1
            + self.heal_forwards(architecture, current)
            for current, _ in strides(architecture.n_layers, target, 2)
        )
