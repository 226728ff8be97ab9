"""A comparison on disk: what is compared, and a line for every model that has been measured.

A model counts as measured when its whole line is there, so a comparison that was killed continues with the next one.
`intarsia.reporting.comparison` reads the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intarsia.disk import append_line, read_json, write_whole
from intarsia.errors import UserError
from intarsia.reporting.comparison import ROWS, SETTINGS
from intarsia.run_dir import differences

PLANS = "plans"

_NOT_PINNED = ("asked", "calibration", "versions")
"""What may be another in a continued comparison: more methods and depths may be asked for."""

Key = tuple[str, int, str]
"""Method, layers and heal."""


class CompareFolder:
    """A folder in which a comparison is made and continued.

    Attributes:
        rows: the lines, by what they are about.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[Key, dict[str, Any]] = {}

    @classmethod
    def offer(cls, path: Path, facts: Mapping[str, Any]) -> CompareFolder:
        """The comparison that `start` would begin or continue; nothing is written.

        Raises:
            UserError: the folder holds a comparison with other settings (every difference is listed), or something
                else.
        """
        folder = cls(path)
        if folder._settings.exists():
            folder.rows = {key_of(row): row for row in folder._lines()}
            folder._refuse_others(*_pinned(folder.facts(), facts))
        elif path.exists() and not (path.is_dir() and all(_is_leftover(entry) for entry in path.iterdir())):
            raise UserError.of(
                where=str(path),
                expected="a comparison, an empty folder, or nothing",
                found="something else",
                remedy="Give another -o.",
            )
        return folder

    def start(self, facts: Mapping[str, Any]) -> None:
        """Begin the comparison or continue it.

        Raises:
            UserError: the calibration text is not the one it was begun with.
        """
        begun = self.facts()
        if begun.get("calibration"):
            texts = ({"calibration sha256": each["calibration"]["sha256"]} for each in (begun, facts))
            self._refuse_others(*texts)
        self.path.mkdir(parents=True, exist_ok=True)
        if self.rows and not facts["tasks"]:
            facts = {**facts, "tasks": begun.get("tasks", [])}
        write_whole(self._settings, json.dumps(facts, indent=2) + "\n")

    def append(self, row: Mapping[str, Any]) -> None:
        """Record a model."""
        whole = "".join(json.dumps(line) + "\n" for line in self._lines())
        if self._rows.exists() and self._rows.read_text(encoding="utf-8") != whole:
            write_whole(self._rows, whole)  # drop the line that a kill cut off
        append_line(self._rows, json.dumps(row))
        self.rows[key_of(row)] = dict(row)

    def plan(self, name: str) -> Path:
        """The run folder of a method's ladder."""
        return self.path / PLANS / name

    def relative(self, path: Path) -> str:
        """A path inside the folder as its rows name it."""
        return path.relative_to(self.path).as_posix()

    def _refuse_others(self, begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        problems = list(differences(begun, now, "-o"))
        # Before the first row nothing hangs on the settings, and a mistake among them can be mended.
        if problems and (self.rows or (self.path / PLANS).exists()):
            raise UserError(problems)

    @property
    def _settings(self) -> Path:
        return self.path / SETTINGS

    @property
    def _rows(self) -> Path:
        return self.path / ROWS

    def facts(self) -> dict[str, Any]:
        """What the comparison was begun with; empty where there is none.

        Raises:
            UserError: the file that tells it is damaged.
        """
        if not self._settings.exists():
            return {}
        remedy = "The comparison is damaged; delete its folder and compare again."
        return read_json(self._settings, expected="JSON", remedy=remedy)

    def _lines(self) -> Sequence[dict[str, Any]]:
        if not self._rows.exists():
            return []
        whole, _, _ = self._rows.read_text(encoding="utf-8").rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]


def key_of(row: Mapping[str, Any]) -> Key:
    """What a row is about."""
    return row["method"], row["layers"], row["heal"]


def _pinned(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What must be the same in both. Tasks may be added where there were none, or left out.

    A text or a file of questions is the same where its content is, whatever path it has.
    """
    names = {*old, *new} - {*_NOT_PINNED}
    if not (old.get("tasks") and new.get("tasks")):
        names -= {"tasks"}
    plain: list[dict[str, Any]] = json.loads(json.dumps([old, new]))
    for facts in plain:
        for entry in (*facts.get("eval_texts", ()), *facts.get("tasks", ())):
            if "sha256" in entry:
                entry.pop("spec", None)
    before, now = ({name: facts.get(name) for name in names} for facts in plain)
    return before, now


def _is_leftover(entry: Path) -> bool:
    """Whether a kill left it before there were settings."""
    return entry.name.startswith(f".{SETTINGS}.")
