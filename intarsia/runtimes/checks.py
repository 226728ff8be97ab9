"""One thing that is looked at in a model folder, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from intarsia.errors import Problem, UserError

Outcome = Literal["ok", "failed", "skipped"]
_MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Check:
    """`found` says what was found, or why nothing was looked at; `remedy` only after a failure."""

    check: str
    outcome: Outcome
    found: str
    remedy: str | None = None


class Skipped(Exception):
    """Raised inside a check that has nothing to look at; its text says why."""


def checked(name: str, look: Callable[[], str]) -> Check:
    """What `look` finds; the problems of a `UserError` that it raises are the failure."""
    try:
        return Check(check=name, outcome="ok", found=look())
    except Skipped as reason:
        return Check(check=name, outcome="skipped", found=str(reason))
    except UserError as error:
        named = [f"{problem.where}: expected {problem.expected}; found {problem.found}" for problem in error.problems]
        more = len(named) - _MOST_NAMED
        text = "; ".join([*named[:_MOST_NAMED], *([f"and {more} more"] if more > 0 else [])])
        return Check(check=name, outcome="failed", found=text, remedy=error.problems[0].remedy)


def refuse(problems: Sequence[Problem]) -> None:
    """Fail the check that is under way, if there are problems.

    Raises:
        UserError: there are.
    """
    if problems:
        raise UserError(problems)
