"""Several costs as one: ParEGO's augmented Chebyshev function (Knowles, IEEE TEC 10(1), 2006). Pure functions.

With weights lambda that sum to 1 and costs scaled to [0, 1]: max_i(lambda_i f_i) + alpha * sum_i(lambda_i f_i). Each
Pareto-optimal point is the best one for some weights, which is why an engine draws weights anew for every decision.
Deviation: the weights are drawn evenly from the simplex, not from a lattice on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from intarsia.tailoring.history import Trial

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


def dominates(first: Costs, second: Costs) -> bool:
    """Whether the first is nowhere worse and somewhere better."""
    pairs = list(zip(first, second, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def non_dominated(costs: Sequence[Costs]) -> list[int]:
    """The indices of the costs that no other ones dominate; of equal ones the first."""
    found = []
    for index, row in enumerate(costs):
        beaten = any(dominates(other, row) for other in costs)
        twin = any(tuple(costs[before]) == tuple(row) for before in range(index))
        if not beaten and not twin:
            found.append(index)
    return found


@dataclass(frozen=True, kw_only=True)
class Front:
    """The best that a search has found.

    Attributes:
        objectives: their names.
        budget: at which the trials were compared; `top` says whether it is the search's greatest.
        points: the trials of the front, by ascending first cost.
        rivals: all trials that succeeded at that budget.
    """

    objectives: tuple[str, ...]
    budget: int
    top: bool
    points: tuple[Trial, ...]
    rivals: tuple[Trial, ...]

    @property
    def knee(self) -> Trial:
        """The trial of the front that is best for equal weights: least in the augmented Chebyshev function of the
        costs, each scaled from the least to the greatest of all trials at this budget.

        Scaled by the front alone, a hair's breadth between two points would count as much as any other difference.
        """
        costs, among = [_costs(trial) for trial in self.points], [_costs(trial) for trial in self.rivals]
        return self.points[order(costs, equal_weights(len(self.objectives)), among)[0]]

    def best(self, objective: str) -> Trial:
        """The trial of least cost in an objective."""
        at = self.objectives.index(objective)
        return min(self.points, key=lambda trial: (_costs(trial)[at], trial.number))

    def rows(self) -> list[dict[str, Any]]:
        """A row for each trial: its costs, what it is best in, and how it was found."""
        return [
            {
                "trial": trial.number,
                **dict(zip(self.objectives, _costs(trial), strict=True)),
                "best": ", ".join(
                    [n for n in self.objectives if self.best(n) is trial] + ["knee"] * (trial is self.knee)
                ),
                "engine": trial.engine,
                "origin": trial.origin,
            }
            for trial in self.points
        ]

    def to_dict(self) -> dict[str, Any]:
        """As plain data.

        `points`: the trials as in the log, without how they were made; `best`: the numbers of the trials that are best
        in each objective; `knee`: the number of the knee's.
        """
        return {
            "objectives": list(self.objectives),
            "budget": self.budget,
            "top": self.top,
            "trials": len(self.rivals),
            "points": [
                {
                    "trial": trial.number,
                    "recipe": trial.recipe,
                    "costs": dict(zip(self.objectives, _costs(trial), strict=True)),
                    "engine": trial.engine,
                    "origin": trial.origin,
                }
                for trial in self.points
            ],
            "best": {name: self.best(name).number for name in self.objectives},
            "knee": self.knee.number,
        }


def front_of(trials: Iterable[Trial], objectives: Sequence[str], *, max_budget: int) -> Front | None:
    """The front of some trials; None where none has succeeded."""
    fine = [trial for trial in trials if trial.costs is not None]
    if not fine:
        return None
    budget = max(trial.budget for trial in fine)
    rivals = [trial for trial in fine if trial.budget == budget]
    points = [rivals[index] for index in non_dominated([_costs(trial) for trial in rivals])]
    return Front(
        objectives=tuple(objectives),
        budget=budget,
        top=budget >= max_budget,
        points=tuple(sorted(points, key=lambda trial: (_costs(trial), trial.number))),
        rivals=tuple(rivals),
    )


def leading(trials: Iterable[Trial]) -> frozenset[str]:
    """The hashes of the recipes that may be wanted again: of every budget the front, without those that have gone on to
    a greater one.
    """
    fine = [trial for trial in trials if trial.costs is not None]
    greatest: dict[str, int] = {}
    for trial in fine:
        greatest[trial.recipe] = max(trial.budget, greatest.get(trial.recipe, 0))
    found: set[str] = set()
    for budget in {trial.budget for trial in fine}:
        rivals = [trial for trial in fine if trial.budget == budget]
        front = {rivals[index].recipe for index in non_dominated([_costs(trial) for trial in rivals])}
        found |= {recipe for recipe in front if greatest[recipe] == budget}
    return frozenset(found)


def _costs(trial: Trial) -> tuple[float, ...]:
    assert trial.costs is not None
    return trial.costs
