"""The methods of a comparison as a user writes them: `come,come-p[spans=1],come[norm=average,sharpness=2]`.

What stands in brackets are fields of the method's settings (`intarsia.pruning.settings`), so that a new field needs
nothing here; besides, for progressive methods, `heal_in_loop=true` repairs what each step changes before the next.
"""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from intarsia.errors import Problem, UserError
from intarsia.healing.settings import ClosedFormSettings
from intarsia.pruning.finalists import check_finalists
from intarsia.pruning.ladder import METHODS, settings_of
from intarsia.pruning.settings import Settings

_IN_LOOP = "heal_in_loop"
_FORM = re.compile(r"([^\[\]]+)(?:\[([^\[\]]*)\])?")
_SEPARATOR = re.compile(r",(?![^\[\]]*\])")  # a comma that stands in no brackets
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One method of a comparison. `name` is what its rows are called; `in_loop` how it repairs as it goes, or None."""

    name: str
    method: str
    settings: Settings | None
    in_loop: ClosedFormSettings | None = None

    @property
    def folder(self) -> str:
        """The name as a file name: `come[norm=average]` is `come-norm-average`."""
        return re.sub(r"[\[,=]", "-", self.name.rstrip("]"))


def parse_methods(given: str | Sequence[str]) -> tuple[Entrant, ...]:
    """The methods, comma separated or as a list.

    Raises:
        UserError: with everything that is wrong with any of them.
    """
    texts = _SEPARATOR.split(given) if isinstance(given, str) else [each for text in given for each in _split(text)]
    entrants: list[Entrant] = []
    problems: list[Problem] = []
    for text in filter(None, map(str.strip, texts)):
        try:
            entrant = _entrant(text)
        except UserError as error:
            problems += error.problems
            continue
        if any(other.name == entrant.name for other in entrants):
            problems.append(_problem(text, "every method once", "it again", "Leave it out."))
        entrants.append(entrant)
    if not entrants and not problems:
        problems.append(_problem("", f"some of {', '.join(METHODS)}", "none", "Name at least one."))
    if problems:
        raise UserError(problems)
    return tuple(entrants)


def _split(text: str) -> list[str]:
    return _SEPARATOR.split(text)


def _entrant(text: str) -> Entrant:
    form = _FORM.fullmatch(text)
    if form is None:
        raise UserError([_problem(text, "NAME or NAME[option=value,...]", repr(text), "Write it like come[spans=1].")])
    method, options = form[1].strip(), [part.strip() for part in (form[2] or "").split(",") if part.strip()]
    if method not in METHODS:
        near = get_close_matches(method, METHODS, n=1)
        remedy = f"Did you mean {near[0]}?" if near else "Choose one of them."
        raise UserError([_problem(text, f"one of {', '.join(METHODS)}", repr(method), remedy)])
    settings = settings_of(method, None)
    if not options:
        return Entrant(name=method, method=method, settings=settings)
    if settings is None:
        raise UserError([_problem(text, f"no options: {method} has none", form[2], f"Write {method}.")])
    values = _values(text, type(settings), options)
    written = ",".join(f"{name}={_written(value)}" for name, value in values.items())
    heal_in_loop = values.pop(_IN_LOOP, False)
    try:
        chosen = replace(settings, **values)
    except UserError as error:
        raise UserError(
            replace(problem, where=f"--methods {text}: {problem.where}", remedy="Give it such a value.")
            for problem in error.problems
        ) from error
    in_loop = ClosedFormSettings() if heal_in_loop else None
    check_finalists(method, chosen, in_loop)
    return Entrant(name=f"{method}[{written}]", method=method, settings=chosen, in_loop=in_loop)


def _values(text: str, kind: type[Settings], options: Sequence[str]) -> dict[str, Any]:
    # Every method with settings is a progressive one.
    hints = {**get_type_hints(kind), _IN_LOOP: bool}
    names = [*(field.name for field in fields(kind)), _IN_LOOP]
    found: dict[str, Any] = {}
    problems: list[Problem] = []
    for option in options:
        key, _, value = option.partition("=")
        name = key.strip().replace("-", "_")
        if name not in names:
            near = get_close_matches(name, names, n=1)
            remedy = f"Did you mean {near[0]}?" if near else "Choose one of them."
            problems.append(_problem(text, f"an option among {', '.join(names)}", repr(key.strip()), remedy))
        elif name in found:
            problems.append(_problem(text, "every option once", f"{name} again", "Leave it out."))
        else:
            try:
                found[name] = _value(value.strip(), hints[name])
            except ValueError as error:
                problems.append(_problem(f"{text}: {name}", str(error), repr(value.strip()), "Give it such a value."))
    if problems:
        raise UserError(problems)
    return found


def _value(text: str, hint: Any) -> Any:
    """A value of an annotated type.

    Raises:
        ValueError: saying what is expected.
    """
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        return None if text == "none" else _value(text, kinds[0])
    if get_origin(hint) is Literal:
        if text not in get_args(hint):
            raise ValueError(f"one of {', '.join(get_args(hint))}")
        return text
    if hint is bool:
        if text.lower() not in _TRUTH:
            raise ValueError("true or false")
        return _TRUTH[text.lower()]
    try:
        return hint(text)
    except ValueError:
        raise ValueError("a whole number" if hint is int else "a number") from None


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _problem(text: str, expected: str, found: str, remedy: str) -> Problem:
    return Problem(where=f"--methods {text}".strip(), expected=expected, found=found, remedy=remedy)
