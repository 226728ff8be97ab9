"""What a trial gives: costs, or the reason why it has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class TrialFailed(Exception):
    """A candidate that could not be scored: NaN, or not enough memory. Never to be taken for a bad score."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a candidate costs, objective by objective, in the evaluator's order of them.

    Attributes:
        costs: to be minimised (accuracy is 1 - accuracy).
        examples: how many each objective was measured on.
        layer_forwards: what it took, in forward passes of one layer over all tokens of the budget.
        details: of each objective its standard error; `accuracy` of those that ask questions, with standard errors;
            what was found in the caches.
    """

    costs: tuple[float, ...]
    examples: tuple[int, ...]
    layer_forwards: float
    seconds: float
    details: Mapping[str, Any] = field(default_factory=dict)
