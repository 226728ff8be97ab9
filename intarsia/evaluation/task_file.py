"""Tasks in local files: JSON lines of `query`, `choices`, `gold`, or of `query`, `target`.

A spec is a path with an optional part, as of text sources (`intarsia.data.sources`): `piqa.jsonl#0.33:1` is
the last two thirds. Shares are of the file's items here, so that the parts on the two sides of a cut share no item and
together have all of them: item i of n (from 0) is in START:END if START * n <= i < END * n.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from intarsia.data.sources import parse_share
from intarsia.errors import Problem, UserError
from intarsia.evaluation.choices import Question, Target

_SUFFIX = ".jsonl"
_MOST_TOLD = 20

Item = TypeVar("Item", Question, Target)


def names_a_file(spec: str) -> bool:
    """Whether a task is a local file rather than one of the harness."""
    return _split(spec)[0].suffix.lower() == _SUFFIX


def read_questions(spec: str, *, limit: int | None = None) -> tuple[str, tuple[Question, ...]]:
    """Name and questions of a task file, or of its part; with `limit` the first so many.

    Raises:
        UserError: the file cannot be read, lines of it are no questions (all of them are named), or none is left.
    """
    return _read(spec, limit, _question)


def read_targets(spec: str, *, limit: int | None = None) -> tuple[str, tuple[Target, ...]]:
    """Name and targets of a file of `query` and `target`; else as `read_questions`."""
    return _read(spec, limit, _target)


def _read(
    spec: str, limit: int | None, item_of: Callable[[Mapping[str, Any], str, list[Problem]], Item | None]
) -> tuple[str, tuple[Item, ...]]:
    path, part = _split(spec)
    start, end = (0.0, 1.0) if part is None else parse_share(part, where=spec)
    problems: list[Problem] = []
    items: list[Item] = []
    for number, line in enumerate(_lines(path, spec), start=1):
        if line.strip():
            where = f"{path}:{number}"
            record = _record(line, where, problems)
            item = None if record is None else item_of(record, where, problems)
            if item is not None:
                items.append(item)
    if problems:
        raise UserError(_first(problems, path))
    n = len(items)
    kept = [item for index, item in enumerate(items) if start * n <= index < end * n][:limit]
    if not kept:
        raise UserError.of(
            where=f"task file {spec}",
            expected="at least one item",
            found=f"{n} items in the file, none of them left" if n else "an empty file",
            remedy="Take a larger part or limit." if n else "Write one JSON object a line.",
        )
    return path.stem if part is None else f"{path.stem}#{part}", tuple(kept)


def _split(spec: str) -> tuple[Path, str | None]:
    if "#" not in spec or Path(spec).is_file():
        return Path(spec), None
    name, _, part = spec.rpartition("#")
    return Path(name), part


def _lines(path: Path, spec: str) -> list[str]:
    if not path.is_file():
        raise UserError.of(
            where=f"task file {spec}",
            expected="an existing file",
            found="a folder" if path.is_dir() else "nothing there",
            remedy="Check the path.",
        )
    try:
        # Not splitlines(): a line separator of Unicode may stand inside a JSON string.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError.of(
            where=f"task file {spec}",
            expected="a file that can be read",
            found=error.strerror or str(error),
            remedy="Check its permissions.",
        ) from error
    except UnicodeDecodeError as error:
        raise UserError.of(
            where=f"task file {spec}",
            expected="UTF-8 text",
            found=f"byte 0x{error.object[error.start]:02x} at offset {error.start}",
            remedy="Convert the file to UTF-8.",
        ) from None


def _record(line: str, where: str, problems: list[Problem]) -> Mapping[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        record, found = None, f"{line[:60]!r} ({error})"
    else:
        found = repr(line[:60])
    if isinstance(record, dict):
        return record
    problems.append(Problem(where=where, expected="a JSON object", found=found, remedy="Mend this line."))
    return None


def _question(record: Mapping[str, Any], where: str, problems: list[Problem]) -> Question | None:
    query, choices, gold = (record.get(key) for key in ("query", "choices", "gold"))
    before = len(problems)
    _text(record, "query", where, problems)
    if not isinstance(choices, list) or len(choices) < 2 or not all(_is_text(choice) for choice in choices):
        expected = "at least two choices, texts that are not blank"
        problems.append(_problem(where, "choices", expected, record))
    elif isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        expected = f"the index of the right choice, 0 to {len(choices) - 1}"
        problems.append(_problem(where, "gold", expected, record))
    if len(problems) > before:
        return None
    assert isinstance(query, str) and isinstance(choices, list) and isinstance(gold, int)
    return Question(query=query, choices=tuple(choices), gold=gold)


def _target(record: Mapping[str, Any], where: str, problems: list[Problem]) -> Target | None:
    before = len(problems)
    query, target = (_text(record, key, where, problems) for key in ("query", "target"))
    return None if len(problems) > before else Target(query=query, target=target)


def _text(record: Mapping[str, Any], key: str, where: str, problems: list[Problem]) -> str:
    value = record.get(key)
    if _is_text(value):
        return str(value)
    problems.append(_problem(where, key, "text that is not blank", record))
    return ""


def _is_text(value: Any) -> bool:
    """Text that a tokenizer takes: JSON can spell half of a surrogate pair."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= char <= "\udfff" for char in value)


def _problem(where: str, key: str, expected: str, record: Mapping[str, Any]) -> Problem:
    found = ascii(record[key])[:60] if key in record else f"no {key!r}; the keys {', '.join(map(repr, record))}"
    return Problem(where=f"{where}, {key}", expected=expected, found=found, remedy="Mend this line.")


def _first(problems: list[Problem], path: Path) -> list[Problem]:
    """So many problems that a person still reads them."""
    if len(problems) <= _MOST_TOLD:
        return problems
    rest = Problem(
        where=str(path),
        expected="lines that are items",
        found=f"{len(problems) - _MOST_TOLD} more problems",
        remedy="Mend the first ones.",
    )
    return [*problems[:_MOST_TOLD], rest]
