"""Reverse order: drop the last layer, then the one before it, and so on.

Source: the baseline of that name in Lu et al., arXiv 2411.15558: a layer's importance is the inverse of its position.
It differs from the simple heuristic of arXiv 2403.17887, which keeps the very last layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from intarsia.pruning.step import OneShot
from intarsia.registry import planner

if TYPE_CHECKING:
    from intarsia.pruning.intermediate import Intermediate


@planner("reverse", paper="2411.15558")
class Reverse(OneShot):
    """Drop the last layer, again and again."""

    passes = 0

    def score(self, model: Intermediate) -> list[float]:
        """Deeper layers get lower scores."""
        return [float(-index) for index in range(model.depth)]
