"""Plain values held against what is expected; every mistake is collected, none stops the reading."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from intarsia.errors import Problem, UserError
from intarsia.recipe.ranges import MAX_INDEX

_MOST_REPORTED = 50


def shown(value: Any) -> str:
    """A value in a message: short, and of one line."""
    if isinstance(value, (Mapping, list)):
        return "a mapping" if isinstance(value, Mapping) else f"a list of {len(value)}"
    if isinstance(value, int) and abs(value) > MAX_INDEX:
        return "a huge number"
    text = repr(value)
    return "nothing" if value is None else text if len(text) <= 60 else f"{text[:57]}..."


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

    def plain_mapping(self, value: Any, path: str) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.wrong(path, "a mapping", shown(value))
            return {}
        self._plain(value, path)
        return value

    def _plain(self, value: Any, path: str) -> None:
        """Provenance may say anything, in names and values that other tools can read."""
        if isinstance(value, dict):
            for key, entry in value.items():
                if not isinstance(key, str):
                    self.wrong(path, "names as keys", shown(key), "Put it in quotes.")
                else:
                    self._plain(key, path)
                    self._plain(entry, f"{path}.{shown(key)}")
        elif isinstance(value, list):
            for index, entry in enumerate(value):
                self._plain(entry, f"{path}[{index}]")
        elif isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            self.wrong(path, "text that UTF-8 can hold", "half of a surrogate pair")
