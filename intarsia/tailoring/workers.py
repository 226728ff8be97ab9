"""What a worker of a search is, and the one that is this process. A trial that fails is tried once more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from intarsia.errors import UserError
from intarsia.recipe.recipe import Recipe
from intarsia.tailoring.outcome import Outcome, TrialFailed

ATTEMPTS = 2
_LONGEST = 300  # Characters of a reason.


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a scorer works: worker `index` of `count` on this machine, on so many threads (None: as torch likes)."""

    index: int = 0
    count: int = 1
    threads: int | None = None


class Scorer(Protocol):
    """Scores recipes."""

    def evaluate(self, recipe: Recipe, budget: int) -> Outcome:
        """What a recipe costs on so many examples.

        Raises:
            TrialFailed: it has no cost.
        """

    def close(self) -> None:
        """Let go of everything."""


class Opener(Protocol):
    """Opens a scorer in the process in which it works; can be sent there."""

    def __call__(self, place: Place) -> Scorer:
        """The scorer."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """A trial that came back: an outcome, or the reason why there is none."""

    number: int
    outcome: Outcome | None
    reason: str | None
    attempts: int
    worker: str


class Workers(Protocol):
    """Takes trials and gives back what came of them."""

    @property
    def count(self) -> int:
        """How many trials run at once."""

    def submit(self, number: int, recipe: Recipe, budget: int) -> None:
        """Start a trial. Not more than `count` are under way."""

    def next(self) -> Done:
        """Wait for one."""


class InProcess:
    """One worker, this process."""

    count = 1

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._next: tuple[int, Recipe, int] | None = None

    def submit(self, number: int, recipe: Recipe, budget: int) -> None:
        """It runs when it is waited for."""
        assert self._next is None
        self._next = (number, recipe, budget)

    def next(self) -> Done:
        """Run it."""
        assert self._next is not None
        number, recipe, budget = self._next
        self._next = None
        attempt = 1
        outcome, reason = scored(self._scorer, recipe, budget)
        while outcome is None and attempt < ATTEMPTS:
            attempt += 1
            outcome, reason = scored(self._scorer, recipe, budget)
        return Done(number=number, outcome=outcome, reason=reason, attempts=attempt, worker="0")


def scored(scorer: Scorer, recipe: Recipe, budget: int) -> tuple[Outcome | None, str | None]:
    """An outcome, or why there is none.

    Raises:
        UserError: something that every trial would meet.
    """
    try:
        return scorer.evaluate(recipe, budget), None
    except TrialFailed as failure:
        return None, failure.reason[:_LONGEST]
    except UserError:
        raise
    except Exception as error:
        # Whatever a candidate makes a library do, the search goes on; five such trials at its beginning end it.
        words = " ".join(str(error).split())
        return None, f"{type(error).__name__}: {words}"[:_LONGEST]
