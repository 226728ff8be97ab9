"""Plain values held against what is expected; every mistake is collected, none stops the reading."""

from __future__ import annotations

import math
from typing import Any

from intarsia.data_file import MAX_INDEX, shown
from intarsia.errors import Problem, UserError

_MOST_REPORTED = 50


class Values:
    """Returns values that are as expected, and stand-ins for the others, with a problem for each in `problems`."""

    def __init__(self, where: str, remedy: str = "Mend the recipe.") -> None:
        self.problems: list[Problem] = []
        self.where, self.remedy = where, remedy

    def raise_problems(self) -> None:
        """Raise what was found, if anything; at most fifty problems are listed."""
        rest = len(self.problems) - _MOST_REPORTED
        if rest > 0:
            self.problems[_MOST_REPORTED:] = []
            self.wrong("", "no more of these", f"{rest} more problems", "Mend the first ones.")
        if self.problems:
            raise UserError(self.problems)

    def wrong(self, path: str, expected: str, found: str, remedy: str | None = None) -> None:
        place = f"{self.where}: {path}" if path else self.where
        self.problems.append(Problem(where=place, expected=expected, found=found, remedy=remedy or self.remedy))

    def mapping(self, value: Any, path: str, keys: tuple[str, ...], needed: tuple[str, ...] = ()) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.wrong(path, f"a mapping with {', '.join(keys)}", shown(value))
            return {}
        for key in value:
            if key not in keys:
                self.wrong(path, f"only the keys {', '.join(keys)}", shown(key), "Remove it, or mend its spelling.")
        for key in needed:
            if key not in value:
                self.wrong(path, f"the key {key!r}", "none", "Add it.")
        return value

    def text(self, value: Any, path: str, expected: str = "a text") -> str:
        if isinstance(value, str) and value.strip() and value.isprintable() and len(value) <= 4096:
            return value
        self.wrong(path, expected, shown(value))
        return "?"

    def integer(self, value: Any, path: str, least: int = 0, most: int = MAX_INDEX) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        self.wrong(path, f"a whole number from {least} to {most}", shown(value))
        return least

    def number(self, value: Any, path: str) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_INDEX:
            return float(value)
        self.wrong(path, "a number", shown(value))
        return math.nan

    def array(self, value: Any, path: str, most: int) -> list[Any]:
        if isinstance(value, list) and 0 < len(value) <= most:
            return value
        self.wrong(path, f"a list of 1 to {most} entries", shown(value))
        return []
