"""The run folder of a search.

- `tailor.json`: what decides every number: the family file as plain data, the members with the hashes of their weights,
  the space, the budgets, what the uncut base costs on the greatest of them, the objectives with the hashes of their
  examples, engine, seed, device and dtype.
- `family.yaml`: the family file, its paths made absolute.
- `wanted.json`: how many trials are asked for.
- `sensitivities.safetensors`, `warm_start.json`, `plans/METHOD/`: what the search begins with.
- `trials.jsonl`: the log (`intarsia.tailoring.history.Trial`).
- `front.json`: the Pareto front (`intarsia.tailoring.pareto.Front.to_dict`), written anew at every change of it, with
  `judged` once the incumbent is: how it and the uncut base do on what the search never saw.
- `fits/`: while it searches, what was fitted for trials that are under way or lead at their budget.
- `front/trial-N.yaml`: the recipes of the front; `best/`: the incumbent, built; `report.html`: the page about all that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intarsia.disk import read_json, write_whole
from intarsia.errors import Problem, UserError
from intarsia.reporting.tailor_run import FAMILY, FRONT, SETTINGS, WANTED, recipe_path
from intarsia.run_dir import differences
from intarsia.tailoring.history import TRIALS, History
from intarsia.tailoring.pareto import Front, front_of


class TailorFolder:
    """A folder in which a search is made, continued, and looked up."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def offer(cls, path: Path, settings: Mapping[str, Any]) -> TailorFolder:
        """The run that `start` would begin or continue; nothing is written.

        Args:
            settings: examples whose hashes are not known yet (None) are not compared.

        Raises:
            UserError: the folder holds a search with other settings (every difference is listed), or something else.
        """
        folder = cls(path)
        if folder._file(SETTINGS).exists():
            problems = _changes(folder.settings(), settings, str(folder._file(SETTINGS)))
            if problems:
                raise UserError(problems)
        elif path.exists() and not (path.is_dir() and all(_is_leftover(entry) for entry in path.iterdir())):
            raise UserError.of(
                where=str(path),
                expected="the folder of a search, an empty folder, or nothing",
                found="something else",
                remedy="Give another -o.",
            )
        return folder

    def start(self, settings: Mapping[str, Any], family: str) -> None:
        """Begin, or continue."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self._file(SETTINGS).exists():
            write_whole(self._file(FAMILY), family)
            write_whole(self._file(SETTINGS), json.dumps(_as_json(settings), indent=2) + "\n")

    @classmethod
    def existing(cls, path: Path) -> TailorFolder:
        """The folder of a search, to read or to go on with.

        Raises:
            UserError: there is none.
        """
        folder = cls(path)
        if not folder.is_one():
            raise UserError.of(
                where=str(path),
                expected=f"the folder of a search (with {SETTINGS})",
                found="none" if not path.exists() else "a folder without it" if path.is_dir() else "a file",
                remedy="Make one with `intarsia tailor family.yaml -o DIR`.",
            )
        return folder

    def is_one(self) -> bool:
        """Whether a search was begun here."""
        return self._file(SETTINGS).is_file()

    def settings(self) -> dict[str, Any]:
        """What the search was begun with."""
        return self._read(SETTINGS)

    @property
    def family(self) -> Path:
        """The family file."""
        return self._file(FAMILY)

    @property
    def sensitivities(self) -> Path:
        """Where the scores of pieces are kept."""
        return self._file("sensitivities.safetensors")

    @property
    def warm_start(self) -> Path:
        """Where the warm start is kept."""
        return self._file("warm_start.json")

    @property
    def best(self) -> Path:
        """Where the incumbent is built."""
        return self._file("best")

    @property
    def fits(self) -> Path:
        """Where fits of trials are kept while it searches."""
        return self._file("fits").absolute()

    @property
    def report(self) -> Path:
        """Where the page about the search is."""
        return self._file("report.html")

    def history(self) -> History:
        """The log."""
        return History(self._file(TRIALS))

    def wanted(self) -> int:
        """How many trials are asked for; 0 if nobody has asked yet."""
        return int(self._read(WANTED)["trials"]) if self._file(WANTED).exists() else 0

    def want(self, trials: int) -> None:
        """Ask for so many, before the first of them is made."""
        write_whole(self._file(WANTED), json.dumps({"trials": trials}) + "\n")

    def front(self) -> Front | None:
        """The Pareto front of the log."""
        settings = self.settings()
        names = [entry["name"] for entry in settings["objectives"]]
        return front_of(self.history(), names, max_budget=max(settings["budgets"]))

    def write_front(self, front: Front, judged: Mapping[str, Any] | None = None) -> None:
        """Write `front.json`."""
        data = {**front.to_dict(), **({} if judged is None else {"judged": judged})}
        write_whole(self._file(FRONT), json.dumps(_as_json(data), indent=2, allow_nan=False) + "\n")

    def judged(self) -> dict[str, Any] | None:
        """How the incumbent was judged, if it was."""
        found = self._read(FRONT).get("judged") if self._file(FRONT).exists() else None
        return found if isinstance(found, dict) else None

    def recipe_path(self, number: int) -> Path:
        """Where the recipe of a trial of the front is (or will be)."""
        return recipe_path(self.path, number)

    def plan_path(self, method: str) -> Path:
        """The run folder of a planner whose ladder the search begins with."""
        return self._file("plans") / method

    def _read(self, name: str) -> dict[str, Any]:
        remedy = "The folder is damaged; search into another one."
        return read_json(self._file(name), expected="JSON, as the search wrote it", remedy=remedy)

    def _file(self, name: str) -> Path:
        return self.path / name


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> list[Problem]:
    before, now = (_pinned(_as_json(facts)) for facts in (old, new))
    if None in now["examples"].values():
        del before["examples"], now["examples"]
    return list(differences(before, now, "-o"))


def _pinned(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What must stay the same, each thing once: what follows from the family file alone is told of as that."""
    return {
        "family": _by_name(facts["family"]),
        "weights": {name: member["sha256"] for name, member in facts["members"].items()},
        "config": facts["config"],
        "examples": {entry["name"]: entry["sha256"] for entry in facts["objectives"]},
        "device": facts["device"],
        "dtype": facts["dtype"],
    }


def _by_name(value: Any) -> Any:
    """Lists of things with names as mappings, so that a difference is told where it is."""
    if isinstance(value, dict):
        return {key: _by_name(entry) for key, entry in value.items()}
    if isinstance(value, list) and value and all(isinstance(entry, dict) and "name" in entry for entry in value):
        return {entry["name"]: _by_name(entry) for entry in value}
    return value


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return plain


def _is_leftover(entry: Path) -> bool:
    """Whether a kill left it before there were settings."""
    return entry.name.startswith(f".{SETTINGS}.") or entry.name == FAMILY or entry.name.startswith(f".{FAMILY}.")
