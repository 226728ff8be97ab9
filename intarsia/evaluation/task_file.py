"""Tasks in local files: JSON lines of `query`, `choices`, `gold`; of `query`, `answer`; or of `query`, `target`.

An answer is written by the model. It is right if its last number is that of the answer, where the answer ends in one;
else if both are the same text apart from case, punctuation, articles and white space.

A spec is a path with an optional part, as of text sources (`intarsia.data.sources`): `piqa.jsonl#0.33:1` is the last
two thirds. Shares are of the file's items here: item i of n (from 0) is in START:END if START * n <= i < END * n, so
that adjacent parts share no item and lose none.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from intarsia.data.sources import parse_share
from intarsia.errors import Problems, UserError, check

_SUFFIX = ".jsonl"
_MOST_SHOWN = 20
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("text is blank")
    return text


_Text = Annotated[str, AfterValidator(_not_blank)]


class _Item(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class Question(_Item):
    """A query, its choices, and the index of the right one."""

    query: _Text
    choices: Annotated[tuple[_Text, ...], Field(min_length=2)]
    gold: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _in_range(self) -> Question:
        if self.gold >= len(self.choices):
            raise ValueError(f"gold is {self.gold}, and there are {len(self.choices)} choices")
        return self


class Solved(_Item):
    """A query, and the answer that should be written."""

    query: _Text
    answer: _Text


class Target(_Item):
    """A query, and the text that should follow it."""

    query: _Text
    target: _Text


Item = TypeVar("Item", Question, Solved, Target)


def names_a_file(spec: str) -> bool:
    """Whether a task is a local file rather than one of lm-eval."""
    return _split(spec)[0].suffix.lower() == _SUFFIX


def wants_text(spec: str) -> bool:
    """Whether a file's items have an answer that is written, rather than choices; by its first one."""
    first = next((line for line in _lines(_split(spec)[0]) if line.strip()), "")
    try:
        item = json.loads(first)
    except ValueError:
        return False
    return isinstance(item, dict) and "answer" in item and "choices" not in item


def is_right(written: str, answer: str) -> bool:
    """Whether what a model wrote is the answer."""
    wanted = _NUMBER.findall(answer)
    if wanted and not any(letter.isalnum() for letter in answer[answer.rindex(wanted[-1]) + len(wanted[-1]) :]):
        found = _NUMBER.findall(written)
        return bool(found) and _number(found[-1]) == _number(wanted[-1])
    lines = [line for line in written.splitlines() if line.strip()]
    return _bare(answer) in (_bare(written), *map(_bare, lines[:1]))


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _bare(text: str) -> str:
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def read_items(spec: str, kind: type[Item], *, limit: int | None = None) -> tuple[str, tuple[Item, ...]]:
    """Name and items of a task file, or of its part; of these the first `limit`.

    Raises:
        UserError: the file cannot be read, lines of it are no such items (all of them are named), or none is left.
    """
    path, part = _split(spec)
    start, end = (0.0, 1.0) if part is None else parse_share(part, where=spec)
    problems, items = Problems(), list[Item]()
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            try:
                items.append(kind.model_validate_json(line))
            except ValidationError as error:
                of_field = {each["loc"][:1]: each for each in reversed(error.errors())}  # the first of each
                for each in reversed(of_field.values()):
                    place = "".join(f", {name}" for name in each["loc"])
                    said = each["msg"].removeprefix("Value error, ")
                    problems.add(f"{path}:{number}{place}: {said}.", "Correct this line.")
    if len(problems) > _MOST_SHOWN:
        rest = len(problems) - _MOST_SHOWN
        del problems[_MOST_SHOWN:]
        problems.add(f"{path} has {rest} more problems.", "Correct the first ones.")
    problems.raise_any()
    n = len(items)
    kept = [item for index, item in enumerate(items) if start * n <= index < end * n][:limit]
    check(
        (n > 0, f"The task file {path} is empty.", "Write one JSON object a line."),
        (n == 0 or bool(kept), f"{spec} has none of the {n} items of the file.", "Take a larger part."),
    )
    return path.stem if part is None else f"{path.stem}#{part}", tuple(kept)


def _split(spec: str) -> tuple[Path, str | None]:
    if "#" not in spec or Path(spec).is_file():
        return Path(spec), None
    name, _, part = spec.rpartition("#")
    return Path(name), part


def _lines(path: Path) -> list[str]:
    try:
        # Not splitlines(): a line separator of Unicode may stand inside a JSON string.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        said = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise UserError(f"The task file {path} cannot be read: {said}.", "Check its path and permissions.") from error
    except UnicodeDecodeError as error:
        at = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise UserError(f"The task file {path} is not UTF-8: {at}.", "Convert it to UTF-8.") from None
