"""Several costs as one: ParEGO's augmented Chebyshev function (Knowles, IEEE TEC 10(1), 2006). Pure functions.

With weights lambda that sum to 1 and costs scaled to [0, 1]: max_i(lambda_i f_i) + alpha * sum_i(lambda_i f_i). Each
Pareto-optimal point is the best one for some weights, which is why an engine draws weights anew for every decision.
Deviation: the weights are drawn evenly from the simplex, not from a lattice on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

ALPHA = 0.05

Costs = Sequence[float]


def chebyshev(costs: Costs, weights: Sequence[float], *, alpha: float = ALPHA) -> float:
    """The augmented Chebyshev value of scaled costs."""
    weighted = [weight * cost for weight, cost in zip(weights, costs, strict=True)]
    return max(weighted) + alpha * sum(weighted)


def draw_weights(count: int, rng: Random) -> tuple[float, ...]:
    """Weights that sum to 1, each point of the simplex as likely as any other."""
    drawn = [-math.log(1.0 - rng.random()) for _ in range(count)]
    total = sum(drawn)
    return tuple(value / total for value in drawn) if total > 0.0 else (1.0 / count,) * count


def equal_weights(count: int) -> tuple[float, ...]:
    """Every objective counts as much."""
    return (1.0 / count,) * count


def scaled(costs: Sequence[Costs], among: Sequence[Costs] = ()) -> list[tuple[float, ...]]:
    """Each objective's costs from 0 (its least) to 1 (its greatest) among these or others; 0 where all are the same."""
    if not costs:
        return []
    known = among or costs
    lows = [min(column) for column in zip(*known, strict=True)]
    highs = [max(column) for column in zip(*known, strict=True)]
    return [
        tuple(
            (cost - low) / (high - low) if high > low else 0.0 for cost, low, high in zip(row, lows, highs, strict=True)
        )
        for row in costs
    ]


def order(costs: Sequence[Costs], weights: Sequence[float], among: Sequence[Costs] = ()) -> list[int]:
    """The indices of some costs, the best first under these weights; of equal ones the earlier first.

    They are scaled by what they are `among`, or by themselves.
    """
    values = [chebyshev(row, weights) for row in scaled(costs, among)]
    return sorted(range(len(values)), key=lambda index: (values[index], index))
