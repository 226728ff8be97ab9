"""How long work tells where it is, whoever is listening.

Everything that takes more than a moment takes a `Progress`. The command line shows bars (`intarsia.cli.display`);
a library call is silent unless it is handed one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Task(Protocol):
    """One piece of long work that is under way."""

    def advance(self, n: float = 1.0) -> None:
        """`n` more of the task's total is done."""

    def note(self, text: str) -> None:
        """A few words on what is happening now, shown beside the bar; they replace the words before."""


class Progress(Protocol):
    """Where long work reports to."""

    def task(self, title: str, total: float) -> AbstractContextManager[Task]:
        """Start a task of `total` units; leaving the context ends it. Tasks may nest."""

    def say(self, text: str) -> None:
        """A line for the user that stays."""


class SilentTask:
    """A task that nobody watches."""

    def advance(self, n: float = 1.0) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


class Silent:
    """Progress that nobody watches: the default of every library call."""

    def task(self, title: str, total: float) -> AbstractContextManager[Task]:
        """A task that shows nothing."""
        return nullcontext(SilentTask())

    def say(self, text: str) -> None:
        """Nothing."""
