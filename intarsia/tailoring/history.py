"""The log of a search: one trial a line, appended when it is finished and never changed.

`trials.jsonl` of a run folder (see `intarsia.run_dir.Log`). The keys of a line are the fields of `Trial`. When a search
is resumed, a new engine is asked everything again and answered from this log, so that all that an engine knows is a
function of the seed and the log.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from intarsia.errors import UserError
from intarsia.run_dir import Log
from intarsia.tailoring.candidate import Candidate, from_plain, to_plain

TRIALS = "trials.jsonl"
EARLIER = "earlier"
"""The engine of trials that were taken over from an earlier search. They count for nobody's goal."""
Key = tuple[str, int]
"""A recipe's hash and a budget: what is never evaluated twice."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A candidate that was evaluated at a budget, or that failed.

    Attributes:
        number: its place in the log, from 0.
        engine: who asked for it; `origin` how it came to be: `warm start: sleb`, `random`, `promotion`, ...
        recipe: the content hash of its recipe.
        costs: one for each objective, less is better; None where it failed.
        examples: on how many examples of each objective.
        layer_forwards: what it took, in layers over the tokens of the budget.
        attempts: how often it was tried; `reason` why it failed at last.
    """

    number: int
    engine: str
    origin: str
    candidate: Candidate
    recipe: str
    budget: int
    seed: int
    status: Literal["ok", "failed"]
    costs: tuple[float, ...] | None = None
    examples: tuple[int, ...] = ()
    layer_forwards: float = 0.0
    seconds: float = 0.0
    worker: str = "0"
    attempts: int = 1
    reason: str | None = None

    def __post_init__(self) -> None:
        assert (self.status == "ok") == (self.costs is not None) == (self.reason is None)

    @property
    def key(self) -> Key:
        """What makes it another trial than others."""
        return self.recipe, self.budget

    def to_dict(self) -> dict[str, Any]:
        """As plain data: a line of the log."""
        return {
            "number": self.number,
            "engine": self.engine,
            "origin": self.origin,
            "recipe": self.recipe,
            "budget": self.budget,
            "seed": self.seed,
            "status": self.status,
            "costs": None if self.costs is None else list(self.costs),
            "examples": list(self.examples),
            "layer_forwards": self.layer_forwards,
            "seconds": round(self.seconds, 4),
            "worker": self.worker,
            "attempts": self.attempts,
            "reason": self.reason,
            "candidate": to_plain(self.candidate),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trial:
        """The trial of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: it is no such data.
        """
        costs = data["costs"]
        return cls(
            **{
                **data,
                "candidate": from_plain(data["candidate"]),
                "costs": None if costs is None else tuple(float(cost) for cost in costs),
                "examples": tuple(int(count) for count in data["examples"]),
            }
        )


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
            except (KeyError, TypeError, ValueError, AssertionError) as error:
                raise UserError(
                    f"Line {number} of {path} is no trial: {type(error).__name__}: {error}.",
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
