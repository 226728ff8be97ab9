"""Staged budgets: many candidates on few examples, the better ones on more.

Budgets as in Hyperband (Li et al., JMLR 18, 2018): the greatest, divided by eta again and again, down to the least.
Promotion is asynchronous (ASHA; Li et al., MLSys 2020), so that no worker waits for a stage to be complete: of every
eta candidates that were scored at a budget one goes on to the next. Several objectives: who goes on is decided by
ParEGO's function with weights drawn for each promotion, so that the promoted ones spread over the front.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from intarsia.tailoring.candidate import Candidate
from intarsia.tailoring.engine import Ask, Start
from intarsia.tailoring.history import Trial
from intarsia.tailoring.pareto import draw_weights, order

_TRIES = 200


def budget_ladder(least: int, most: int, eta: int) -> tuple[int, ...]:
    """The budgets, ascending: `most` divided by eta while that is not less than `least`, rounded to whole examples."""
    assert 1 <= least <= most and eta >= 2
    count = 0
    while most / eta ** (count + 1) >= least - 1e-9:
        count += 1
    return tuple(sorted({max(round(most / eta**step), 1) for step in range(count + 1)}))


def expected_trials(budgets: Sequence[int], trials: int, eta: int) -> dict[int, int]:
    """About how many of some trials are made at each budget."""
    weights = [eta ** -float(step) for step in range(len(budgets))]
    counts = [int(trials * weight / sum(weights) + 1e-9) for weight in weights]
    counts[0] += trials - sum(counts)
    return dict(zip(budgets, counts, strict=True))


@dataclass(kw_only=True)
class Stage:
    """What is known at one budget: candidates with their costs, in the order in which they were told."""

    budget: int
    costs: dict[Candidate, tuple[float, ...]] = field(default_factory=dict)
    promoted: set[Candidate] = field(default_factory=set)

    @property
    def waiting(self) -> list[Candidate]:
        """Scored, and not promoted yet."""
        return [candidate for candidate in self.costs if candidate not in self.promoted]


Propose = Callable[[Sequence[Stage], Random], tuple[Candidate, str]]
"""A new candidate and how it came to be, from what is known at each budget (ascending)."""


class Staged:
    """An engine of staged budgets, around anything that proposes candidates."""

    def __init__(
        self, name: str, propose: Propose, budgets: Sequence[int], *, eta: int, seed: int, starts: Sequence[Start] = ()
    ) -> None:
        self.name = name
        self._propose = propose
        self._eta = eta
        self._rng = Random(f"{name}-{seed}")
        self._stages = [Stage(budget=budget) for budget in budgets]
        self._starts = list(starts)
        self._asked: set[Candidate] = set()

    def ask(self) -> Ask | None:
        """A promotion if one is due, else a candidate to begin with, else a new one."""
        found = self._promotion()
        if found is not None:
            return found
        least = self._stages[0].budget
        while self._starts:
            start = self._starts.pop(0)
            if start.candidate not in self._asked:
                self._asked.add(start.candidate)
                return Ask(engine=self.name, candidate=start.candidate, budget=least, origin=start.origin)
        for _ in range(_TRIES):
            candidate, origin = self._propose(self._stages, self._rng)
            if candidate not in self._asked:
                self._asked.add(candidate)
                return Ask(engine=self.name, candidate=candidate, budget=least, origin=origin)
        return self._last_promotion()

    def tell(self, ask: Ask, trial: Trial) -> None:
        """A failed candidate is neither promoted nor bred from; it has no costs that could be compared."""
        self._note(trial, ask.candidate)

    def hear(self, trial: Trial) -> None:
        """Counts as if it had been asked for here, at the budget that it had; other budgets cannot be compared."""
        self._asked.add(trial.candidate)
        self._note(trial, trial.candidate)

    def _note(self, trial: Trial, candidate: Candidate) -> None:
        for below, stage in zip([None, *self._stages], self._stages, strict=False):
            if stage.budget == trial.budget and trial.costs is not None:
                stage.costs[candidate] = trial.costs
            if stage.budget == trial.budget and below is not None:
                # Another engine may have taken it there.
                below.promoted.add(candidate)

    def _promotion(self) -> Ask | None:
        """From the greatest budget down, the first stage in which one of eta candidates has not gone on yet."""
        for stage, above in reversed(list(zip(self._stages, self._stages[1:], strict=False))):
            # Another engine may have scored others above alone: they have taken nobody's place.
            waiting = len(stage.waiting)
            if waiting and len(stage.costs) - waiting < len(stage.costs) // self._eta:
                return self._promote(stage, above)
        return None

    def _last_promotion(self) -> Ask | None:
        """Where there is no new candidate left: whatever has not gone on yet."""
        for stage, above in reversed(list(zip(self._stages, self._stages[1:], strict=False))):
            if stage.waiting:
                return self._promote(stage, above)
        return None

    def _promote(self, stage: Stage, above: Stage) -> Ask:
        candidates = stage.waiting
        count = len(stage.costs[candidates[0]])
        best = ranked(stage, candidates, draw_weights(count, self._rng))[0]
        stage.promoted.add(best)
        return Ask(engine=self.name, candidate=best, budget=above.budget, origin="promotion")


def ranked(stage: Stage, candidates: Sequence[Candidate], weights: Sequence[float]) -> list[Candidate]:
    """Some candidates of a stage, the best first for these weights; costs are scaled over the whole stage."""
    everyone = list(stage.costs)
    chosen = set(candidates)
    places = order([stage.costs[candidate] for candidate in everyone], weights)
    return [everyone[place] for place in places if everyone[place] in chosen]
