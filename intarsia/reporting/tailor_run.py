"""The run folder of a search over a family, as a report reads it. docs/TAILOR.md describes its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.disk import damage_named, read_json
from intarsia.errors import UserError
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe
from intarsia.tailoring.history import EARLIER, TRIALS, History, Trial
from intarsia.tailoring.pareto import Front, front_of

SETTINGS, FAMILY, WANTED, FRONT = "tailor.json", "family.yaml", "wanted.json", "front.json"
_EXPECTED, _REMEDY = "what the search wrote", "Search into another folder."


def recipe_path(folder: Path, number: int) -> Path:
    """Return the path of the recipe of a trial of the front."""
    return folder / "front" / f"trial-{number:05d}.yaml"


@dataclass(frozen=True, kw_only=True)
class TailorRun:
    """What the folder of a search holds so far."""

    path: Path
    settings: Mapping[str, Any]
    # The family file.
    family: str
    trials: Sequence[Trial]
    front: Front | None
    # The final scores on examples that the search has not seen.
    final: Mapping[str, Any] | None
    # The number of trials that the search will have.
    wanted: int

    @property
    def objectives(self) -> list[str]:
        """Names of the objectives, in the order of the costs."""
        return [str(entry["name"]) for entry in self.settings["objectives"]]

    @property
    def base(self) -> Mapping[str, float]:
        """The base model's costs on the examples of the greatest budget; empty where they were not kept."""
        return self.settings.get("base") or {}

    @property
    def made(self) -> list[Trial]:
        """The trials of this search, without those of earlier searches."""
        return [trial for trial in self.trials if trial.engine != EARLIER]

    def recipe(self, trial: Trial) -> Recipe | None:
        """Return the recipe of a trial of the front, where it was written."""
        path = recipe_path(self.path, trial.number)
        try:
            return schema.load(path) if path.is_file() else None
        except UserError:
            return None


def is_tailor_run(path: Path) -> bool:
    """Whether a folder is that of a search."""
    return (path / SETTINGS).is_file()


def load(path: Path) -> TailorRun:
    """Read everything that the folder of a search holds so far.

    Raises:
        UserError: a file of it is damaged.
    """
    settings = _json(path / SETTINGS)
    trials = History(path / TRIALS).trials
    front = _json(path / FRONT) if (path / FRONT).is_file() else {}
    wanted = _json(path / WANTED)["trials"] if (path / WANTED).is_file() else 0
    family = path / FAMILY
    with damage_named(path / SETTINGS, expected=_EXPECTED, remedy=_REMEDY):
        names = [str(entry["name"]) for entry in settings["objectives"]]
        found = front_of(trials, names, max_budget=max(settings["budgets"]))
    return TailorRun(
        path=path,
        settings=settings,
        family=family.read_text(encoding="utf-8") if family.is_file() else "",
        trials=trials,
        front=found,
        final=front.get("judged"),
        wanted=int(wanted),
    )


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, expected=_EXPECTED, remedy=_REMEDY)
