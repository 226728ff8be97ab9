"""Reverse order: drop the last layer, then the one before it, and so on.

Source: the baseline of that name in Lu et al., arXiv 2411.15558: a layer's importance is the inverse of its position.
The simple heuristic of arXiv 2403.17887, which keeps the very last layer, is another one.
"""

from __future__ import annotations

from intarsia.pruning.intermediate import Intermediate


def positions(model: Intermediate) -> list[float]:
    """The deeper, the less."""
    return [float(-index) for index in range(model.depth)]
