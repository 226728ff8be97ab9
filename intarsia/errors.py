"""What is said to a user whose input cannot be used.

Every problem names the place, what was expected there, what was found, and what to do about it. Several
problems of one input travel together, so that nobody mends a file one error at a time. The command line prints
them without a traceback and exits with code 2; anything that is not a `UserError` is a defect of ours (code 1).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with an input."""

    where: str
    expected: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}; found {self.found}. {self.remedy}"


class UserError(ValueError):
    """Input that cannot be used. `problems` holds at least one `Problem`."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        assert self.problems, "a UserError states at least one problem"
        super().__init__("\n".join(str(problem) for problem in self.problems))

    @classmethod
    def of(cls, *, where: str, expected: str, found: str, remedy: str) -> UserError:
        """An error with a single problem."""
        return cls([Problem(where=where, expected=expected, found=found, remedy=remedy)])

    def __reduce__(self) -> tuple[type[UserError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


def missing_package(
    package: str, *, where: str, extra: str, instead: str = "", error: ImportError | None = None
) -> UserError:
    """What is said where a package cannot be imported that not everybody needs.

    Args:
        where: what needs it; `extra` of Intarsia has it.
        instead: what else can be done, if anything.
        error: what came of importing it, where that was tried: one that is there may be broken.
    """
    or_else = f", or {instead}" if instead else ""
    return UserError.of(
        where=where,
        expected=f"the package {package}",
        found="it is not installed" if error is None else str(error).partition("\n")[0],
        remedy=f"Install it (pip install 'intarsia[{extra}]'){or_else}.",
    )
