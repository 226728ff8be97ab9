"""What an engine is: asked for candidates, told what they cost.

An engine is a function of its seed and of the order of its questions and answers; it keeps no clock and reads no file.
So a search that goes on after a kill asks a new engine everything again, answers from the log, and has the same engine
as before. With one worker answers come in the order of the questions, and the log is that of an undisturbed run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from intarsia.tailoring.candidate import Candidate
from intarsia.tailoring.history import Trial


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A candidate to evaluate at a budget. `origin` says in a few words how it came to be.

    `token` is the engine's own.
    """

    engine: str
    candidate: Candidate
    budget: int
    origin: str
    token: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Start:
    """A candidate to begin with, and where it is from."""

    candidate: Candidate
    origin: str


class Engine(Protocol):
    """Decides what to try next."""

    @property
    def name(self) -> str:
        """What its trials are marked with."""

    def ask(self) -> Ask | None:
        """What to try next; None where nothing is left that was not asked before."""

    def tell(self, ask: Ask, trial: Trial) -> None:
        """What became of a question of this engine. Answers may come in any order."""

    def hear(self, trial: Trial) -> None:
        """A trial that this engine has not asked for: of another engine, or of an earlier search."""
