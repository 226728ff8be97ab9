"""The interface of search engines, and the staged budgets that engines share.

An engine depends only on its seed and on the order of `ask` and `tell`; it reads no clock and no file. So a resumed
search asks a new engine everything again, and answers from the log.

Budgets as in Hyperband (Li et al., JMLR 18, 2018): the greatest, repeatedly divided by eta, down to the least.
Promotion is asynchronous (ASHA; Li et al., MLSys 2020), so that no worker waits for a stage to be complete: of every
eta candidates scored at a budget, one is promoted to the next. With several objectives, ParEGO's function ranks them,
with weights drawn for each promotion, so that the promoted candidates spread over the front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from random import Random
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from intarsia.tailoring.candidate import Candidate, Plain
from intarsia.tailoring.space import Space

if TYPE_CHECKING:
    from intarsia.tailoring.family_file import FamilyFile


@dataclass(frozen=True, kw_only=True)
class Start:
    """A candidate to start with, and its origin."""

    candidate: Plain
    origin: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """The task of an engine."""

    space: Space
    # Numbers of examples, ascending.
    budgets: tuple[int, ...]
    # Names of the objectives, in the order of the costs.
    objectives: tuple[str, ...]
    # One of this many candidates at a budget is promoted to the next.
    eta: int = 3
    seed: int = 0
    # First candidates.
    starts: tuple[Start, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A candidate to score at a budget; `origin` says in a few words where it comes from."""

    candidate: Candidate
    budget: int
    origin: str


class Engine(Protocol):
    """Proposes candidates.

    A class registered with `intarsia.registry.engine`, made from a `Task` and its settings, if it has any. A static
    method `check`, if there is one, is called before any heavy work, and may raise a UserError.
    """

    def ask(self, n: int) -> Sequence[Ask]:
        """At most `n` trials to run next; none if there is nothing new."""

    def tell(self, candidate: Candidate, budget: int, costs: tuple[float, ...] | None) -> None:
        """Take the costs of a candidate at a budget; None if it failed.

        Results come in any order, also some of an earlier search that this engine did not ask for.
        """


_TRIES = 200


def budget_ladder(least: int, most: int, eta: int) -> tuple[int, ...]:
    """The budgets, ascending: `most` divided by eta down to `least`, rounded to whole examples."""
    assert 1 <= least <= most and eta >= 2
    count = 0
    while most / eta ** (count + 1) >= least - 1e-9:
        count += 1
    return tuple(sorted({max(round(most / eta**step), 1) for step in range(count + 1)}))


def expected_trials(budgets: Sequence[int], trials: int, eta: int) -> dict[int, int]:
    """The approximate number of trials at each budget."""
    weights = [eta ** -float(step) for step in range(len(budgets))]
    counts = [int(trials * weight / sum(weights) + 1e-9) for weight in weights]
    counts[0] += trials - sum(counts)
    return dict(zip(budgets, counts, strict=True))


@dataclass(kw_only=True)
class Stage:
    """The results at one budget: candidates with their costs, in the order of `tell`."""

    budget: int
    costs: dict[Candidate, tuple[float, ...]] = field(default_factory=dict)
    promoted: set[Candidate] = field(default_factory=set)

    @property
    def waiting(self) -> list[Candidate]:
        """Candidates that are scored and not promoted yet."""
        return [candidate for candidate in self.costs if candidate not in self.promoted]


class Staged:
    """An engine with staged budgets; a subclass proposes new candidates."""

    def __init__(self, name: str, task: Task) -> None:
        self.space = task.space
        self._eta = task.eta
        self._rng = Random(f"{name}-{task.seed}")
        self._stages = [Stage(budget=budget) for budget in task.budgets]
        self._starts = list(task.starts)
        self._asked: set[Candidate] = set()

    def propose(self, stages: Sequence[Stage], rng: Random) -> tuple[Candidate, str]:
        """A new candidate and its origin, given the results at each budget (ascending)."""
        raise NotImplementedError

    def ask(self, n: int) -> list[Ask]:
        """Due promotions, else first candidates, else new ones."""
        return list(islice(iter(self._next, None), n))

    def _next(self) -> Ask | None:
        found = self._promotion(due=True)
        if found is not None:
            return found
        least = self._stages[0].budget
        while self._starts:
            start = self._starts.pop(0)
            if start.candidate not in self._asked:
                self._asked.add(start.candidate)
                return Ask(candidate=start.candidate, budget=least, origin=start.origin)
        for _ in range(_TRIES):
            candidate, origin = self.propose(self._stages, self._rng)
            if candidate not in self._asked:
                self._asked.add(candidate)
                return Ask(candidate=candidate, budget=least, origin=origin)
        return self._promotion(due=False)  # no new candidate is left

    def tell(self, candidate: Candidate, budget: int, costs: tuple[float, ...] | None) -> None:
        """Record a result. Those at other budgets are ignored; a failed candidate is never promoted, nor a parent."""
        self._asked.add(candidate)
        for below, stage in zip([None, *self._stages], self._stages, strict=False):
            if stage.budget == budget:
                if costs is not None:
                    stage.costs[candidate] = costs
                if below is not None:
                    # An earlier search may have promoted it.
                    below.promoted.add(candidate)

    def _promotion(self, *, due: bool) -> Ask | None:
        """Promote a candidate of the greatest stage that has some not promoted yet.

        Args:
            due: only if fewer than one in eta candidates of the stage is promoted.
        """
        for stage, above in reversed(list(pairwise(self._stages))):
            waiting = stage.waiting
            # Candidates scored only at a greater budget do not count as promoted.
            promoted = len(stage.costs) - len(waiting)
            if waiting and (not due or promoted < len(stage.costs) // self._eta):
                best = ranked(stage, waiting, draw_weights(len(stage.costs[waiting[0]]), self._rng))[0]
                stage.promoted.add(best)
                return Ask(candidate=best, budget=above.budget, origin="promotion")
        return None


ALPHA = 0.05  # of ParEGO's function
Costs: TypeAlias = Sequence[float]


def chebyshev(costs: Costs, weights: Sequence[float]) -> float:
    """The augmented Chebyshev value of scaled costs."""
    weighted = [weight * cost for weight, cost in zip(weights, costs, strict=True)]
    return max(weighted) + ALPHA * sum(weighted)


def draw_weights(count: int, rng: Random) -> tuple[float, ...]:
    """Weights that sum to 1, uniform over the simplex."""
    drawn = [-math.log(1.0 - rng.random()) for _ in range(count)]
    total = sum(drawn)
    return tuple(value / total for value in drawn) if total > 0.0 else (1.0 / count,) * count


def scaled(costs: Sequence[Costs], among: Sequence[Costs] = ()) -> list[tuple[float, ...]]:
    """Each objective's costs scaled from 0 (least) to 1 (greatest) among these or others; 0 if all are equal."""
    ranges = [(min(column), max(column)) for column in zip(*(among or costs), strict=True)]
    return [
        tuple((cost - low) / (high - low) if high > low else 0.0 for cost, (low, high) in zip(row, ranges, strict=True))
        for row in costs
    ]


def order(costs: Sequence[Costs], weights: Sequence[float], among: Sequence[Costs] = ()) -> list[int]:
    """The indices of some costs, best first under these weights; costs are scaled among these or others."""
    values = [chebyshev(row, weights) for row in scaled(costs, among)]
    return sorted(range(len(values)), key=values.__getitem__)


def ranked(stage: Stage, candidates: Sequence[Candidate], weights: Sequence[float]) -> list[Candidate]:
    """Some candidates of a stage, best first under these weights; costs are scaled over the whole stage."""
    everyone = list(stage.costs)
    chosen = set(candidates)
    places = order([stage.costs[candidate] for candidate in everyone], weights)
    return [everyone[place] for place in places if everyone[place] in chosen]


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """The size and cost of a search before it starts."""

    space: Space
    engine: str
    trials: int
    objectives: tuple[str, ...]
    # For each budget the approximate number of trials, and the examples of all objectives.
    stages: tuple[dict[str, int], ...]

    @property
    def layer_passes(self) -> int:
        """Examples times layers run on each, without sharing between trials."""
        return sum(stage["examples"] for stage in self.stages) * self.space.target

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        space, size = self.space, f"about 10^{self.space.log10_size:.1f} candidates"
        return {
            "space": f"{space.kind}: {space.depth} to {space.target} layers, {size}",
            "log10_size": space.log10_size,
            "engine": self.engine,
            "trials": self.trials,
            "objectives": list(self.objectives),
            "budgets": [dict(stage) for stage in self.stages],
            "layer_passes": self.layer_passes,
        }

    def words(self) -> str:
        """The log line."""
        space, budgets = self.space, ", ".join(f"{stage['trials']} at {stage['budget']}" for stage in self.stages)
        return (
            f"{space.depth} to {space.target} layers: about 10^{space.log10_size:.1f} candidates; "
            f"{self.trials} trials by {self.engine}, about {budgets} examples"
        )


def predict(file: FamilyFile, space: Space, budgets: Sequence[int], trials: int) -> Predicted:
    """Space, budgets and cost of a search."""
    objectives = tuple(objective.name for objective in file.objectives)
    stages = tuple(
        {"budget": budget, "trials": count, "examples": budget * count * len(objectives)}
        for budget, count in expected_trials(budgets, trials, file.search.eta).items()
    )
    return Predicted(space=space, engine=file.engine.name, trials=trials, objectives=objectives, stages=stages)
