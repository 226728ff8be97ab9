"""The log of a search, one trial a line, and the Pareto front of its trials."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

from pydantic import PlainSerializer, TypeAdapter

from intarsia.errors import UserError
from intarsia.run_dir import Log
from intarsia.tailoring.candidate import Plain

TRIALS = "trials.jsonl"
EARLIER = "earlier"
"""The engine of trials that were taken over from an earlier search. They do not count toward the goal."""
Key = tuple[str, int]
"""A recipe's hash and a budget: what is never evaluated twice."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A candidate that was evaluated at a budget, or that failed."""

    # Its place in the log, from 0.
    number: int
    # Who asked for it, and how it came to be: `warm start: sleb`, `random`, `promotion`, ...
    engine: str
    origin: str
    # The content hash of its recipe.
    recipe: str
    budget: int
    seed: int
    status: Literal["ok", "failed"]
    # One for each objective, less is better; None where it failed.
    costs: tuple[float, ...] | None = None
    # The number of examples of each objective.
    examples: tuple[int, ...] = ()
    # The cost of the trial, in passes of one layer over the tokens of the budget.
    layer_forwards: float = 0.0
    seconds: Annotated[float, PlainSerializer(lambda seconds: round(seconds, 4))] = 0.0
    worker: str = "0"
    # How often it was tried, and why it failed at last.
    attempts: int = 1
    reason: str | None = None
    candidate: Plain

    def __post_init__(self) -> None:
        assert (self.status == "ok") == (self.costs is not None) == (self.reason is None)

    @property
    def key(self) -> Key:
        """What makes it another trial than others."""
        return self.recipe, self.budget

    def to_dict(self) -> dict[str, Any]:
        """As plain data: a line of the log."""
        found: dict[str, Any] = _TRIALS.dump_python(self)
        return found

    @classmethod
    def from_dict(cls, data: Any) -> Trial:
        """The trial of `to_dict`."""
        return _TRIALS.validate_python(data)


_TRIALS = TypeAdapter(Trial)


class History:
    """The trials of a run, in the order in which they were finished."""

    def __init__(self, path: Path) -> None:
        """Read what is there; nothing is written, so that a look at a run does not disturb the search.

        Raises:
            UserError: a line that is not the last one is no trial.
        """
        self.path = path
        self._log = Log(path)
        self._trials: list[Trial] = []
        for number, line in enumerate(self._log.entries(), start=1):
            try:
                self._trials.append(Trial.from_dict(line))
            except ValueError as error:
                raise UserError(
                    f"Line {number} of {path} is no trial: {' '.join(str(error).split())}.",
                    "Correct the line, or search into another folder.",
                ) from error
        self._by_key = {trial.key: trial for trial in self._trials}

    def __len__(self) -> int:
        return len(self._trials)

    def __iter__(self) -> Iterator[Trial]:
        return iter(self._trials)

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All of them."""
        return tuple(self._trials)

    @property
    def made(self) -> tuple[Trial, ...]:
        """Those that this search has made, not taken over."""
        return tuple(trial for trial in self._trials if trial.engine != EARLIER)

    def find(self, key: Key) -> Trial | None:
        """The trial of a recipe at a budget, if there was one."""
        return self._by_key.get(key)

    def append(self, trial: Trial) -> None:
        """Write a trial; when this returns it is on the disk."""
        assert trial.number == len(self._trials) and trial.key not in self._by_key
        self._log.append(trial.to_dict())
        self._trials.append(trial)
        self._by_key[trial.key] = trial


class TrialFailed(Exception):
    """A candidate that could not be scored: NaN, or not enough memory. Never to be taken for a bad score."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a candidate costs, objective by objective, in the evaluator's order of them."""

    # To be minimised (accuracy is 1 - accuracy).
    costs: tuple[float, ...]
    # The number of examples of each objective.
    examples: tuple[int, ...]
    # The cost of the trial, in forward passes of one layer over all tokens of the budget.
    layer_forwards: float
    seconds: float
    # The standard error of each objective; `accuracy` of those that ask questions, with standard errors; what was found
    # in the caches.
    details: Mapping[str, Any] = field(default_factory=dict)


ALPHA = 0.05  # of ParEGO's function

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

        Scaled by the front alone, the smallest difference between two points would count as much as any other.
        """
        costs, among = [_costs(trial) for trial in self.points], [_costs(trial) for trial in self.rivals]
        return self.points[order(costs, [1.0 / len(self.objectives)] * len(self.objectives), among)[0]]

    def best(self, objective: str) -> Trial:
        """The trial of least cost in an objective."""
        at = self.objectives.index(objective)
        return min(self.points, key=lambda trial: (_costs(trial)[at], trial.number))

    def least(self, objective: str) -> float:
        """The least cost in an objective."""
        return _costs(self.best(objective))[self.objectives.index(objective)]

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
    """The hashes of the recipes that may be needed again: the front of every budget, without promoted ones."""
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
