"""The search itself: questions of an engine go to workers, answers into the log and back to the engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from intarsia.errors import UserError
from intarsia.progress import current
from intarsia.recipe.recipe import Recipe
from intarsia.recipe.schema import content_hash
from intarsia.tailoring.candidate import Candidate
from intarsia.tailoring.engine import Ask, Engine
from intarsia.tailoring.history import EARLIER, Front, History, Key, Trial, front_of, leading
from intarsia.tailoring.workers import Done, Workers

_DOOMED = 5  # a search stops when its first trials all fail
_REPEATS = 1000
_LONGEST_PACE = 20


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is searched for."""

    trials: int
    objectives: tuple[str, ...]
    # The greatest budget.
    max_budget: int
    seed: int
    # What its trials are marked with.
    engine: str


def search(
    engine: Engine,
    history: History,
    workers: Workers,
    goal: Goal,
    *,
    recipe_of: Callable[[Candidate], Recipe],
    earlier: Sequence[Trial] = (),
    on_front: Callable[[Front], None] = lambda front: None,
    on_trial: Callable[[Set[str]], None] = lambda wanted: None,
) -> str | None:
    """Search until the log has as many trials as the goal says.

    Args:
        engine: a new one. It is asked everything that the log has answers to again, and so becomes what it was.
        earlier: trials of earlier searches on the same examples; they are added to the log, and the engine
            gets them first.
        on_front: called with the Pareto front whenever a trial has changed it.
        on_trial: called after every trial with the hashes of the recipes that may be scored or built again: those
            running, and those that lead at the greatest budget that they were tried at.

    Returns:
        None, or why the search ended before the goal.
    """
    for trial in earlier:
        if history.find(trial.key) is None:
            history.append(replace(trial, number=len(history), engine=EARLIER))
    run = _Run(engine, history, workers, goal, recipe_of)
    if len(history.made) >= goal.trials:
        return None
    run.tell_earlier()
    with current().task(f"{goal.trials} trials", goal.trials) as task:
        task.advance(len(history.made))
        task.note(words(history.trials, run.front()))
        run.stop_if_doomed()
        run.fill()
        while run.open:
            trial = run.collect(workers.next())
            front = run.front()
            task.note(words(history.trials, front, run.per_minute()))
            task.advance()
            if front is not None and any(point is trial for point in front.points):
                on_front(front)
            on_trial(run.wanted())
            run.stop_if_doomed()
            run.fill()
    return run.stopped


class _Run:
    """The state of a search: what is asked, running and answered."""

    def __init__(
        self, engine: Engine, history: History, workers: Workers, goal: Goal, recipe_of: Callable[[Candidate], Recipe]
    ) -> None:
        self._engine, self._history, self._workers, self._goal = engine, history, workers, goal
        self._recipe_of = recipe_of
        self.open: dict[int, tuple[Key, list[Ask]]] = {}
        self.stopped: str | None = None
        self._replayed: set[int] = set()
        self._repeats, self._submitted = 0, 0
        self._caught_up = False
        self._ends = [time.monotonic()]

    def tell_earlier(self) -> None:
        """Give the engine the trials of earlier searches, before its first question."""
        for trial in self._history.trials:
            if trial.engine == EARLIER:
                self._tell(trial)
                self._replayed.add(trial.number)

    def fill(self) -> None:
        """Ask for as many trials as there are free workers."""
        while self.stopped is None and (free := self._free()) > 0:
            asks = self._engine.ask(free)
            if not asks:
                # A running trial may give the engine new questions.
                if not self.open:
                    self.stopped = "the engine found nothing new to try"
                return
            for ask in asks:
                recipe = self._recipe_of(ask.candidate)
                self._take(ask, recipe, (content_hash(recipe), ask.budget))

    def _free(self) -> int:
        left = self._goal.trials - len(self._history.made) - len(self.open)
        return min(self._workers.count - len(self.open), left)

    def _tell(self, trial: Trial) -> None:
        self._engine.tell(trial.candidate, trial.budget, trial.costs)

    def _take(self, ask: Ask, recipe: Recipe, key: Key) -> None:
        """Answer from the log, or start a trial."""
        known = self._history.find(key)
        if known is not None:
            self._repeats += known.number in self._replayed
            self._replayed.add(known.number)
            self._engine.tell(ask.candidate, ask.budget, known.costs)
            if self._repeats >= _REPEATS:
                self.stopped = f"{_REPEATS} times the engine asked for what was tried already"
            return
        for under_way, asks in self.open.values():
            if under_way == key:
                asks.append(ask)
                return
        self._catch_up()
        self._repeats = 0
        self.open[self._submitted] = (key, [ask])
        self._workers.submit(self._submitted, recipe, ask.budget)
        self._submitted += 1

    def _catch_up(self) -> None:
        """Once the log has no more answers, give the engine those that it did not ask for again.

        With one worker there are none. With several, answers came in another order than now.
        """
        if not self._caught_up:
            self._caught_up = True
            for trial in self._history.trials:
                if trial.number not in self._replayed:
                    self._tell(trial)

    def collect(self, done: Done) -> Trial:
        """A trial came back: into the log, then to the engine."""
        (recipe, budget), asks = self.open.pop(done.number)
        found: dict[str, Any] = {"reason": done.reason}
        if done.outcome is not None:
            found = {name: getattr(done.outcome, name) for name in ("costs", "examples", "layer_forwards", "seconds")}
        trial = Trial(
            number=len(self._history),
            engine=self._goal.engine,
            origin=asks[0].origin,
            candidate=asks[0].candidate,
            recipe=recipe,
            budget=budget,
            seed=self._goal.seed,
            status="failed" if done.outcome is None else "ok",
            worker=done.worker,
            attempts=done.attempts,
            **found,
        )
        self._history.append(trial)
        self._replayed.add(trial.number)
        for ask in asks:
            self._engine.tell(ask.candidate, budget, trial.costs)
        self._ends = [*self._ends, time.monotonic()][-_LONGEST_PACE:]
        return trial

    def front(self) -> Front | None:
        """The Pareto front so far."""
        return front_of(self._history.trials, self._goal.objectives, max_budget=self._goal.max_budget)

    def per_minute(self) -> float | None:
        """The pace of the last trials."""
        minutes = (self._ends[-1] - self._ends[0]) / 60.0
        return (len(self._ends) - 1) / minutes if minutes > 0.0 else None

    def wanted(self) -> frozenset[str]:
        """The hashes of the recipes that are running or may be needed again."""
        return leading(self._history.trials) | {recipe for (recipe, _), _ in self.open.values()}

    def stop_if_doomed(self) -> None:
        """Stop where everything fails.

        Raises:
            UserError: saying why the trials failed.
        """
        trials = self._history.made
        if len(trials) < min(_DOOMED, self._goal.trials) or any(trial.status == "ok" for trial in trials):
            return
        reasons = list(dict.fromkeys(str(trial.reason) for trial in trials))
        raise UserError(
            f"The first {len(trials)} trials in {self._history.path} all failed: {'; '.join(reasons)}.",
            "Remove the cause and search into another folder: with --dtype float32 where numbers overflow, with fewer "
            "--workers or a smaller max_budget where memory is short.",
        )


def words(trials: Sequence[Trial], front: Front | None, per_minute: float | None = None) -> str:
    """Where a search is, in a few words: the best of each objective at the greatest budget so far, and the front."""
    if front is None:
        return "no score yet"
    best = ", ".join(f"{name} {front.least(name):.4g}" for name in front.objectives)
    failed = sum(trial.status == "failed" for trial in trials)
    parts = [f"best {best}", f"front {len(front.points)} at budget {front.budget}"]
    if failed:
        parts.append(f"{failed} failed")
    if per_minute is not None:
        parts.append(f"{per_minute:.3g} trials/min")
    return "; ".join(parts)
