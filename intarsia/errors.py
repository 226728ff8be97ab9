"""Errors of a user's input: one sentence, and one hint.

All problems of an input are reported at once. The command line prints them without a traceback and exits with code 2;
any other exception is a bug in Intarsia (code 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeAlias


@dataclass(frozen=True)
class Problem:
    """One problem of an input."""

    # The problem, in one sentence.
    message: str
    # The remedy, in one sentence.
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()


class UserError(ValueError):
    """Input that cannot be used: `UserError("--layers is 40, the model has 32.", "Give less than 32.")`."""

    def __init__(self, problems: str | Problem | Iterable[Problem], hint: str = "") -> None:
        problems = Problem(problems, hint) if isinstance(problems, str) else problems
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        assert self.problems, "a UserError states at least one problem"
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[UserError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


Rule: TypeAlias = tuple[bool, str, str]
"""A rule: whether it holds, and the message and hint if it does not."""


def check(*rules: Rule) -> None:
    """Check all given rules.

    Raises:
        UserError: with every rule that does not hold.
    """
    if problems := [Problem(message, hint) for holds, message, hint in rules if not holds]:
        raise UserError(problems)


def at_least(least: float, hint: str = "Give a larger number.", **numbers: float | None) -> list[Rule]:
    """Rules for numeric options, by flag; None counts as not given."""
    flags = {name: f"--{name.replace('_', '-')}" for name in numbers}
    return [
        (number is None or number >= least, f"{flags[name]} is {number}; it must be at least {least}.", hint)
        for name, number in numbers.items()
    ]


class Problems(list[Problem]):
    """Collects problems of several steps, to raise them together: a UserError inside `with problems:` is added."""

    def __enter__(self) -> Problems:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if isinstance(error, UserError):
            self.extend(error.problems)
        return isinstance(error, UserError)

    def add(self, message: str, hint: str = "") -> None:
        """Add one problem."""
        self.append(Problem(message, hint))

    def raise_any(self, *, most: int | None = None) -> None:
        """Raise all problems, or the first `most`, as one error, if there are any."""
        if self:
            raise UserError(list(dict.fromkeys(self))[:most])


def mismatch(where: str | Path, expected: str, found: str, hint: str = "") -> Problem:
    """The problem that an input has something else than expected."""
    return Problem(f"{where}: expected {expected}; found {found}.", hint)


def in_words(error: BaseException) -> str:
    """The type and message of an error, on one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".")


def few(names: Sequence[str], most: int = 5, *, between: str = ", ") -> str:
    """The first names of a list, and the number of the others."""
    return between.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def missing_package(
    package: str, *, where: str, extra: str, instead: str = "", error: ImportError | None = None
) -> UserError:
    """The error for an optional package that cannot be imported.

    Args:
        where: what needs it; it is in the extra `extra` of Intarsia.
        instead: an alternative, if there is one.
        error: of the import, if it was tried, as an installed package may be broken.
    """
    or_else = f", or {instead}" if instead else ""
    first_line = "" if error is None else str(error).partition("\n")[0]
    found = "is not installed" if error is None else f"cannot be imported: {first_line}"
    return UserError(
        f"{where} needs the package {package}, which {found}.",
        f"Install it (pip install 'intarsia[{extra}]'){or_else}.",
    )
